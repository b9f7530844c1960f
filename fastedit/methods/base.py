"""What all editing methods share: the edit they are given, the progress they report, the result they return."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from fastedit.models import Update


class Edit(Protocol):
    """What a method needs to know of an edit; `fastedit.EditRequest` is one."""

    @property
    def prompt(self) -> str: ...
    @property
    def target(self) -> str: ...
    @property
    def subject(self) -> str | None: ...
    @property
    def id(self) -> str | None: ...


class Progress(Protocol):
    """Called after each piece of work; `loss` is the mean loss of the last epoch, once there is one."""

    def __call__(self, stage: str, done: int, total: int, loss: float | None = None) -> None: ...


def no_progress(stage: str, done: int, total: int, loss: float | None = None) -> None:
    """Reports nothing."""


@dataclass(frozen=True)
class History:
    """What happened to a model before.

    `fingerprint` is that of the model without the edits of this Editor, to which its statistics belong; `keys` maps
    the path of an edited parameter to the keys [n, d] of the edits that stand, which later ones should preserve;
    `kept` is the method's own, for what the next edit would have to make again.
    """

    fingerprint: str
    keys: Mapping[str, Tensor] = field(default_factory=dict)
    kept: dict[Any, Tensor] = field(default_factory=dict)


@dataclass
class MethodResult:
    """The outcome of a method.

    `updates` maps the path of each edited parameter to its fp32 additive update, a tensor of its shape or factors;
    `originals` maps it to the parameter's value before, in its own dtype; the model already holds the edit.
    `config` is the method's configuration with every automatic choice filled in; `keys` the edits' keys [N, d] for
    each updated parameter, where the method has such; `dropped` the places of edits that were left out.
    """

    updates: Mapping[str, Update]
    originals: dict[str, Tensor]
    config: dict[str, Any]
    losses: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    keys: dict[str, Tensor] = field(default_factory=dict)
    dropped: tuple[int, ...] = ()


@dataclass
class EachResult:
    """The outcome of N independent edits.

    `factors` maps the path of each updated weight W [h, d] (as a linear map: y = W x) to left [N, h, k] and right
    [N, k, d], fp32; edit e alone is W + left[e] @ right[e]. `loss` and `probability` [N] are those of the targets,
    NaN for the edits in `dropped`, whose factors are zeros.
    """

    factors: dict[str, tuple[Tensor, Tensor]]
    config: dict[str, Any]
    loss: Tensor
    probability: Tensor
    notes: list[str]
    dropped: tuple[int, ...]
