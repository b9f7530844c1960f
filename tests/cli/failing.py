"""What stops a command: a disk that is full, and Ctrl-C."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def small_files() -> Iterator[None]:
    """No file may grow past 4 KiB, so that writing fails in the middle, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class CtrlC:
    """Ctrl-C when a stage has done so much."""

    def __init__(self, stage: str, done: int) -> None:
        self.at = stage, done

    def of(self, bars: Any, title: str, n_edits: int | None = None) -> Any:
        def report(stage: str, done: int, total: int, loss: float | None = None) -> None:
            if (stage, done) == self.at:
                raise KeyboardInterrupt

        return report
