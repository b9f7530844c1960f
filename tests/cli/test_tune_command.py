"""`fastedit tune`: the configuration that it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from calling import call, fails

from fastedit import Editor


def test_tune_writes_a_configuration_that_edit_takes(model: Path, facts: Path, tmp_path: Path) -> None:
    output = tmp_path / "tuned"
    asked = ("tune", "--model", model, "--requests", facts, "--output", output, "--sample", 3, "--epochs", 3)
    printed = call(*asked, "--trials", 2)
    assert printed.exit_code == 0
    assert {path.name for path in output.iterdir()} == {"config.json", "report.json", "front.png", "trials.jsonl"}
    chosen, report = (json.loads((output / f"{name}.json").read_text()) for name in ("config", "report"))
    assert chosen == report["trials"][report["best"]]["settings"]
    assert f"fastedit edit --config {output / 'config.json'}" in printed.stdout
    before = (output / "trials.jsonl").read_text().splitlines()
    assert call(*asked, "--trials", 3).exit_code == 0
    assert (output / "trials.jsonl").read_text().splitlines()[:3] == before
    edited = tmp_path / "edited"
    editing = ("edit", "--model", model, "--requests", facts, "--output", edited, "--no-evaluate", "--delta-only")
    assert call(*editing, "--config", output / "config.json", "--lr", "0.25").exit_code == 0
    config = json.loads((edited / "report.json").read_text())["edit"]["config"]
    assert {name: config[name] for name in chosen if name not in ("method", "lr")} == {
        name: value for name, value in chosen.items() if name not in ("method", "lr")
    }
    assert config["lr"] == 0.25


def test_tune_leaves_the_config_json_of_models_alone(
    model: Path, facts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Editor, "from_pretrained", None)
    (edited := tmp_path / "edited").mkdir()
    (edited / "model.safetensors").touch()
    within = {path: path.read_bytes() for path in model.iterdir() if path.is_file()}
    asked = ("tune", "--model", model, "--requests", facts, "--output")
    for output, said in (
        (model, "is a part of the model"),
        (edited, f"{edited} holds weights, whose config.json would be"),
    ):
        assert said in fails(2, *asked, output)
    assert {path: path.read_bytes() for path in model.iterdir() if path.is_file()} == within
    assert [*edited.iterdir()] == [edited / "model.safetensors"]
