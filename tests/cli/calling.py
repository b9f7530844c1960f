"""Calls of the command line, and Ctrl-C in them."""

from __future__ import annotations

from typing import Any

from typer.testing import CliRunner, Result

from fastedit import cli


def call(*args: Any, **env: str) -> Result:
    return CliRunner().invoke(cli.app, [str(arg) for arg in args], env=env)


def works(*args: Any, **env: str) -> Result:
    result = call(*args, **env)
    assert result.exit_code == 0, result.stderr
    return result


def fails(code: int, *args: Any, **env: str) -> str:
    """The last line on stderr of a call that fails as it should: no traceback, nothing on stdout."""
    result = call(*args, **env)
    assert result.exit_code == code
    assert isinstance(result.exception, SystemExit)
    assert not result.stdout
    last = result.stderr.splitlines()[-1]
    assert last.startswith("fastedit: ")
    return last


class CtrlC:
    """Ctrl-C when a stage has done so much."""

    def __init__(self, stage: str, done: int) -> None:
        self.at = stage, done

    def of(self, bars: Any, title: str, n_edits: int | None = None) -> Any:
        def report(stage: str, done: int, total: int, loss: float | None = None) -> None:
            if (stage, done) == self.at:
                raise KeyboardInterrupt

        return report
