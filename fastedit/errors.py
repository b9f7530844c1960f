"""The errors that fastedit raises on purpose.

Every message names the record, field, file or layer, says what was expected and what to do. The command line prints
any of them in one line on stderr.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

_Error = TypeVar("_Error", bound="FastEditError")
SHOWN = 10  # items that a message lists before it only counts the rest


class FastEditError(Exception):
    """Base of every error that fastedit raises on purpose.

    Attributes:
        text: what is wrong, what was expected, what to do.
        places: where it happened, the outermost place first, such as "layer 3"; `str()` puts them before the text.
        additions: what else to say, such as where finished work is; `str()` puts them after the text.
    """

    def __init__(self, text: str = "") -> None:
        super().__init__(text)
        self.text = text
        self.places: tuple[str, ...] = ()
        self.additions: tuple[str, ...] = ()

    def __reduce__(self) -> tuple[Any, ...]:
        """Keep the fields in copies and pickles, which are made with `args`, the arguments of the class."""
        return type(self), self.args, self.__dict__

    def at(self: _Error, place: str | Path) -> _Error:
        """Add the place around those already named; for `raise error.at(f"layer {layer}")`."""
        self.places = (str(place), *self.places)
        return self

    def add(self: _Error, addition: str) -> _Error:
        """Add something to say after the text."""
        self.additions = (*self.additions, addition)
        return self

    def __str__(self) -> str:
        return "; ".join((": ".join((*self.places, self.text)), *self.additions))


@dataclass(frozen=True)
class Problem:
    """A thing that cannot be used, one of several, and why.

    Attributes:
        name: of the thing, such as "edit 7" or "FILE, line 3".
        cause: what is wrong with it, and what to do.
        context: where in the thing, if that has to be said, such as "after the context 'w9 {}'".
    """

    name: str
    cause: str
    context: str = ""

    def __str__(self) -> str:
        return f"{self.name}{', ' * bool(self.context)}{self.context}: {self.cause}"


class RequestError(FastEditError):
    """Edit requests, a file of them or one record of it, cannot be used.

    Attributes:
        edits: names of the edits that cannot be used; empty if the error is not about edits.
        sentences: what is wrong with each edit, record or prompt that cannot be used, if the text is about several;
            the text quotes the first ten of them.
        advice: what to do, said once after the text.
    """

    def __init__(
        self, text: str = "", *, edits: Sequence[str] = (), sentences: Sequence[str] = (), advice: str = ""
    ) -> None:
        super().__init__(text)
        self.edits, self.sentences, self.advice = tuple(edits), tuple(sentences), advice

    @classmethod
    def of(cls, problems: Sequence[Problem], what: str, advice: str = "") -> RequestError:
        """One error about several things, such as "records"; what is wrong with several of them is said once."""
        return cls(_several(problems, what, told(problems)), sentences=list(map(str, problems)), advice=advice)

    @classmethod
    def of_edits(cls, problems: Sequence[Problem]) -> RequestError:
        """One error about several edits; each of the first ten has its own sentence."""
        sentences = list(map(str, problems))
        text = _several(problems, "edits", listed(sentences, " | "))
        return cls(text, edits=[problem.name for problem in problems], sentences=sentences)

    @classmethod
    def joined(cls, errors: Sequence[RequestError]) -> RequestError:
        """One error about the edits of several, each of which is about edits."""
        if len(errors) == 1:
            return errors[0]
        sentences = [sentence for error in errors for sentence in error.sentences]
        edits = [name for error in errors for name in error.edits]
        return cls(f"{len(edits)} edits cannot be used: {listed(sentences, ' | ')}", edits=edits, sentences=sentences)

    @property
    def sentence(self) -> str:
        """The places and the text, without the advice."""
        return super().__str__()

    def __str__(self) -> str:
        return ". ".join(filter(None, (self.sentence, self.advice)))


class ModelError(FastEditError):
    """The model, one of its layers, or something made for another model cannot be used."""


class FileError(ModelError):
    """A file or a folder cannot be read or written, or does not hold what it should.

    It is a `ModelError` because version 0.1 raised that one.

    Args:
        path: the file or folder.
        text: what is wrong; "{path}" in it becomes the path. Without it, the path is put in front.
    """

    def __init__(self, path: str | os.PathLike[str], text: str) -> None:
        super().__init__(text.replace("{path}", str(path)))
        self.path = Path(path)
        self.args = path, text  # a copy is made with these
        if "{path}" not in text:
            self.at(os.fspath(path))


class InputFileError(FileError, RequestError):
    """A file of edit requests or of text cannot be read.

    It is a `RequestError` because version 0.1 raised that one.
    """


class TensorError(ModelError):
    """A tensor has a shape, dtype, device or values that an operation cannot take.

    It is a `ModelError` because version 0.1 raised that one.
    """


class ConfigError(FastEditError):
    """A field of a configuration has a value that it cannot take."""


class EditError(FastEditError):
    """An edit failed while it ran; the model is as it was before.

    Attributes:
        edits: names of the edits that caused it; empty if none did.
    """

    def __init__(self, text: str = "", *, edits: Sequence[str] = ()) -> None:
        super().__init__(text)
        self.edits = tuple(edits)


def _several(problems: Sequence[Problem], what: str, said: str) -> str:
    return str(problems[0]) if len(problems) == 1 else f"{len(problems)} {what} cannot be used: {said}"


def told(problems: Sequence[Problem]) -> str:
    """The first ten problems; what is wrong with several things is said once.

    A beginning that their names share, such as FILE in "FILE, line 3", is said once, too.
    """
    names: dict[str, list[str]] = {}
    for problem in problems:
        names.setdefault(problem.cause, []).append(problem.name)
    sentences = []
    for cause, (first, *others) in names.items():
        prefix = first.rpartition(", ")[0]
        sentences.append(f"{listed([first, *(name.removeprefix(f'{prefix}, ') for name in others)])}: {cause}")
    return listed(sentences, " | ")


def listed(items: Sequence[str], separator: str = ", ") -> str:
    """The first ten items, and how many more there are."""
    more = f"{separator}and {len(items) - SHOWN} more" if separator != ", " else f" and {len(items) - SHOWN} more"
    return separator.join(items[:SHOWN]) + (more if len(items) > SHOWN else "")


def reason(error: BaseException) -> str:
    """The first line of an error's message, or all of it if that line only introduces the others."""
    text = str(error).strip()
    first = next(iter(text.splitlines()), "").strip()
    message = " ".join(text.split()) if first.endswith(":") else first
    return message if " " in message else f"{type(error).__name__}: {message}".removesuffix(": ")
