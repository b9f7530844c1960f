"""`fastedit watch`."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastedit.cli.resume import place_of
from fastedit.cli.status import STATUS, clock
from fastedit.errors import ConfigError, FileError
from fastedit.evaluation.page import size

if TYPE_CHECKING:
    from rich.table import Table

_CODES = {"ended": 0, "failed": 1, "silent": 1, "running": 3}
_EVERY = 0.5  # seconds between two reads
_ALWAYS = {"state", "method", "model", "edits", "output", "process", "began", "moved", "updated", "saved", "memory"}


@dataclass
class _Job:
    """A running edit, as its status file shows it.

    Attributes:
        seen: the status as it was last read; None before the first time.
        news: time of its last change, by our monotonic clock.
        kind: one of `_CODES`.
        says: the kind in words.
    """

    folder: Path
    silent: float
    seen: dict[str, Any] | None = None
    news: float = 0.0
    kind: str = "running"
    says: str = ""

    def look(self) -> None:
        """Read the status and judge it. Raises FileError if there is neither a status nor a finished edit."""
        path = place_of(self.folder, STATUS)
        try:
            status = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(status, dict) or not status.keys() >= _ALWAYS or status["state"] not in _CODES:
                raise ValueError("it is not the status of an edit by this version of fastedit")
        except FileNotFoundError:
            self._judge_gone(path)
            return
        except (OSError, ValueError) as error:  # perhaps only a part of the file, while its folder is synced
            if self.seen is None:
                raise FileError(path, f"{{path}} cannot be read: {error}; try again") from error
            status = self.seen
        if status != self.seen:
            # its age when we first saw it; its time is by the clock of the machine that wrote it
            age = max(0.0, time.time() - status["updated"]) if self.seen is None else 0.0
            self.seen, self.news = status, time.monotonic() - age
        self._judge(status)

    def _judge(self, status: dict[str, Any]) -> None:
        quiet, still = time.monotonic() - self.news, status["updated"] - status["moved"]
        self.kind = status["state"]
        if self.kind == "ended":
            self.says = f"ended; written to {status['output']}"
        elif self.kind == "failed":
            self.says = f"failed: {status['error']}; {self._how_to_go_on(status)}"
        elif quiet > self.silent:
            self.kind = "silent"
            self.says = f"no news for {clock(quiet)}; was it killed? {self._how_to_go_on(status)}"
        else:
            self.says = f"running for {clock(status['updated'] - status['began'])}"
            self.says += f", without progress for {clock(still)}" if still > self.silent else ""

    def _how_to_go_on(self, status: dict[str, Any]) -> str:
        return f"fastedit edit --resume {self.folder} {'continues it' if status['saved'] else 'starts it again'}"

    def _judge_gone(self, path: Path) -> None:
        """Judge an edit without a status: that is removed with the state, after success or if there is no state."""
        outputs, began = [self.folder], 0.0
        if self.seen is not None:  # on another machine the output may have another path
            outputs, began = [Path(self.seen["output"]), self.folder], self.seen["began"]
        for output in outputs:
            report = output / "report.json"
            if report.is_file() and report.stat().st_mtime >= began:
                self.kind, self.says = "ended", f"ended; written to {output}"
                return
        if self.seen is None:
            raise FileError(
                self.folder,
                f"{{path}}: no edit is running: there is no {path}, and no {report}; give the folder of "
                "--output, or that of --state if the edit has one",
            )
        self.kind, self.says = "failed", f"gone: its state is no longer there, and nothing new is in {outputs[0]}"

    def lines(self) -> dict[str, str]:
        """The status as readable lines: name -> text."""
        status = self.seen or {}
        shown = {"state": self.says}
        if "stage" in status:
            shown["stage"] = f"{status['stage']}, {status['done']} of {status['total']}"
            shown["speed"] = ", ".join(filter(None, (status["speed"], status["left"])))
        if status.get("loss") is not None:
            shown["loss"] = f"{status['loss']:.3g}"
        if "learned" in status:
            shown["learned"] = f"{status['learned']} of {status['edits']} edits"
        if status.get("saved"):
            shown["state saved"] = f"{clock(status['updated'] - status['saved'])} before the last news"
        if status:
            took = ((name, taken) for name, taken in status["memory"].items() if taken is not None)
            shown["memory"] = ", ".join(f"{name} {size(taken)}" for name, taken in took)
        return shown


def watch(
    folder: Annotated[Path, typer.Argument(help="The --output or the --state of a running edit.")],
    once: Annotated[
        bool,
        typer.Option("--once", help="Print one line and exit: 3 it runs, 0 it has ended, 1 it failed or is silent."),
    ] = False,
    silent: Annotated[float, typer.Option(help="Seconds without news after which an edit counts as silent.")] = 30.0,
) -> None:
    """Show a running edit: its stage, speed, time left, loss, learned edits, last saved state and memory.

    Example: fastedit watch ./edited

    It reads one small file that the edit rewrites. So the edit may run in another process, or on another machine that
    shares or syncs the folder OUTPUT.run. The exit code says how the edit ended: 0 if well, 1 if not.
    """
    if not silent > 0:
        raise ConfigError(f"--silent {silent:g}: expected more than 0 seconds")
    job = _Job(folder, silent)
    job.look()
    if not once:
        _follow(job)
    state, *details = job.lines().items()
    typer.echo("; ".join([state[1], *(f"{name} {text}" for name, text in details if text)]))
    raise typer.Exit(_CODES[job.kind])


def _follow(job: _Job) -> None:
    """Show the edit until it has ended or failed, or until Ctrl-C; a silent one may continue."""
    from rich.console import Console
    from rich.live import Live

    try:
        with Live(_table(job), console=Console(stderr=True), transient=True, auto_refresh=False) as live:
            while job.kind in ("running", "silent"):
                time.sleep(_EVERY)
                job.look()
                live.update(_table(job), refresh=True)
    except KeyboardInterrupt:
        pass


def _table(job: _Job) -> Table:
    from rich.table import Table
    from rich.text import Text

    status = job.seen or {}
    table = Table.grid(padding=(0, 2))
    if status:
        table.add_row(
            "edit", Text(f"{status['edits']} by {status['method']}, {status['model']}, process {status['process']}")
        )
    for name, text in job.lines().items():
        table.add_row(name, Text(text))
    return table
