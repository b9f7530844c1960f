"""Make command-line flags from the methods' configurations, so that every new field is a flag."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from fastedit.configs import LARGEST_INT, Kind, explained, hints_of, kind_of, numbers, union
from fastedit.errors import ConfigError, FileError
from fastedit.files import read_json
from fastedit.methods import DEFAULT_METHOD, METHODS, method_of

_EXAMPLE = '{"method": "locft-bf", "lr": 0.0005}'
_SAME = {"layer": "layers"}  # fields that share a flag: where a method edits


def configured(
    function: Callable[..., None], left_out: Sequence[str] = (), methods: Sequence[str] | None = None
) -> Callable[..., None]:
    """`function` for typer, with a flag for each field of the methods' configurations in place of its `**config`.

    If several configurations have a field, it is one flag, and its help says what it means for each. Only flags that
    are given are passed on; the flag of several texts may be given once for each.

    Args:
        left_out: fields that do not become flags.
        methods: methods whose fields become flags; None is all methods.
    """
    flags = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        for name, annotation in _annotations(left_out, methods or list(METHODS)).items()
    ]
    parameters = inspect.signature(function, eval_str=True).parameters.values()
    own = [p.replace(kind=p.KEYWORD_ONLY) for p in parameters if p.kind is not p.VAR_KEYWORD]
    names = {p.name for p in own}

    @functools.wraps(function)
    def command(**values: Any) -> None:
        chosen = {name: value for name, value in values.items() if name in names or value not in (None, [])}
        texts = {name: _texts(chosen[name]) for name in chosen.keys() - names if isinstance(chosen[name], list)}
        function(**chosen | texts)

    command.__signature__ = inspect.Signature([*own, *flags])  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in (*own, *flags)}
    return command


def config_of(method: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a method's configuration from the given flags, checked.

    Raises:
        ConfigError: an unknown method, a field that it does not have, or a value that the field cannot take.
    """
    config_type = method_of(method).config
    known = {field.name: field for field in fields(config_type)}
    config: dict[str, Any] = {}
    for flag, value in given.items():
        name = next((field for field, same in _SAME.items() if same == flag and field in known), flag)
        method_of(method, [name])
        layers = name in (*_SAME, *_SAME.values())
        config[name] = (value,) if layers and isinstance(value, int) else value
    config_type(**config)  # checks the values before any work starts
    return config


def configuration(
    file: Path | None, method: str | None, chat: bool, given: Mapping[str, Any]
) -> tuple[str, bool, dict[str, Any]]:
    """The method, whether prompts go through the chat template, and the checked fields of the method's configuration.

    They come from a file and from flags; flags take precedence.

    Raises:
        FileError: the file cannot be read, is not a JSON object, or has a field twice. ConfigError: as for `config_of`;
            the file is for another method.
    """
    content: dict[str, Any] = {}
    if file is not None:
        content = read_json(file, _EXAMPLE)
        if not isinstance(content, dict) or not isinstance(content.get("method", ""), str):
            raise FileError(file, f"expected an object of fields, such as {_EXAMPLE}")
        theirs, templated = content.pop("method", None), content.pop("chat_template", False)
        if not isinstance(templated, bool):
            raise FileError(file, f"chat_template is {templated!r}; expected true or false")
        chat = chat or templated
        if method and theirs and method != theirs:
            raise ConfigError(f"--method {method} does not fit {file}, which is for {theirs}; leave out one of them")
        try:
            method = method or theirs or DEFAULT_METHOD
            content = config_of(method, content)
        except ConfigError as error:
            raise error.at(file) from None
    method = method or DEFAULT_METHOD
    return method, chat, config_of(method, {**content, **given})


def _annotations(left_out: Sequence[str], methods: Sequence[str]) -> dict[str, Any]:
    """Name of each flag -> its annotation for typer."""
    owners: dict[type[Any], list[str]] = {}  # configuration -> its methods
    for method in methods:
        owners.setdefault(METHODS[method].config, []).append(method)
    having: dict[str, list[tuple[type[Any], Field[Any]]]] = {}
    for config_type in owners:
        for field in fields(config_type):
            if field.name not in left_out:
                having.setdefault(_SAME.get(field.name, field.name), []).append((config_type, field))
    annotated = {}
    for name, places in having.items():
        kind = union([kind_of(hints_of(config_type)[field.name]) for config_type, field in places])
        names = [", ".join(owners[config_type]) for config_type, _ in places]
        helps = [_help(field) for _, field in places]
        text = helps[0] if len(places) == 1 else "\n\n".join(map(": ".join, zip(names, helps, strict=True)))
        if "INT,…" in kind.names:
            text += f" Such as 4-8 or 3,5,8-11, as in --{name} 4-8."
        more: dict[str, Any] = {
            "show_default": False,
            "help": text,
            "rich_help_panel": "Configuration of " + (names[0] if len(names) == 1 else "several methods"),
        }
        annotated[name] = _annotation(kind, f"--{name.replace('_', '-')}", more)
    return annotated


def _annotation(kind: Kind, flag: str, more: dict[str, Any]) -> Any:
    if "BOOL" in kind.names:
        return Annotated[bool | None, typer.Option(f"{flag}/--no-{flag[2:]}", **more)]
    if "STR,…" in kind.names:
        more["help"] += " Give it once for each; of one that is given alone, commas part several."
        return Annotated[list[str] | None, typer.Option(flag, metavar="STR", **more)]
    return Annotated[str | None, typer.Option(flag, parser=_parser(kind), metavar="|".join(kind.names), **more)]


def _texts(given: list[str]) -> tuple[str, ...]:
    """The texts of a flag; one with a single "{}" is a context, whose commas belong to it."""
    return tuple(given if len(given) > 1 or given[0].count("{}") == 1 else given[0].split(","))


def _help(field: Field[Any]) -> str:
    """A field's help with its default."""
    default = field.default if field.default_factory is MISSING else field.default_factory()
    text = explained(field, "By default")
    return text + ("" if default in (None, MISSING) else f" (default {default})")


def _parser(kind: Kind) -> Callable[[str], Any]:
    expected = " or ".join(kind.names)

    def parse(text: str) -> Any:
        try:
            return kind.parse(text)
        except OverflowError:
            raise typer.BadParameter(f"expected INT of at most {LARGEST_INT}, got {text}") from None
        except ValueError:
            raise typer.BadParameter(f"expected {expected}, got {text!r}") from None

    return parse


def layer_list(text: str, flag: str = "--layers") -> list[int]:
    """Blocks of a list such as 3,5,8-11. Raises ConfigError."""
    try:
        return numbers(text)
    except ValueError:
        raise ConfigError(f"{flag} {text}: expected numbers and ranges such as 0-7 or 3,5,8-11") from None
