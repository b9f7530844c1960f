"""How long work reports what is done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Progress(Protocol):
    """Called after each piece of work; `loss`, the mean loss of the last epoch, is given once there is one."""

    def __call__(self, stage: str, done: int, total: int, loss: float | None = None) -> None: ...


def no_progress(stage: str, done: int, total: int, loss: float | None = None) -> None:
    """Report nothing."""


def counter(progress: Progress, stage: str, total: int) -> Callable[[int], None]:
    """A callback that takes how much was just done, and reports the sum."""
    done = 0

    def report(count: int) -> None:
        nonlocal done
        done += count
        progress(stage, done, total)

    return report
