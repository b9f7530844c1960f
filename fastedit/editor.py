"""The Editor: a model, a method, and edits that come back as a delta."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any
from weakref import ref

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastedit.delta import WeightDelta, versions
from fastedit.each import EachEditResult
from fastedit.errors import ConfigError, ModelError
from fastedit.evaluate import EvaluationReport, compare
from fastedit.files import check_directory, replacing_directory
from fastedit.methods import EACH, METHODS, Progress
from fastedit.methods.base import History, no_progress
from fastedit.models import fingerprint, topology
from fastedit.models.topology import check_editable
from fastedit.predictions import predict
from fastedit.requests import EditRequest, RequestReport, as_requests, find_conflicts

Requests = str | Path | Sequence[EditRequest | Mapping[str, Any]]
_DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
_PARTS = {
    "config.json": ("config.json",),
    "weights as *.safetensors": ("*.safetensors",),
    "the tokenizer's files": ("tokenizer.json", "tekken.json", "vocab*", "merges.txt", "*.model", "*.tiktoken"),
}
_BLOCK = re.compile(r"(?:^|\.)(?:layers|h)\.(\d+)\.")


@dataclass
class EditResult:
    """What an edit did.

    `delta` can be saved, reverted and applied; `losses` holds the mean loss of each epoch; `conflicts` the
    conflicting and duplicate requests; `notes` what was chosen automatically; `seconds` the time of the edit;
    `interrupted` what was kept where Ctrl-C ended it (`keep_partial`), else None.
    """

    delta: WeightDelta
    requests: list[EditRequest]
    conflicts: RequestReport
    losses: list[float]
    notes: list[str]
    seconds: float
    _editor: Editor = field(repr=False)
    interrupted: str | None = None

    def revert(self) -> None:
        """Restore the model bit for bit; later edits have to be reverted first.

        Raises:
            ModelError: already reverted, or a later edit changed the same weights.
        """
        self.delta.revert()

    def save_model(self, directory: str | Path) -> None:
        """Write the edited model and its tokenizer as an ordinary Hugging Face checkpoint (safetensors).

        The checkpoint appears whole or not at all.

        Raises:
            ModelError: the edit was reverted; `directory` exists and is no checkpoint; the disk is full.
        """
        if not self.delta.applied_to(self._editor.model):
            raise ModelError("the edit was reverted; apply its delta before saving the model")
        self._editor.save_model(directory)


class _Edit:
    """An edit of an Editor: kept while the model holds it, and after that only as long as somebody can apply it."""

    def __init__(self, delta: WeightDelta, keys: dict[str, Tensor]) -> None:
        self.keys = keys
        self._delta: WeightDelta | None = delta
        self._weak = ref(delta)

    def standing(self, model: nn.Module) -> WeightDelta | None:
        """Its delta, if the model holds it now."""
        delta = self._weak()
        self._delta = delta if delta is not None and delta.applied_to(model) else None
        return self._delta

    @property
    def gone(self) -> bool:
        return self._weak() is None


class Editor:
    """Edits the knowledge of a Hugging Face causal language model, in place and reversibly.

    Args:
        model: any supported causal language model; its weights are changed by `edit`.
        tokenizer: its tokenizer.
        method: one of `fastedit.methods.METHODS`.
        seed: of everything random in the method.
        progress: called with (stage, done, total) and, once there is one, the mean loss as a fourth argument:
            ``def progress(stage, done, total, loss=None)``.
        **config: the fields of the method's configuration (`layer`, `lr`, `batch_size`, …).

    Raises:
        ConfigError: an unknown method, an unknown field, a value that a field cannot take, or no tokenizer.
        ModelError: no model; an unsupported architecture; quantized or offloaded weights, or weights on several
            devices.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        method: str = "locft-bf",
        seed: int = 0,
        *,
        progress: Progress = no_progress,
        **config: Any,
    ) -> None:
        if method not in METHODS:
            raise ConfigError(f"unknown method {method!r}; known methods: {', '.join(METHODS)}")
        config_type, self._run = METHODS[method]
        known = [f.name for f in fields(config_type)]
        for name in config:
            if name not in known:
                raise ConfigError(f"{method} has no field {name!r}; its fields: {', '.join(known)}")
        self.topology = topology(model)
        check_editable(self.topology)
        if not callable(tokenizer) or not hasattr(tokenizer, "eos_token_id"):
            given = type(tokenizer).__name__
            raise ConfigError(f"tokenizer is a {given}; give the model's, as AutoTokenizer.from_pretrained loads it")
        self.model, self.tokenizer, self.method = model, tokenizer, method
        self.config = config_type(seed=seed, **config)
        self.progress = progress
        self._edits: list[_Edit] = []
        self._kept: dict[Any, Tensor] = {}

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        method: str = "locft-bf",
        *,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        **config: Any,
    ) -> Editor:
        """Load model and tokenizer from a folder or by hub name; only safetensors, and no remote code.

        Args:
            dtype: of the weights, such as "bfloat16" or torch.bfloat16; "auto" is the checkpoint's own.
            device: None is the GPU if there is one.

        Raises:
            ModelError: not to be found or loaded, or not with the weights that its config.json says.
            ConfigError: as for `Editor`; a dtype or a device that there is not.
        """
        if not isinstance(name, str | Path):
            raise ConfigError(f"name is {name!r}; give a folder or a hub name")
        if (chosen := str(dtype).removeprefix("torch.")) not in _DTYPES:
            raise ConfigError(f"dtype is {dtype!r}; give one of {', '.join(_DTYPES)}")
        device = ("cuda" if torch.cuda.is_available() else "cpu") if device is None else device
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError, TypeError) as error:
            raise ConfigError(f"device is {device!r}, which cannot be used: {_reason(error)}; give another") from error
        try:
            # without trust_remote_code=False transformers asks on stdin whether to run a checkpoint's code
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
            model, loading = AutoModelForCausalLM.from_pretrained(
                name,
                dtype=chosen,
                use_safetensors=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                output_loading_info=True,
            )
        except Exception as error:  # whatever a wrong file makes transformers, tokenizers or safetensors raise
            raise ModelError(_why_not_loaded(name, error)) from error
        if other := sorted(loading["mismatched_keys"]):
            path, *shapes = [other[0]] if isinstance(other[0], str) else other[0]  # transformers 4 has names alone
            said = ", but by its config.json it should be ".join(str(list(shape)) for shape in shapes)
            raise ModelError(f"{name}: {path} is {said or 'of another shape than its config.json says'}")
        if missing := sorted(loading["missing_keys"]):
            raise ModelError(f"{name} lacks {len(missing)} weights of its architecture, {missing[0]} among them")
        blocks = int(model.config.get_text_config().num_hidden_layers)
        # others are left out for good reasons: masks and rotations in old checkpoints, say
        if more := [k for k in sorted(loading["unexpected_keys"]) if (m := _BLOCK.search(k)) and int(m[1]) >= blocks]:
            raise ModelError(
                f"{name} has {len(more)} weights of blocks behind the {blocks} of its config.json, {more[0]} among "
                "them; give the config.json that belongs to the weights"
            )
        return cls(model.to(device).eval(), tokenizer, method, **config)

    def edit(self, requests: Requests) -> EditResult:
        """Make all edits.

        Args:
            requests: `EditRequest`s, dicts of any known format, or the path of a file of them.

        Returns:
            The result; the model holds the edit. On any exception the model is as it was.

        Raises:
            RequestError: unusable requests; EditError: the edit failed while it ran.
        """
        edits = as_requests(requests)
        conflicts = find_conflicts(edits)
        before = fingerprint(self.model)
        started = time.perf_counter()
        history = self._history(before)
        found = self._run(self.topology, self.tokenizer, edits, self.config, self.progress, history=history)
        seconds = time.perf_counter() - started
        model = self.topology.model
        metadata: dict[str, Any] = {"method": self.method, "config": found.config, "fingerprint": before}
        metadata |= {"versions": versions(), "edits": len(edits) if found.kept is None else found.kept}
        try:
            delta = WeightDelta(found.updates, metadata, applied_to=model, originals=found.originals)
        except BaseException:
            for path, original in found.originals.items():
                model.get_parameter(path).data.copy_(original)
            raise
        self._edits.append(_Edit(delta, found.keys))
        return EditResult(delta, edits, conflicts, found.losses, found.notes, seconds, self, found.interrupted)

    def edit_each(self, requests: Requests) -> EachEditResult:
        """Solve each edit by itself against the model as it is, as benchmarks of single edits do; writes nothing.

        The edits share every pass, and `EachEditResult.evaluate` measures each request under its own edit. Where the
        model has no preset, `lr` follows the typical state of these edits: give it for updates that do not depend on
        which edits are solved together.

        Raises:
            ConfigError: the method has no independent edits (locft-bf has none).
            RequestError, ModelError: as for `edit`.
        """
        if self.method not in EACH:
            raise ConfigError(f"{self.method} cannot solve edits one by one; methods that can: {', '.join(EACH)}")
        edits = as_requests(requests)
        now = fingerprint(self.model)
        started = time.perf_counter()
        found = EACH[self.method](
            self.topology, self.tokenizer, edits, self.config, self.progress, history=self._history(now)
        )
        seconds = time.perf_counter() - started
        metadata = {"method": self.method, "config": found.config, "fingerprint": now, "versions": versions()}
        conflicts = find_conflicts(edits)
        return EachEditResult(edits, conflicts, seconds, found, metadata, self.topology, self.tokenizer, self.progress)

    def _history(self, now: str) -> History:
        """What this Editor did to the model, whose fingerprint is `now`."""
        standing = self._standing()
        keys: dict[str, list[Tensor]] = {}
        for _, edit in standing:
            for path, more in edit.keys.items():
                keys.setdefault(path, []).append(more)
        unedited = standing[0][0].metadata["fingerprint"] if standing else now
        return History(unedited, {path: torch.cat(some) for path, some in keys.items()}, self._kept)

    def _standing(self) -> list[tuple[WeightDelta, _Edit]]:
        """The edits that the model holds now, the first one first."""
        found = [(edit.standing(self.topology.model), edit) for edit in self._edits]
        self._edits = [edit for edit in self._edits if not edit.gone]
        return [(delta, edit) for delta, edit in found if delta is not None]

    def evaluate(
        self, requests: Requests, *, text: Sequence[str] = (), generate: bool = True, batch_tokens: int | None = None
    ) -> EvaluationReport:
        """Measure the model as it is, and what this Editor's edits did to neighbours and to `text`.

        Args:
            requests: as for `edit`.
            text: documents for perplexity, before and after.
            batch_tokens: tokens of a forward pass; None is what suits the device.
            generate: also measure greedy generation, as a user sees it.

        Returns:
            The report; without an edit of this Editor its locality is None.
        """
        asked = as_requests(requests)

        def measure(**kwargs: Any) -> Any:
            return predict(
                self.topology,
                self.tokenizer,
                asked,
                generate=generate,
                text=text,
                batch_tokens=batch_tokens,
                progress=self.progress,
                **kwargs,
            )

        after = measure()
        standing = [delta for delta, _ in self._standing()]
        if not standing:
            return compare(asked, after, None)
        reverted: list[WeightDelta] = []
        try:
            for delta in reversed(standing):
                delta.revert()
                reverted.append(delta)
            before = measure(kinds=("neighbour",))
        finally:
            while reverted:  # by force: an edit that is no longer there may have stood below the others
                reverted.pop().apply(self.model, force=True)
        return compare(asked, after, before)

    def save_model(self, directory: str | Path) -> None:
        """Write model and tokenizer as an ordinary Hugging Face checkpoint that appears whole or not at all.

        Raises:
            ModelError: `directory` exists and is not an empty folder or a checkpoint, or it holds the folder that the
                model was loaded from; the disk is full.
        """
        model: Any = self.topology.model
        directory, source = Path(directory), str(model.config._name_or_path)
        if os.path.isdir(source) and Path(source).resolve() != directory.resolve():
            check_directory(directory, {"the model": Path(source)})
        try:
            with replacing_directory(directory) as temporary:
                model.save_pretrained(temporary)
                self.tokenizer.save_pretrained(temporary)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{directory}: the model could not be saved: {error}; nothing was written") from error


def _why_not_loaded(name: str | Path, error: Exception) -> str:
    """What to tell of a checkpoint that could not be loaded: what is wrong with the folder, or what the hub said."""
    folder = Path(name)
    if not os.path.exists(folder):
        return f"no folder {name}, and no model could be loaded from the hub: {_reason(error)}"
    reason = _reason(error) if folder.is_dir() else "it is no folder"
    if folder.is_dir():
        found = {part: [path for glob in names for path in folder.glob(glob)] for part, names in _PARTS.items()}
        if missing := [part for part, paths in found.items() if not paths]:
            reason = f"it lacks {' and '.join(missing)}"
        for path in (path for paths in found.values() for path in paths):
            try:
                path.open("rb").close()
            except OSError as unreadable:
                reason = f"{path.name} cannot be read: {unreadable.strerror}"
    return f"no model could be loaded from {name}: {reason}"


def _reason(error: BaseException) -> str:
    """The first line of an error's message, or all of it where that line only introduces the others."""
    text = str(error).strip()
    first = next(iter(text.splitlines()), "").strip()
    said = " ".join(text.split()) if first.endswith(":") else first
    return said if " " in said else f"{type(error).__name__}: {said}".removesuffix(": ")
