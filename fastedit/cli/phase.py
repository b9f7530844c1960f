"""What a failure means by phase: exit code 2 until the work begins, 1 from then on; and what is on disk by then."""

from __future__ import annotations

from pathlib import Path


class _Phase:
    working = False
    written: tuple[Path, ...] = ()


def reset() -> None:
    """Count from here what fails as bad usage or bad input."""
    _Phase.working, _Phase.written = False, ()


def wrote(*paths: Path) -> None:
    """Note files or folders that stay, whatever fails from here on."""
    _Phase.written = tuple(dict.fromkeys((*_Phase.written, *paths)))


def written(message: str) -> str:
    """The message of a failure with the files that it leaves, unless it ends with one of them itself."""
    left = [str(path) for path in _Phase.written]
    if not left or message.endswith(tuple(f" {path}" for path in left)):
        return message
    return f"{message}; written before that: {', '.join(left)}"


def interrupted() -> str:
    """The message of Ctrl-C."""
    return written("interrupted") if _Phase.written else "interrupted; nothing was written"


def work_begins() -> None:
    """Count from here what fails as a failure of the work."""
    _Phase.working = True


def exit_code() -> int:
    """The exit code of a failure now."""
    return 1 if _Phase.working else 2
