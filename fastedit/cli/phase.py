"""The phase of a command: a failure has exit code 2 before the work begins and 1 after; and what is written so far."""

from __future__ import annotations

from pathlib import Path


class _Phase:
    working = False
    written: tuple[Path, ...] = ()


def reset() -> None:
    """From now on, a failure counts as bad usage or bad input."""
    _Phase.working, _Phase.written = False, ()


def wrote(*paths: Path) -> None:
    """Note files or folders that were written and stay, even if something fails later."""
    _Phase.written = tuple(dict.fromkeys((*_Phase.written, *paths)))


def written(message: str) -> str:
    """The message of a failure, with the files that were written before, unless it ends with one of them."""
    left = [str(path) for path in _Phase.written]
    if not left or message.endswith(tuple(f" {path}" for path in left)):
        return message
    return f"{message}; written before that: {', '.join(left)}"


def interrupted() -> str:
    """The message of Ctrl-C."""
    return written("interrupted") if _Phase.written else "interrupted; nothing was written"


def work_begins() -> None:
    """From now on, a failure counts as a failure of the work."""
    _Phase.working = True


def exit_code() -> int:
    """The exit code of a failure now."""
    return 1 if _Phase.working else 2
