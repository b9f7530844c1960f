"""How long-running work reports its progress."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

LEARNED = "learned"
"""Not a stage: reports how many targets are likely so far, but only to a progress with a true `takes_learned`."""


class Progress(Protocol):
    """Called after each piece of work; `loss`, the mean loss of the last epoch, is given once there is one."""

    def __call__(self, stage: str, done: int, total: int, loss: float | None = None) -> None: ...


def no_progress(stage: str, done: int, total: int, loss: float | None = None) -> None:
    """Report nothing."""


class StageClock:
    """Measure the seconds of each stage: the time before a stage's report counts for that stage.

    Attributes:
        seconds: stage -> seconds, since the last `start`.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self.start()

    def start(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def report(self, stage: str, done: int, total: int, *loss: float | None) -> None:
        """Note the time and pass the report on; this is a `Progress`."""
        now = time.perf_counter()
        if stage != LEARNED:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
            self._last = now
        self._progress(stage, done, total, *loss)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure the seconds of a block."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


def counter(progress: Progress, stage: str, total: int) -> Callable[[int], None]:
    """A callback that takes how much was just done, and reports the total so far."""
    done = 0

    def report(count: int) -> None:
        nonlocal done
        done += count
        progress(stage, done, total)

    return report
