"""Calls of the command line."""

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
