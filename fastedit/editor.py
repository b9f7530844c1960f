"""The Editor: a model, a method, and edits that come back as a delta."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from weakref import ref

import torch
from torch import Tensor, nn

from fastedit import parallel
from fastedit.compose import Composition, Given
from fastedit.delta import WeightDelta, versions
from fastedit.errors import ConfigError, ModelError, listed
from fastedit.evaluation.predict import predict
from fastedit.evaluation.questions import prompt_notes
from fastedit.evaluation.report import EvaluationReport, compare
from fastedit.evaluation.sampling import draw
from fastedit.files import locked
from fastedit.loading import load_model, slow_dtype_note
from fastedit.methods import DEFAULT_METHOD, METHODS, method_of
from fastedit.methods.base import History, Memo, Plan, SolverPlan
from fastedit.models import Model, Topology, fingerprint, plain_state
from fastedit.planning import planned
from fastedit.progress import LEARNED, Progress, StageClock, no_progress
from fastedit.requests import EditRequest, as_requests, find_conflicts
from fastedit.results import EachEditResult, EditResult
from fastedit.saving import save_model
from fastedit.weights import put_back

Requests = str | Path | Sequence[EditRequest | Mapping[str, Any]]


@dataclass(frozen=True)
class EditPlan:
    """Edits that passed every check, ready for `Editor.run`.

    Attributes:
        requests: the edits.
        fingerprint: fingerprint of the model that they were planned for.
        made: the method's own plan.
        seconds: time that planning took.
        about: notes on the prompts and the dtype.
        clock: measures the seconds of each stage.
    """

    requests: list[EditRequest]
    fingerprint: str
    made: Plan
    seconds: float
    about: list[str]
    clock: StageClock

    @property
    def notes(self) -> list[str]:
        """Automatic choices, and whatever else the user should know before the work starts."""
        return self.about + self.made.notes


class _Edit:
    """An edit made by an Editor: keeps its delta alive while the model holds it, then only a weak reference to it."""

    def __init__(self, delta: WeightDelta, keys: dict[str, Tensor]) -> None:
        self.keys = keys
        self._delta: WeightDelta | None = delta
        self._weak = ref(delta)

    def standing(self, model: nn.Module) -> WeightDelta | None:
        """The delta if the model holds it now, else None."""
        delta = self._weak()
        self._delta = delta if delta is not None and delta.applied_to(model) else None
        return self._delta

    @property
    def gone(self) -> bool:
        return self._weak() is None


class Editor:
    """Edit the knowledge of a Hugging Face causal language model, in place and reversibly.

    Args:
        model: any supported causal language model; `edit` changes its weights.
        tokenizer: its tokenizer.
        method: one of `fastedit.methods.METHODS`.
        seed: seed for everything random in the method.
        chat_template: treat each prompt as a user turn in the tokenizer's chat template, both in edits and in
            measurements; otherwise prompts are plain text.
        progress: called with (stage, done, total) and, once there is one, the mean loss as a fourth argument:
            ``def progress(stage, done, total, loss=None)``.
        **config: the fields of the method's configuration (`layer`, `lr`, `batch_size`, …).

    Raises:
        ConfigError: an unknown method or field, a value that a field cannot take, no tokenizer, or a tokenizer
            without a chat template if `chat_template` is set.
        ModelError: no model; an unsupported architecture; an adapter that is not merged; weights on
            several devices; quantized weights outside the linear maps of the blocks.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        method: str = DEFAULT_METHOD,
        seed: int = 0,
        *,
        chat_template: bool = False,
        progress: Progress = no_progress,
        **config: Any,
    ) -> None:
        config_type = method_of(method, config).config
        self.parts = Model.of(model, tokenizer, chat_template=chat_template)
        self.model, self.tokenizer, self.method = model, tokenizer, method
        self.config = config_type(seed=seed, **config)
        self.progress = progress
        self._edits: list[_Edit] = []
        self._memo = Memo()

    @property
    def topology(self) -> Topology:
        """Where the model keeps its parts."""
        return self.parts.topology

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        method: str = DEFAULT_METHOD,
        *,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        offload: str | None = None,
        **config: Any,
    ) -> Editor:
        """Load model and tokenizer from a folder or by hub name. Reads only safetensors and runs no remote code.

        Args:
            dtype: dtype of the weights, such as "bfloat16" or torch.bfloat16; "auto" keeps the checkpoint's own.
            device: None is the GPU if there is one.
            offload: "prefix" is for models that are larger than the memory: weights of blocks stay in the checkpoint's
                files and are read when a block runs. An edit loads the blocks from the lowest edited one on; those
                below run once for all edits. Needs accelerate (``fastedit-llm[offload]``).

        Raises:
            ModelError: the model cannot be found or loaded, or its weights do not match its config.json.
            ConfigError: as for `Editor`; an unknown dtype or offload, or a device that cannot be used.
        """
        model, tokenizer = load_model(name, dtype=dtype, device=device, offload=offload)
        return cls(model, tokenizer, method, **config)

    def _look_again(self) -> None:
        """Find the parts anew if the caller has changed the model's modules or hooks, or taken another tokenizer."""
        if not self.parts.holds(self.model, self.tokenizer):
            self.parts = Model.of(self.model, self.tokenizer, chat_template=self.parts.chat is not None)

    def _report(self, stage: str, done: int, total: int, loss: float | None = None) -> None:
        """Pass a report on to `self.progress`, as it is set now; LEARNED only if it has a true `takes_learned`."""
        if stage != LEARNED or getattr(self.progress, "takes_learned", False):
            self.progress(stage, done, total, *(() if loss is None else (loss,)))

    @plain_state
    @parallel.together()
    def plan(self, requests: Requests) -> EditPlan:
        """Make every choice and check that an `edit` of these requests makes before its work; takes seconds.

        Raises:
            RequestError: requests that cannot be used; all of them are named.
            ConfigError, ModelError: the method cannot do this with the model.
        """
        self._look_again()
        edits, now = as_requests(requests), fingerprint(self.model)
        started = time.perf_counter()
        clock = StageClock(self._report)
        history, lost = self._history(now)
        options: dict[str, Any] = {"history": history, "progress": clock.report}
        method_plan = planned(METHODS[self.method], self.parts, edits, self.config, **options)
        notes = [*lost, *slow_dtype_note(self.parts.network), *prompt_notes(self.parts, edits)]
        return EditPlan(edits, now, method_plan, time.perf_counter() - started, notes, clock)

    def edit(self, requests: Requests) -> EditResult:
        """Make all edits: `plan` and `run`.

        With torch.distributed, all processes must make the same call. They share the work, and each holds the edit.

        Args:
            requests: `EditRequest`s, dicts of any known format, or the path of a file of them.

        Returns:
            The result; the model holds the edit. On any exception the model is as it was before.

        Raises:
            RequestError, ConfigError, ModelError: as for `plan`.
            EditError: the edit failed while it ran.
        """
        return self.run(self.plan(requests))

    @plain_state
    @parallel.together()
    def run(self, plan: EditPlan) -> EditResult:
        """Carry out a plan: make its edits, which the model then holds.

        Raises:
            ModelError: the model was changed after the plan was made.
            EditError: the edit failed while it ran; the model is as it was before.
            FileError: another process is using the state folder of this run.
        """
        edits, before = plan.requests, plan.fingerprint
        if fingerprint(self.model) != before:
            raise ModelError("the model was changed after this plan was made; make a new plan")
        conflicts = find_conflicts(edits)
        started = time.perf_counter()
        state = getattr(self.config, "state", None)
        with locked(Path(state)) if state and parallel.first() else nullcontext():
            plan.clock.start()
            result = plan.made.run()
        seconds = plan.seconds + time.perf_counter() - started
        stages = {"plan": plan.seconds, **plan.clock.seconds}
        stages["rest"] = seconds - sum(stages.values())
        config = result.config | ({"state": None} if "state" in result.config else {})  # a path on this machine
        metadata: dict[str, Any] = {"method": self.method, "config": config, "fingerprint": before}
        metadata |= {
            "chat_template": self.parts.chat is not None,
            "versions": versions(),
            "edits": len(edits) if result.kept_edits is None else result.kept_edits,
        }
        network = self.parts.network
        try:
            delta = WeightDelta(result.updates, metadata, applied_to=network, originals=result.originals)
            parallel.gathered(None)  # an edit that failed in another process fails here, too
        except BaseException:
            put_back(dict(network.named_parameters()), result.originals)
            raise
        self._edits.append(_Edit(delta, result.keys))
        return EditResult(
            delta=delta,
            requests=edits,
            conflicts=conflicts,
            losses=result.losses,
            notes=plan.about + result.notes,
            seconds=seconds,
            probability=result.probability,
            interrupted=result.interrupted,
            learned=result.learned,
            stages=stages,
            cached=result.cached,
            _model=self.parts,
        )

    @plain_state
    @parallel.together()
    def edit_each(self, requests: Requests) -> EachEditResult:
        """Solve each edit by itself, as benchmarks of single edits do, without changing the model.

        The edits share all forward passes, and `EachEditResult.evaluate` measures each request under its own edit. If
        the model has no preset, `lr` is chosen from the typical hidden state of these edits; give `lr` if an update
        must not depend on which edits are solved together.

        Raises:
            ConfigError: the method cannot solve edits one by one (locft-bf cannot).
            RequestError, ModelError: as for `edit`.
        """
        if not METHODS[self.method].solves_each:
            able = ", ".join(name for name, method in METHODS.items() if method.solves_each)
            raise ConfigError(f"{self.method} cannot solve edits one by one; methods that can: {able}")
        plan = self.plan(requests)
        edits, now = plan.requests, plan.fingerprint
        solver = cast(SolverPlan, plan.made)
        started = time.perf_counter()
        result = solver.run_each()
        result.notes[:0] = plan.about
        seconds = plan.seconds + time.perf_counter() - started
        metadata: dict[str, Any] = {"method": self.method, "config": result.config, "fingerprint": now}
        metadata |= {"versions": versions(), "chat_template": self.parts.chat is not None}
        return EachEditResult(edits, find_conflicts(edits), seconds, result, metadata, self.parts, self.progress)

    @plain_state
    def apply_deltas(self, deltas: Sequence[Given]) -> Composition:
        """Apply several saved edits to the model together.

        Deltas made for this model are added up, so their order does not matter. A delta that was made on top of others
        comes right after them in the list. `evaluate` counts all of them as edits of this Editor.

        Args:
            deltas: deltas, or paths of their files.

        Returns:
            The composition. It tells where the deltas overlap, and can revert all of them or one.

        Raises:
            ModelError: a delta was made for another model, or is already applied; the model is as it was before.
            FileError: a file is not a delta.
        """
        self._look_again()
        return Composition(deltas, self.parts.network, lambda delta: self._edits.append(_Edit(delta, {})))

    @property
    def deltas(self) -> list[WeightDelta]:
        """The deltas of the edits that the model holds now, oldest first."""
        return [delta for delta, _ in self._standing()]

    def _history(self, now: str) -> tuple[History, list[str]]:
        """The edits that this Editor made before, and a note if weights no longer hold them.

        Args:
            now: the model's fingerprint.
        """
        standing = self._standing()
        unedited = standing[0][0].metadata["fingerprint"] if standing else now
        keys: dict[str, list[Tensor]] = {}  # path -> keys of the edits there
        newest: dict[str, WeightDelta] = {}  # path -> the last edit there
        for delta, edit in standing:
            newest |= dict.fromkeys(delta.updates, delta)
            for path, edit_keys in edit.keys.items():
                keys.setdefault(path, []).append(edit_keys)
        changed = set[str]()  # by something else, after the last edit there
        for delta in {*newest.values()} if keys else ():
            changed |= {path for path in delta.overwritten() if newest[path] is delta}
        preserved = {path: torch.cat(keys[path]) for path in keys.keys() - changed}
        note = (
            f"something else changed {listed(sorted(changed))} after the earlier edits; these are not preserved there"
        )
        return History(unedited, preserved, self._memo, now=now), [note] if changed else []

    def _standing(self) -> list[tuple[WeightDelta, _Edit]]:
        """The edits that the model holds now with their deltas, oldest first."""
        pairs = [(edit.standing(self.topology.model), edit) for edit in self._edits]
        self._edits = [edit for edit in self._edits if not edit.gone]
        return [(delta, edit) for delta, edit in pairs if delta is not None]

    @plain_state
    def evaluate(
        self,
        requests: Requests,
        *,
        text: Sequence[str] = (),
        generate: bool = True,
        batch_tokens: int | None = None,
        sample: int | None = None,
    ) -> EvaluationReport:
        """Measure the model as it is, and what this Editor's edits did to neighbours and to `text`.

        Args:
            requests: as for `edit`.
            text: documents for perplexity, before and after.
            batch_tokens: tokens per forward pass; None chooses what suits the device.
            generate: also measure greedy generation, as a user sees it.
            sample: measure at most this many requests, drawn with seed 0; the report then has confidence intervals.

        Returns:
            The report. Its locality is None if the model holds no edit of this Editor.

        Raises:
            RequestError, EditError: as for `fastedit.evaluation.predict.predict`.
            ConfigError: `sample` is less than 1.
        """
        self._look_again()
        everything = as_requests(requests)
        asked = draw(everything, sample)

        def measure(**kwargs: Any) -> Any:
            return predict(
                self.parts,
                asked,
                generate=generate,
                text=text,
                batch_tokens=batch_tokens,
                progress=self.progress,
                **kwargs,
            )

        after = measure()
        standing = self.deltas
        if not standing:
            return compare(asked, after, None, total=len(everything))
        reverted: list[WeightDelta] = []
        try:
            for delta in reversed(standing):
                delta.revert()
                reverted.append(delta)
            before = measure(kinds=("neighbour",))
        finally:
            while reverted:  # force: an edit below these may be gone by now, so that fingerprints differ
                reverted.pop().apply(self.model, force=True)
        return compare(asked, after, before, total=len(everything))

    def save_model(self, directory: str | Path) -> None:
        """Write model and tokenizer as an ordinary Hugging Face checkpoint that appears whole or not at all.

        Raises:
            FileError: `directory` exists and is not an empty folder or a checkpoint, or it holds the folder that the
                model was loaded from; the disk is full.
        """
        parallel.of_first(lambda: save_model(self.parts, directory))
