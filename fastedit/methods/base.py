"""What all editing methods share: the edit they are given, the progress they report, the result they return."""

from __future__ import annotations

import os
import types
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, Literal, Protocol, Union, get_args, get_origin, get_type_hints

from torch import Tensor

from fastedit.errors import ConfigError
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
    """Called after each piece of work; `loss`, the mean loss of the last epoch, is given once there is one."""

    def __call__(self, stage: str, done: int, total: int, loss: float | None = None) -> None: ...


def no_progress(stage: str, done: int, total: int, loss: float | None = None) -> None:
    """Reports nothing."""


_CALLED = {int: "a whole number", float: "a number", bool: "True or False", str: "a text"}
_NUMBERS: dict[Any, type] = {int: Integral, float: Real}


def check_fields(config: Any) -> None:
    """See that every field of a configuration has a value of its type, and those that all methods share a good one.

    A whole number is fine as a float, any sequence as a tuple and a path as a text; each becomes what is annotated.

    Raises:
        ConfigError: names the field, its value, and what it takes.
    """
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        try:
            object.__setattr__(config, name, _as(value, hint))
        except TypeError:
            raise ConfigError(f"{name} is {value!r}; give {_wanted(hint)}") from None
    if not 0 <= getattr(config, "seed", 0) < 2**63:
        raise ConfigError(f"seed is {config.seed}; give 0 to 2**63 - 1")
    if (getattr(config, "cache_bytes", None) or 0) < 0:
        raise ConfigError(f"cache_bytes is {config.cache_bytes}; give 0 or more, or leave it out")


def _as(value: Any, hint: Any) -> Any:
    """A value as its annotated type. Raises TypeError where it is none."""
    members = get_args(hint)
    if get_origin(hint) in (Union, types.UnionType):
        for member in members:
            with suppress(TypeError):
                return _as(value, member)
    elif get_origin(hint) is Literal:
        if isinstance(value, str) and value in members:
            return value
    elif get_origin(hint) is tuple:
        if isinstance(value, Sequence) and not isinstance(value, str):
            return tuple(_as(item, members[0]) for item in value)
    elif isinstance(value, bool) or value is None:
        if type(value) is hint:
            return value
    elif hint in _NUMBERS and isinstance(value, _NUMBERS[hint]):
        return hint(value)
    elif hint is str and isinstance(value, str | os.PathLike):
        return str(value)
    raise TypeError


def _wanted(hint: Any) -> str:
    """What a field takes, in words."""
    members = get_args(hint)
    if get_origin(hint) in (Union, types.UnionType):
        listed = [_wanted(member) for member in members if member is not types.NoneType]
        return " or ".join(listed) + (", or leave it out" if types.NoneType in members else "")
    if get_origin(hint) is Literal:
        return f"one of {', '.join(members)}" if len(members) > 1 else f'"{members[0]}"'
    if get_origin(hint) is tuple:
        return f"a tuple, each item {_wanted(members[0])}"
    return _CALLED[hint]


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
    each updated parameter, where the method has such; `dropped` the places of edits that were left out. Where Ctrl-C
    ended it, `interrupted` says what was kept, such as "kept the first 20 edits", and `kept` how many edits, unless all
    of them took part.
    """

    updates: Mapping[str, Update]
    originals: dict[str, Tensor]
    config: dict[str, Any]
    losses: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    keys: dict[str, Tensor] = field(default_factory=dict)
    dropped: tuple[int, ...] = ()
    interrupted: str | None = None
    kept: int | None = None


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
