"""Configuration classes: one reading of their annotations, for values from Python and from the command line.

A configuration is a frozen dataclass. Its fields are made by `option`, which takes their help text.
"""

from __future__ import annotations

import math
import os
import re
import types
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import Field, dataclass, field, fields
from functools import cache
from numbers import Integral, Real
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from fastedit.errors import ConfigError

LARGEST_INT = 2**63 - 1
"""Largest whole number that torch takes."""
_Config = TypeVar("_Config")


@dataclass(frozen=True)
class Kind:
    """The values that a type annotation admits.

    Attributes:
        names: names for the help of a command line, such as ("INT", "auto").
        wanted: the values in words, for messages.
        convert: converts a Python value to the annotated type; raises TypeError if it cannot.
        parse: parses a text from the command line; raises ValueError if it cannot.
    """

    names: tuple[str, ...]
    wanted: str
    convert: Callable[[Any], Any]
    parse: Callable[[str], Any]


def option(default: Any, help: str, unset: str = "") -> Any:  # users and typer say "help", too
    """Make a field of a configuration class, with its help for the command line and the docstring.

    Args:
        help: what the field is, a phrase that ends with a full stop.
        unset: what a default of None stands for, such as "the preset's".
    """
    return field(default=default, metadata={"help": help, "unset": unset})


def explained(option: Field[Any], unset: str) -> str:
    """The help of a field, and what its None stands for, introduced by `unset`: "None is" or "By default"."""
    text, meaning = option.metadata.get("help", ""), option.metadata.get("unset", "")
    return f"{text} {unset} {meaning}." if meaning else text


def described(config_type: type[_Config]) -> type[_Config]:
    """Class decorator that lists the options in the docstring."""
    lines = [f"    {f.name}: {explained(f, 'None is')}" for f in fields(config_type)]  # type: ignore[arg-type]
    config_type.__doc__ = "\n".join([(config_type.__doc__ or "").rstrip(), "", "Attributes:", *lines, ""])
    return config_type


def hints_of(config_type: type[Any]) -> dict[str, Any]:
    """The annotation of each field of a configuration class."""
    return _hints(config_type)  # type: ignore[arg-type]  # mypy does not see that classes are hashable


_hints = cache(get_type_hints)


def check_fields(config: Any) -> None:
    """Convert every field of a configuration to its type, and check the fields that all methods share.

    A whole number is accepted as a float, any sequence as a tuple, and a path as a text.

    Raises:
        ConfigError: names the field, its value, and what it takes.
    """
    for name, hint in hints_of(type(config)).items():
        value = getattr(config, name)
        try:
            object.__setattr__(config, name, kind_of(hint).convert(value))
        except TypeError:
            raise ConfigError(f"{name} is {value!r:.100}; give {kind_of(hint).wanted}") from None
    if not 0 <= getattr(config, "seed", 0) <= LARGEST_INT:
        raise ConfigError(f"seed is {config.seed}; give 0 to 2**63 - 1")
    if not getattr(config, "save_every", 0) >= 0:
        raise ConfigError(f"save_every is {config.save_every}; give seconds, 0 for every step")
    size: Any = getattr(config, "batch_size", "auto")
    if size != "auto" and size < 1:
        raise ConfigError(f'batch_size is {size!r}; give "auto" or a number of edits, at least 1')
    if (getattr(config, "cache_bytes", None) or 0) < 0:
        raise ConfigError(f"cache_bytes is {config.cache_bytes}; give 0 or more, or leave it out")


@cache
def check_names(names: tuple[str, ...] | None, weight: float | None) -> None:
    """Raise ConfigError unless the names are texts and their weight is a number from 0 on."""
    if names is not None and not (names and all(map(str.strip, names))):
        raise ConfigError("names is empty or holds an empty text; give names, or name_weight 0 for none")
    if weight is not None and not 0 <= weight < math.inf:
        raise ConfigError(f"name_weight is {weight}; give 0 or more, or leave it out")


def kind_of(hint: Any) -> Kind:
    """The kind of an annotation: int, float, bool, str, None, Literal of texts, tuple[X, ...], and unions of these.

    Raises:
        KeyError: any other annotation.
    """
    members = get_args(hint)
    if get_origin(hint) in (Union, types.UnionType):
        return union([kind_of(member) for member in members])
    if get_origin(hint) is Literal:
        return _literal(members)
    if get_origin(hint) is tuple:
        return _tuple(kind_of(members[0]))
    return _PLAIN[hint]


def union(kinds: Sequence[Kind]) -> Kind:
    """The union of several kinds; a value is converted by the first kind that admits it."""
    optional = _PLAIN[types.NoneType] in kinds
    others = [kind for kind in dict.fromkeys(kinds) if kind is not _PLAIN[types.NoneType]]

    def first(way: Literal["convert", "parse"], error: type[Exception]) -> Callable[[Any], Any]:
        def run(value: Any) -> Any:
            for kind in kinds:
                with suppress(error):
                    return getattr(kind, way)(value)
            raise error

        return run

    wanted = " or ".join(kind.wanted for kind in others) + (", or leave it out" if optional else "")
    names = dict.fromkeys(name for kind in others for name in kind.names)
    shown = tuple(name for name in names if f"{name},…" not in names)  # a list may have a single item
    return Kind(shown, wanted, first("convert", TypeError), first("parse", ValueError))


def _literal(texts: tuple[str, ...]) -> Kind:
    def same(error: type[Exception]) -> Callable[[Any], Any]:
        def run(value: Any) -> Any:
            if isinstance(value, str) and value in texts:
                return value
            raise error

        return run

    wanted = f"one of {', '.join(texts)}" if len(texts) > 1 else f'"{texts[0]}"'
    return Kind(("|".join(texts),), wanted, same(TypeError), same(ValueError))


def _tuple(item: Kind) -> Kind:
    def convert(value: Any) -> Any:
        if isinstance(value, Sequence) and not isinstance(value, str):
            return tuple(item.convert(part) for part in value)
        raise TypeError

    def parse(text: str) -> Any:
        return tuple(numbers(text) if item is _PLAIN[int] else (item.parse(part) for part in text.split(",")))

    return Kind((f"{item.names[0]},…",), f"a tuple, each item {item.wanted}", convert, parse)


def _same_type(expected: type) -> Callable[[Any], Any]:
    def convert(value: Any) -> Any:
        if type(value) is expected:
            return value
        raise TypeError

    return convert


def _number(to: type, admitted: type) -> Callable[[Any], Any]:
    def convert(value: Any) -> Any:
        if isinstance(value, admitted) and not isinstance(value, bool):
            with suppress(OverflowError):  # an int that is too large for a float
                return to(value)
        raise TypeError

    return convert


def _path_or_text(value: Any) -> str:
    if isinstance(value, str | os.PathLike):
        return str(value)
    raise TypeError


def _parse_int(text: str) -> int:
    value = int(text)
    if abs(value) > LARGEST_INT:
        raise OverflowError
    return value


def _no_text(text: str) -> None:
    raise ValueError


_PLAIN: dict[Any, Kind] = {
    int: Kind(("INT",), "a whole number", _number(int, Integral), _parse_int),
    float: Kind(("FLOAT",), "a number", _number(float, Real), float),
    bool: Kind(("BOOL",), "True or False", _same_type(bool), _no_text),  # a pair of flags without a text
    str: Kind(("STR",), "a text", _path_or_text, str),
    types.NoneType: Kind((), "None", _same_type(types.NoneType), _no_text),
}


def numbers(text: str) -> list[int]:
    """Parse a list of numbers such as 3,5,8-11; raises ValueError if it is not one."""
    values: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,6})\s*(?:-\s*(\d{1,6})\s*)?", part)
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise ValueError(part)
        values += range(int(match[1]), int(match[2] or match[1]) + 1)
    return values
