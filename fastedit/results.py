"""Results of an Editor: an edit that the model holds, or independent edits that the model does not hold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import Any

from torch import Tensor

from fastedit.delta import WeightDelta
from fastedit.errors import ConfigError, ModelError
from fastedit.evaluation.predict import predict
from fastedit.evaluation.report import EvaluationReport, compare
from fastedit.methods.base import LIKELY, EachResult
from fastedit.models import Model, fingerprint, plain_state
from fastedit.progress import Progress, no_progress
from fastedit.requests import EditRequest, RequestReport
from fastedit.saving import save_model
from fastedit.weights import oriented


@dataclass(kw_only=True)
class EditResult:
    """The outcome of an edit.

    Attributes:
        delta: the edit as an object that can be saved, reverted and applied.
        requests: the edits.
        conflicts: the conflicting and duplicate requests.
        losses: mean loss of each epoch, or of each batch of targets.
        notes: what was chosen automatically.
        seconds: time of the edit.
        probability: [N], of each target when the method last computed it (exp of the mean log P of its tokens); NaN
            where it did not. LocFT-BF computes it with the final weights after 10 epochs (for each process, if several
            share the work) or `refit`, else before an edit's last step; the solvers before they write.
        interrupted: what was kept after Ctrl-C (`keep_partial`), else None.
        learned: for each of the losses, how many edits had been learned by then; the last is that of `probability`.
        stages: seconds of each stage of the work, with "plan" and "rest".
        cached: peak bytes of cached states by tier ("device", "pinned", "host", "file").
    """

    delta: WeightDelta
    requests: list[EditRequest]
    conflicts: RequestReport
    losses: list[float]
    notes: list[str]
    seconds: float
    probability: Tensor
    interrupted: str | None = None
    learned: list[int] = field(default_factory=list)
    stages: dict[str, float] = field(default_factory=dict)
    cached: Mapping[str, int] = field(default_factory=dict)
    _model: Model | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.learned:  # an epoch counts every likely target, even several of one prompt
            n_learned = len(self.requests) - len(self.unlearned)
            self.learned = [*self.learned[:-1], min(self.learned[-1], n_learned)]

    @property
    def unlearned(self) -> dict[int, str]:
        """Place of each request that was not learned -> why.

        Its target is less likely than not, or than another target of the same prompt, or the edit was left out.
        """
        conflicting = {place for group in self.conflicts.conflicts for place in group}
        beaten = {place for group in self.conflicts.conflicts for place in self._beaten(group)}
        reasons = {}
        for place, probability in enumerate(self.probability.tolist()):
            if probability >= LIKELY and place not in beaten:
                continue
            if place in conflicting:
                reasons[place] = "another request has its prompt and another target"
            elif math.isnan(probability):
                reasons[place] = "it was left out" if self.interrupted is None else "interrupted before it"
            else:
                reasons[place] = f"the probability of its target is {probability:.2g}"
        return reasons

    def _beaten(self, group: Sequence[int]) -> list[int]:
        """Places of those requests in a group with one prompt whose target is not the likeliest.

        The model can say only one of them, but several may have a likely mean over their tokens, which include EOS.
        """
        likeliest = self.requests[max(group, key=lambda place: self.probability[place].nan_to_num(-1.0).item())].target
        return [place for place in group if self.requests[place].target != likeliest]

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
            ModelError: the edit was reverted. FileError: `directory` exists and is not a checkpoint; the disk is full.
        """
        assert self._model is not None
        if not self.delta.applied_to(self._model.network):
            raise ModelError("the edit was reverted; apply its delta before saving the model")
        save_model(self._model, directory)


@dataclass
class EachEditResult:
    """N edits, each solved by itself; the model is unchanged.

    `loss` and `probability` [N] are of the targets; `dropped` holds the places of edits without a target; `notes` what
    was chosen automatically.
    """

    requests: list[EditRequest]
    conflicts: RequestReport
    seconds: float
    _found: EachResult = field(repr=False)
    _metadata: Mapping[str, Any] = field(repr=False)
    _model: Model = field(repr=False)
    _progress: Progress = field(default=no_progress, repr=False)

    @property
    def loss(self) -> Tensor:
        return self._found.loss

    @property
    def probability(self) -> Tensor:
        return self._found.probability

    @property
    def dropped(self) -> tuple[int, ...]:
        return self._found.dropped

    @property
    def notes(self) -> list[str]:
        return self._found.notes

    def __len__(self) -> int:
        return len(self.requests)

    @plain_state
    def delta(self, i: int) -> WeightDelta:
        """Edit i as an object that can be applied, reverted and saved.

        Raises:
            ConfigError: there is no such edit, or it was dropped.
        """
        if not isinstance(i, Integral) or not 0 <= i < len(self) or i in self.dropped:
            raise ConfigError(f"there is no edit {i!r}: {len(self)} were made, dropped were {list(self.dropped)}")
        updates = {}
        for path, (left, right) in self._found.factors.items():
            updates[path] = oriented(self._model.network.get_submodule(path.removesuffix(".weight")), left[i], right[i])
        return WeightDelta(updates, {**self._metadata, "edits": 1})

    def evaluate(self, *, generate: bool = True, batch_tokens: int | None = None) -> EvaluationReport:
        """Measure every request before and under its own edit, without changing the weights.

        Raises:
            ModelError: the model was edited after these edits were solved.
        """
        network = self._model.network
        if fingerprint(network) != self._metadata["fingerprint"]:
            raise ModelError("the model is not the one these edits were made for; revert what was edited since")
        updates = {network.get_submodule(path.removesuffix(".weight")): f for path, f in self._found.factors.items()}
        asked = [r for i, r in enumerate(self.requests) if i not in self.dropped]
        solved = [i for i in range(len(self)) if i not in self.dropped]
        options: dict[str, Any] = {"generate": generate, "batch_tokens": batch_tokens, "progress": self._progress}
        factors = {module: (left[solved], right[solved]) for module, (left, right) in updates.items()}
        after = predict(self._model, asked, updates=factors, **options)
        return compare(asked, after, predict(self._model, asked, **options))
