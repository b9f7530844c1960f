"""Exit codes by phase: 2 until the work begins, 1 from then on."""

from __future__ import annotations


class _Phase:
    working = False


def reset() -> None:
    """Count from here what fails as bad usage or bad input."""
    _Phase.working = False


def work_begins() -> None:
    """Count from here what fails as a failure of the work."""
    _Phase.working = True


def exit_code() -> int:
    """The exit code of a failure now."""
    return 1 if _Phase.working else 2
