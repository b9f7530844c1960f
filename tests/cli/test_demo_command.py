"""`fastedit demo`: what it measures, and what it refuses."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from calling import call, fails, works

import fastedit.demo
from fastedit import WeightDelta


@pytest.mark.parametrize("broken", [False, True])
def test_demo_measures_before_and_after_and_takes_the_edit_back(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: bool
) -> None:
    monkeypatch.setattr(fastedit.demo, "checkpoint_path", lambda: model)
    monkeypatch.setattr(fastedit.demo.World, "prose", lambda self, n: ["The king was old."] * n)
    asked: list[Any] = []

    def questions(world: Any, phrasings: str, known: Any) -> Any:
        asked.extend(known)
        return [("The sky is", "blue"), ("The sea is", "blue")]

    monkeypatch.setattr(fastedit.demo.World, "questions", questions)
    if broken:
        monkeypatch.setattr(WeightDelta, "revert", lambda self: None)
        result = call("demo", "--n", 1)
        assert result.exit_code == 1
        assert "revert did not restore" in result.stderr
        return
    result = works("demo", "--n", 2, "--output", tmp_path / "edited")
    for words in ("portability", "perplexity", "facts not edited  ", "of 2 questions", "of 2 edits learned in"):
        assert words in result.stdout
    edited = {request.subject for request in fastedit.demo.World().requests(2)}
    assert len(asked) > 10_000
    assert not edited & {fact.subject for fact in asked}
    assert "all weights restored, bit for bit" in result.stdout
    assert (tmp_path / "edited" / "model.safetensors").exists()
    assert "2000 people" in fails(2, "demo", "--n", 2001)


def test_demo_without_its_model_says_how_to_train_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastedit.demo, "checkpoint_path", lambda: tmp_path)
    assert f"python -m fastedit.demo.train --output {tmp_path}" in fails(2, "demo")


def test_demo_does_not_replace_a_folder_around_its_model(
    model: Path, spoiled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(model, spoiled / "inside")
    monkeypatch.setattr(fastedit.demo, "checkpoint_path", lambda: spoiled / "inside")
    assert "the model" in fails(2, "demo", "--n", 1, "--output", spoiled)
    assert (spoiled / "inside" / "config.json").exists()
