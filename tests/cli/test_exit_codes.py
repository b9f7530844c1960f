"""Exit codes, and failures that are told in one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from calling import fails

from fastedit import ConfigError, EditError, Editor, FileError, ModelError, RequestError


def test_a_message_of_several_lines_is_one_line(model: Path, facts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ModelError("the first line\nand the second")

    monkeypatch.setattr(Editor, "from_pretrained", broken)
    said = fails(2, "evaluate", "--model", model, "--requests", facts)
    assert "the first line and the second" in said


def test_as_a_process(tmp_path: Path) -> None:
    """`python -m fastedit`: one line and no traceback; and --help loads neither torch nor transformers."""
    run = [
        sys.executable,
        "-m",
        "fastedit",
        "evaluate",
        "--model",
        "none",
        "--requests",
        str(tmp_path / "no"),
    ]
    done = subprocess.run(run, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr == f"fastedit: {tmp_path / 'no'}: cannot be read: No such file or directory\n"
    script = (
        "import sys, fastedit.cli\n"
        "sys.argv[1:] = ['--help']\n"
        "try:\n    fastedit.cli.main()\n"
        "finally:\n    print('heavy:', {'torch', 'transformers', 'matplotlib'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert "heavy: set()" in done.stdout
    assert all(command in done.stdout for command in ("edit", "evaluate", "demo", "locate", "env"))


@pytest.mark.parametrize("kind", [RequestError, ModelError, ConfigError, EditError, FileError])
def test_the_exit_code_is_that_of_the_phase_whatever_the_error(
    model: Path, facts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    error = kind(*([tmp_path / "x"] if kind is FileError else []), "something is wrong")

    def fail(*_: Any, **__: Any) -> Any:
        raise error

    for command, *places in (
        (("edit", "--output", tmp_path / "o", "--epochs", 1), "editor.Editor.plan", "editor.Editor.run"),
        (("evaluate",), "evaluation.questions.ask", "cli.arguments.measure"),
        (("locate",), "evaluation.locate.Sweep.__init__", "evaluation.locate.Sweep.run"),
    ):
        for place, code in zip(places, (2, 1), strict=True):
            with monkeypatch.context() as patch:
                patch.setattr(f"fastedit.{place}", fail)
                assert "something is wrong" in fails(code, *command, "--model", model, "--requests", facts)
