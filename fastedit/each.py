"""Independent edits in bulk: each against the unedited model, none of them written (`Editor.edit_each`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

from torch import Tensor
from transformers.pytorch_utils import Conv1D

from fastedit.delta import WeightDelta
from fastedit.errors import ConfigError, ModelError
from fastedit.evaluate import EvaluationReport, compare
from fastedit.methods import EachResult, Progress
from fastedit.methods.base import no_progress
from fastedit.models import LowRank, Topology, fingerprint
from fastedit.predictions import predict
from fastedit.requests import EditRequest, RequestReport


@dataclass
class EachEditResult:
    """N edits, each by itself; the model is as it was.

    `loss` and `probability` [N] are those of the targets; `dropped` the places of edits without a target; `notes` what
    was chosen automatically.
    """

    requests: list[EditRequest]
    conflicts: RequestReport
    seconds: float
    _found: EachResult = field(repr=False)
    _metadata: Mapping[str, Any] = field(repr=False)
    _topology: Topology = field(repr=False)
    _tokenizer: Any = field(repr=False)
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

    def delta(self, i: int) -> WeightDelta:
        """Edit i as an object that can be applied, reverted and saved.

        Raises:
            ConfigError: there is no such edit, or it was dropped.
        """
        if not isinstance(i, Integral) or not 0 <= i < len(self) or i in self.dropped:
            raise ConfigError(f"there is no edit {i!r}: {len(self)} were made, dropped were {list(self.dropped)}")
        updates = {}
        for path, (left, right) in self._found.factors.items():
            turned = isinstance(self._topology.model.get_submodule(path.removesuffix(".weight")), Conv1D)
            updates[path] = LowRank(right[i].T, left[i].T) if turned else LowRank(left[i], right[i])
        return WeightDelta(updates, {**self._metadata, "edits": 1})

    def evaluate(self, *, generate: bool = True, batch_tokens: int | None = None) -> EvaluationReport:
        """Measure every request under its own edit, and before it; no weight is written.

        Raises:
            ModelError: the model was edited since.
        """
        model = self._topology.model
        if fingerprint(model) != self._metadata["fingerprint"]:
            raise ModelError("the model is not the one these edits were made for; revert what was edited since")
        updates = {model.get_submodule(path.removesuffix(".weight")): f for path, f in self._found.factors.items()}
        asked = [r for i, r in enumerate(self.requests) if i not in self.dropped]
        kept = [i for i in range(len(self)) if i not in self.dropped]
        options: dict[str, Any] = {"generate": generate, "batch_tokens": batch_tokens, "progress": self._progress}
        own = {module: (left[kept], right[kept]) for module, (left, right) in updates.items()}
        after = predict(self._topology, self._tokenizer, asked, updates=own, **options)
        return compare(asked, after, predict(self._topology, self._tokenizer, asked, **options))
