"""The progress bars: speed, loss and the time that is left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from calling import works
from capitals import LEARNS

from fastedit.cli.bars import Bars


def test_progress_shows_speed_loss_and_time_left(model: Path, facts: Path, tmp_path: Path) -> None:
    common = ("edit", "--model", model, "--requests", facts, "--output", tmp_path / "o", *LEARNS)
    env = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "COLUMNS": "160"}
    lines = works(*common, **env, FORCE_COLOR="1").stderr
    for words in ("before: answers", "training", " edits/s", "loss ", "after: generation"):
        assert words in lines
    first = json.loads((tmp_path / "o" / "report.json").read_text())
    assert "before: " not in works(*common, **env, FORCE_COLOR="1").stderr  # the unedited model is measured once
    again = json.loads((tmp_path / "o" / "report.json").read_text())
    assert {**again, "edit": None} == {**first, "edit": None}
    assert not works(*common, **env).stderr.count("edits/s")  # no terminal, no bars


def test_speed_and_time_left(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "160")
    clock = iter([0.0, 0.0, 4.0, 10.0, 30.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    with Bars() as bars:
        report = bars.callback("", n_edits=200)
        report("prefix", 200, 200)  # from 0 to 4 s
        report("train", 1, 20, 2.5)  # from 4 to 10 s: 10 of 200 edits are through
        report("train", 5, 20, 1.25)  # to 30 s: 50 edits in 26 s; 78 s are left
    final = capsys.readouterr().err.split("\r")[-1]
    assert "50 edits/s" in final
    assert "1.92 edits/s loss 1.25 1:18 left" in final
