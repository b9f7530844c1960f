"""Command-line flags made from the methods' configurations: a new field becomes a flag by itself."""

from __future__ import annotations

import functools
import inspect
import re
import types
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import MISSING, fields
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer

LARGEST = 2**63 - 1  # whole number that torch takes


def numbers(text: str) -> list[int]:
    """Numbers of a list such as 3,5,8-11; ValueError where it is none."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,6})\s*(?:-\s*(\d{1,6})\s*)?", part)
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise ValueError(part)
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    return found


def spelled_out(function: Callable[..., None], flags: Sequence[inspect.Parameter]) -> Callable[..., None]:
    """`function` for typer: its `**config` replaced by `flags`, of which only those given are passed on."""
    parameters = inspect.signature(function, eval_str=True).parameters.values()
    own = [p.replace(kind=p.KEYWORD_ONLY) for p in parameters if p.kind is not p.VAR_KEYWORD]
    names = {p.name for p in own}

    @functools.wraps(function)
    def command(**given: Any) -> None:
        function(**{name: value for name, value in given.items() if name in names or value is not None})

    command.__signature__ = inspect.Signature([*own, *flags])  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in (*own, *flags)}
    return command


def config_flags(left_out: Sequence[str], methods: Sequence[str] | None = None) -> list[inspect.Parameter]:
    """A flag for each field of the methods' configurations, with its help from the classes' docstrings.

    A field that several configurations have is one flag, whose help says what it means to each.

    Args:
        left_out: fields that are no flags.
        methods: whose fields they are; None is all methods.
    """
    from fastedit.methods import METHODS

    names: dict[type[Any], list[str]] = {}  # the methods of a configuration
    for method, (config_type, _) in METHODS.items():
        if methods is None or method in methods:
            names.setdefault(config_type, []).append(method)
    having: dict[str, list[type[Any]]] = {}
    for config_type in names:
        for field in fields(config_type):
            if field.name not in left_out:
                having.setdefault(field.name, []).append(config_type)
    found = []
    for name, types_ in having.items():
        owners, helps = [", ".join(names[t]) for t in types_], [_help(t, name) for t in types_]
        members = list(dict.fromkeys(member for t in types_ for member in _members(get_type_hints(t)[name])))
        panel = "Configuration of " + (owners[0] if len(owners) == 1 else "several methods")
        more: Any = {
            "show_default": False,
            "help": helps[0] if len(owners) == 1 else "\n\n".join(map(": ".join, zip(owners, helps, strict=True))),
            "rich_help_panel": panel,
        }
        if tuple[int, ...] in members:
            more["help"] += " Such as 4-8 or 3,5,8-11."
        flag = f"--{name.replace('_', '-')}"
        annotation: Any
        if bool in members:
            annotation = Annotated[bool | None, typer.Option(f"{flag}/--no-{flag[2:]}", **more)]
        else:
            metavar = "|".join(map(_metavar, members))
            annotation = Annotated[str | None, typer.Option(flag, parser=_parser(members), metavar=metavar, **more)]
        found.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation))
    return found


def _help(config_type: type[Any], name: str) -> str:
    """What a configuration's docstring says of a field, and the field's default."""
    field = next(field for field in fields(config_type) if field.name == name)
    default = field.default if field.default_factory is MISSING else field.default_factory()
    text = _attributes(inspect.getdoc(config_type) or "").get(name, "").replace("None is", "by default")
    return text + ("" if default in (None, MISSING) else f" (default {default})")


def _attributes(docstring: str) -> dict[str, str]:
    """The text of each name under "Attributes:"."""
    section = re.search(r"^Attributes:\n((?:[ ].*\n?|\n)+)", docstring, re.MULTILINE)
    entries = re.findall(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", section[1] if section else "", re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def _members(hint: Any) -> list[Any]:
    """The types that a hint admits, without None."""
    members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return [member for member in members if member is not types.NoneType]


def _metavar(member: Any) -> str:
    if get_origin(member) is Literal:
        return "|".join(map(str, get_args(member)))
    if get_origin(member) is tuple:
        return f"{_metavar(get_args(member)[0])},…"
    return str(member.__name__).upper()


def _parser(members: Sequence[Any]) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        for member in members:
            with suppress(ValueError):
                value = _converted(text, member)
                if isinstance(value, int) and abs(value) > LARGEST:
                    raise typer.BadParameter(f"expected {_metavar(member)} of at most {LARGEST}, got {text}")
                return value
        expected = " or ".join(map(_metavar, members))
        raise typer.BadParameter(f"expected {expected}, got {text!r}")

    return parse


def _converted(text: str, member: Any) -> Any:
    if get_origin(member) is Literal:
        return get_args(member)[list(map(str, get_args(member))).index(text)]
    if get_origin(member) is tuple:
        element = get_args(member)[0]
        return tuple(numbers(text) if element is int else (_converted(part, element) for part in text.split(",")))
    return member(text)
