"""Ctrl-C in `fastedit edit`: nothing is written, or what is done if that was asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from calling import CtrlC, call, fails
from capitals import LEARNS, weights, write

import fastedit.demo
from fastedit.cli.bars import Bars


@pytest.mark.parametrize("stage", [("prefix", 4), ("train", 3), ("generation", 16)])
def test_ctrl_c_before_the_edit_is_made_writes_nothing(
    model: Path,
    facts: Path,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    stage: tuple[str, int],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))  # the unedited model is measured
    interrupt = CtrlC(*stage)
    monkeypatch.setattr(Bars, "callback", lambda *args: interrupt.of(*args))
    common = ("edit", "--model", model, "--requests", facts, "--output", tmp_path / "out", *LEARNS)
    assert "interrupted" in fails(1, *common)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["facts.json"]


def test_ctrl_c_keeps_the_last_epoch_if_told_to(
    model: Path, facts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt = CtrlC("train", 3)
    monkeypatch.setattr(Bars, "callback", lambda *args: interrupt.of(*args))
    output = tmp_path / "out"
    common = ("edit", "--model", model, "--requests", facts, "--output", output, *LEARNS, "--no-evaluate")
    result = call(*common, "--keep-partial")
    assert result.exit_code == 1
    assert "interrupted; kept the weights of epoch 3" in result.stderr
    assert "of 4 edits: kept the weights of epoch 3; written to" in result.stdout
    report = json.loads((output / "report.json").read_text())["edit"]
    assert len(report["losses"]) == 3
    assert report["interrupted"] == "kept the weights of epoch 3"
    path = "model.layers.1.mlp.down_proj.weight"
    assert not torch.equal(weights(output)[path], weights(model)[path])


def test_ctrl_c_keeps_the_batches_that_are_done_and_counts_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edits = [{"prompt": r.prompt, "target": r.target, "subject": r.subject} for r in fastedit.demo.World().requests(6)]
    interrupt = CtrlC("edits", 4)
    monkeypatch.setattr(Bars, "callback", lambda *args: interrupt.of(*args))
    files = ("--requests", write(tmp_path / "facts.json", edits), "--output", tmp_path / "out")
    method = ("--method", "memit", "--layers", "1-2", "--batch-size", 2, "--steps", 2, "--n-contexts", 0)
    common = ("edit", "--model", fastedit.demo.checkpoint_path(), "--dtype", "float32", *files, *method)
    result = call(*common, "--keep-partial", "--no-evaluate")
    assert result.exit_code == 1, result.stderr
    assert "of 6 edits: kept the first 4 edits; written to" in result.stdout
    report = json.loads((tmp_path / "out" / "report.json").read_text())["edit"]
    assert (report["edits"], report["interrupted"]) == (4, "kept the first 4 edits")
    assert report["config"]["layers"] == [1, 2]
