"""Progress bars of the command line."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from fastedit.cli.status import Status, clock
from fastedit.progress import LEARNED
from fastedit.progress import Progress as Report

_LINES = 60.0  # seconds between two lines if bars cannot be drawn
# stage -> (its name, the unit of its speed); training counts epochs, but its speed is in edits
_STAGES = {
    "prefix": ("frozen blocks", "edits"),
    "train": ("training", "edits"),
    "epoch": ("edits × epochs", "edits"),
    "targets": ("targets", "edits"),
    "keys": ("keys", "prompts"),
    "edits": ("solving", "edits"),
    "locate": ("locating", "edits"),
    "tune": ("tuning", "trials"),
    "answers": ("answers", "prompts"),
    "generation": ("generation", "prompts"),
    "text": ("perplexity", "windows"),
    "covariance": ("statistics", "tokens"),
}


class Bars:
    """Bars on stderr, one for each stage, with speed, loss and time left; a line per minute if it is not a terminal.

    Attributes:
        status: gets the same figures, if there is one.
    """

    def __init__(self) -> None:
        self.status: Status | None = None
        console = self._console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(24), MofNCompleteColumn())
        fields = (TextColumn(f"{{task.fields[{name}]}}") for name in ("speed", "loss", "left"))
        self._bars = Progress(*columns, *fields, console=console, disable=not console.is_terminal)
        self._running: dict[str, tuple[TaskID, float, int]] = {}  # description -> (bar, start, done)
        self._last = self._said = time.perf_counter()

    def __enter__(self) -> Bars:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def callback(self, title: str, n_edits: int | None = None) -> Report:
        """A callback for the stages of one piece of work.

        Args:
            title: text before each stage's name.
            n_edits: number of edits that are done when "train", "epoch" or "locate" is done.
        """
        self._last = time.perf_counter()

        def report(stage: str, done: int, total: int, loss: float | None = None) -> None:
            if stage == LEARNED:
                if self.status is not None:
                    self.status.update(learned=done)
                return
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
            through = n_edits * done / total if n_edits and stage in ("train", "epoch", "locate") else done
            left = round(seconds * (total - done) / max(done, 1))
            shown: dict[str, Any] = {
                "speed": f"{through / seconds:.3g} {unit}/s",
                "loss": "" if loss is None else f"loss {loss:.3g}",
                "left": f"{clock(left)} left" if left else "",
            }
            self._bars.update(bar, completed=done, total=total, **shown)
            self._tell(description, done, total, loss, shown, now)

        report.takes_learned = True  # type: ignore[attr-defined]
        return report

    def _tell(
        self, stage: str, done: int, total: int, loss: float | None, shown: Mapping[str, str], now: float
    ) -> None:
        """Report to the status, and print a line now and then if there are no bars."""
        if self.status is not None:
            known = {} if loss is None else {"loss": loss}
            speed, left = shown["speed"], shown["left"]
            self.status.update(stage=stage, done=done, total=total, speed=speed, left=left, **known)
        if not self._console.is_terminal and now - self._said >= _LINES:
            self._said = now
            words = ", ".join(filter(None, shown.values()))
            self._console.print(f"{stage}: {done} of {total}, {words}", highlight=False, soft_wrap=True)
