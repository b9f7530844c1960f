"""The common ground of all editing methods: the edits they take, the plan they make, the result they return."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol
from weakref import ref

from torch import Tensor

from fastedit.weights import Update

LIKELY = 0.5
"""The least probability of a target that counts as learned."""


class Edit(Protocol):
    """The part of an edit that methods need; `fastedit.EditRequest` has it."""

    @property
    def prompt(self) -> str: ...
    @property
    def target(self) -> str: ...
    @property
    def subject(self) -> str | None: ...
    @property
    def id(self) -> str | None: ...


class Memo:
    """A cache of tensors that the next edit may need again; it keeps the last one for each place."""

    def __init__(self) -> None:
        self._held: dict[Hashable, tuple[list[Any], Tensor]] = {}

    def get(self, place: Hashable, source: Sequence[Any], make: Callable[[], Tensor]) -> Tensor:
        """The tensor of a place, made anew only if its source has changed.

        Args:
            source: what the tensor is made from; tensors in it are compared by identity, and not kept alive.
        """
        parts = [ref(part) if isinstance(part, Tensor) else part for part in source]
        if place in self._held and not all(map(_same, self._held[place][0], parts)):
            del self._held[place]  # frees its memory before the new one is made
        if place not in self._held:
            self._held[place] = parts, make()
        return self._held[place][1]


def _same(one: Any, other: Any) -> bool:
    return one is other or (not isinstance(one, ref) and bool(one == other))


@dataclass(frozen=True)
class History:
    """Earlier edits of a model.

    Attributes:
        fingerprint: fingerprint of the model before this Editor's edits; its statistics belong to that model.
        keys: path of an edited parameter -> keys [n, d] of edits that are in place, which later edits should preserve.
        second_moments: path of a projection -> C [d, d], the mean of k kᵀ; used instead of those in files.
        memo: cache of what the next edit may need again.
        now: fingerprint of the model as it is; None is not known.
    """

    fingerprint: str
    keys: Mapping[str, Tensor] = field(default_factory=dict)
    memo: Memo = field(default_factory=Memo)
    second_moments: Mapping[str, Tensor] = field(default_factory=dict)
    now: str | None = None


@dataclass(kw_only=True)
class MethodResult:
    """The outcome of a method; the model already holds the edit.

    Attributes:
        updates: path of each edited parameter -> its fp32 additive update, a tensor of its shape or factors.
        originals: path of each edited parameter -> its value before, in its own dtype.
        config: the method's configuration with every automatic choice filled in.
        losses: mean loss of each epoch, or of each batch of targets.
        notes: what the user should know.
        keys: path of each edited parameter -> the edits' keys [N, d], if the method has keys.
        dropped: the places of edits that were left out.
        interrupted: after Ctrl-C, what was kept, such as "kept the first 20 edits".
        probability: [N] fp32 on the CPU, of each edit's target when it was last computed (exp of the mean log P of its
            tokens); NaN for an edit that was left out or not computed. The solvers compute it before they write,
            LocFT-BF after 10 epochs or `refit` with the final weights, else before the edit's last step.
        kept_edits: after Ctrl-C, how many edits were kept; None if all of them took part.
        learned: for each of the losses, how many edits had been learned by then, as far as was computed; the last is
            that of `probability`.
        cached: tier -> peak bytes of cached states there.
    """

    updates: Mapping[str, Update]
    originals: dict[str, Tensor]
    config: dict[str, Any]
    probability: Tensor
    losses: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    keys: dict[str, Tensor] = field(default_factory=dict)
    dropped: tuple[int, ...] = ()
    interrupted: str | None = None
    kept_edits: int | None = None
    learned: list[int] = field(default_factory=list)
    cached: Mapping[str, int] = field(default_factory=dict)


@dataclass
class EachResult:
    """The outcome of N independent edits, which are not written to the model.

    Attributes:
        factors: path of each updated weight W [h, d] (as a linear map: y = W x) -> left [N, h, k] and right
            [N, k, d], fp32; edit e alone is W + left[e] @ right[e].
        config: as for `MethodResult`.
        loss: [N], of the targets; NaN for the edits in `dropped`, whose factors are zeros.
        probability: [N], of the targets; NaN for the edits in `dropped`.
    """

    factors: dict[str, tuple[Tensor, Tensor]]
    config: dict[str, Any]
    loss: Tensor
    probability: Tensor
    notes: list[str]
    dropped: tuple[int, ...]


class Plan(Protocol):
    """An edit that is ready to run. Making a plan makes every check, writes nothing and takes seconds."""

    @property
    def notes(self) -> list[str]:
        """Automatic choices, and whatever else the user should know before the work starts."""

    def digests(self) -> dict[str, str]:
        """Digest of the file of second moments of each layer that has one and needs it, by the layer's number."""

    def run(self) -> MethodResult:
        """Edit the model in place. Raises EditError; on every exception the model is as it was before."""


class SolverPlan(Plan, Protocol):
    """A plan of a method that can also solve each edit by itself (`Method.solves_each`)."""

    def run_each(self) -> EachResult:
        """Solve each edit by itself, without changing the model. Raises EditError."""
