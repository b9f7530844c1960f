"""`fastedit evaluate`: its figures, its text, and requests that it cannot ask."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from calling import fails, works
from capitals import BRIEFLY, RECORDS, write


def test_evaluate_with_a_delta_measures_what_edit_measured(model: Path, facts: Path, tmp_path: Path) -> None:
    output, saved = tmp_path / "edited", tmp_path / "figures.json"
    works("edit", "--model", model, "--requests", facts, "--output", output, *BRIEFLY)
    common = ("evaluate", "--requests", facts, "--json", saved)
    table = works(*common, "--model", model, "--delta", output / "delta.safetensors").stdout
    first = json.loads((output / "report.json").read_text())
    del first["edit"]
    assert json.loads(saved.read_text()) == first
    assert "locality" in table

    works(*common, "--model", output)
    alone = json.loads(saved.read_text())
    assert alone["reliability"] == first["reliability"]
    assert alone["locality"] == {"teacher_forced": None, "generated": None}
    message = fails(2, *common, "--model", output, "--delta", output / "delta.safetensors")
    assert "fingerprint" in message


def test_text_is_one_document_or_json_lines_of_documents(model: Path, facts: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("The king is old. " * 3)
    (tmp_path / "same.jsonl").write_text(json.dumps({"text": "The king is old. " * 3}) + "\n")
    (tmp_path / "two.jsonl").write_text(
        "".join(json.dumps({"text": t}) + "\n" for t in ("The king is", "old and Rome"))
    )
    figures = []
    (tmp_path / "two.json").write_text(json.dumps(["The king is", {"text": "old and Rome"}]))
    for name in ("text.txt", "same.jsonl", "two.jsonl", "two.json"):
        works("evaluate", "--model", model, "--requests", facts, "--text", tmp_path / name, "--json", tmp_path / "f")
        figures.append(json.loads((tmp_path / "f").read_text())["perplexity"])
    assert figures[0] == figures[1] != figures[2] == figures[3]
    (tmp_path / "two.jsonl").write_text('{"body": "x"}\n')
    said = fails(2, "evaluate", "--model", model, "--requests", facts, "--text", tmp_path / "two.jsonl")
    assert "line 1 has no text in the field 'text'" in said


def test_a_question_that_cannot_be_asked_is_refused_before_the_model_is_measured(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not after an hour of training: a paraphrase counts like a prompt."""
    records = [RECORDS[0], RECORDS[1] | {"id": "far", "paraphrases": ["far away " * 99]}]
    monkeypatch.setattr("fastedit.cli.arguments.measure", None)
    for command in (("edit", "--output", tmp_path / "o"), ("evaluate",)):
        said = fails(2, *command, "--model", model, "--requests", write(tmp_path / "facts.json", records))
        assert "request far, paraphrase: prompt and target take" in said
