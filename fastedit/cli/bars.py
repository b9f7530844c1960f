"""Progress bars of the command line."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from fastedit.progress import Progress as Report

# stage -> (what it says, what its speed counts); a training's total is in epochs, its speed in edits
_STAGES = {
    "prefix": ("frozen blocks", "edits"),
    "train": ("training", "edits"),
    "locate": ("locating", "edits"),
    "tune": ("tuning", "trials"),
    "answers": ("answers", "prompts"),
    "generation": ("generation", "prompts"),
    "text": ("perplexity", "windows"),
    "covariance": ("statistics", "tokens"),
}


class Bars:
    """Bars on stderr, one for each stage, with speed, loss and time left; none if stderr is not a terminal."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(24), MofNCompleteColumn())
        fields = (TextColumn(f"{{task.fields[{name}]}}") for name in ("speed", "loss", "left"))
        self._bars = Progress(*columns, *fields, console=console, disable=not console.is_terminal)
        self._running: dict[str, tuple[TaskID, float, int]] = {}  # description -> (bar, start, done)
        self._last = time.perf_counter()

    def __enter__(self) -> Bars:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def callback(self, title: str, n_edits: int | None = None) -> Report:
        """A callback for the stages of one piece of work.

        Args:
            title: stands before each stage's name.
            n_edits: that are through when "train" or "locate" is.
        """
        self._last = time.perf_counter()

        def report(stage: str, done: int, total: int, loss: float | None = None) -> None:
            name, unit = _STAGES.get(stage, (stage, "steps"))
            description = ": ".join(filter(None, (title, name)))
            now = time.perf_counter()
            bar, start, before = self._running.get(description, (None, self._last, 0))
            if bar is None:
                bar = self._bars.add_task(description, total=total, speed="", loss="", left="")
            elif done < before:  # the stage starts again
                start = self._last
            self._running[description], self._last = (bar, start, done), now
            seconds = max(now - start, 1e-9)
            through = n_edits * done / total if n_edits and stage in ("train", "locate") else done
            left = round(seconds * (total - done) / max(done, 1))
            self._bars.update(
                bar,
                completed=done,
                total=total,
                speed=f"{through / seconds:.3g} {unit}/s",
                loss="" if loss is None else f"loss {loss:.3g}",
                left=f"{left // 60}:{left % 60:02} left" if left else "",
            )

        return report
