"""Where commands write: what they replace, and what they refuse to replace."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from calling import fails, works
from capitals import BRIEFLY, RECORDS, write

from fastedit import Editor, WeightDelta


@pytest.mark.parametrize("given", ["--model", "--requests", "--text", "--statistics", "--targets"])
def test_an_output_that_holds_an_input_is_refused_before_any_work(
    spoiled: Path, model: Path, facts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    monkeypatch.setattr(Editor, "from_pretrained", None)
    (tmp_path / "prose.txt").write_text("words")
    (tmp_path / "statistics").mkdir()
    sources = {"--model": model, "--requests": facts, "--text": tmp_path / "prose.txt"}
    if given in ("--statistics", "--targets"):
        sources |= {"--method": "memit", "--statistics": tmp_path / "statistics", "--targets": tmp_path / "targets"}
    within = spoiled / "checkpoint-5" / "input"
    if given == "--model":
        shutil.copytree(model, within)
    elif given in ("--requests", "--text"):
        within.parent.mkdir()
        shutil.copy(sources[given], within)
    before = sorted(tmp_path.rglob("*"))
    flags = [word for pair in (sources | {given: within}).items() for word in pair]
    said = fails(2, "edit", "--output", spoiled, *flags)
    assert f"{spoiled} would be replaced, and " in said
    assert f"{given[2:]} {within} is inside it" in said
    assert sorted(tmp_path.rglob("*")) == before


def test_files_do_not_replace_what_a_command_reads_nor_one_another(
    spoiled: Path, facts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Editor, "from_pretrained", None)
    (delta := tmp_path / "delta.safetensors").touch()
    (link := tmp_path / "link").symlink_to(facts)
    common = ("--model", spoiled, "--requests", facts)
    for path, what in (
        (facts, "is the input of --requests"),
        (link, "is the input of --requests"),
        (delta, "is the input of --delta"),
        (spoiled / "model.safetensors", f"is a part of the model {spoiled}"),
    ):
        before = path.read_bytes()
        said = fails(2, "evaluate", *common, "--delta", delta, "--json", path)
        assert f"{path} {what}; give another" in said
        assert path.read_bytes() == before
    assert "is a part of the model" in fails(2, "locate", *common, "--picture", spoiled / "config.json")
    known = write(tmp_path / "known.json", RECORDS)
    assert "input of --capability" in fails(2, "locate", *common, "--capability", known, "--picture", known)
    assert "is the output of --picture" in fails(2, "locate", *common, "--picture", "new", "--json", "./new")
    assert f"{facts} is a file" in fails(2, "evaluate", *common, "--json", facts / "x")
    assert f"{tmp_path} is a folder; give its file" in fails(2, "evaluate", *common, "--delta", tmp_path)


@pytest.mark.parametrize("kind", ["folder", "file", "below a file", "the model"])
def test_an_output_that_cannot_be_is_refused_before_any_work(
    model: Path, facts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(Editor, "from_pretrained", None)  # the work
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("words")
    places = {
        "folder": tmp_path / "mine",
        "file": tmp_path / "mine" / "thesis.tex",
        "below a file": tmp_path / "mine" / "thesis.tex" / "out",
        "the model": model,
    }
    said = fails(2, "edit", "--model", model, "--requests", facts, "--output", places[kind])
    assert str(places[kind]) in said
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.tex"]
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "words"


def test_a_folder_where_a_file_is_to_be_written(facts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Editor, "from_pretrained", None)
    common = ("--model", "none", "--requests", facts)
    assert "is a folder" in fails(2, "evaluate", *common, "--json", tmp_path)
    assert "is a folder" in fails(2, "locate", *common, "--picture", tmp_path)


def test_an_older_checkpoint_is_replaced(model: Path, facts: Path, spoiled: Path) -> None:
    (spoiled / "old").touch()
    works("edit", "--model", model, "--requests", facts, "--output", spoiled, "--no-evaluate", *BRIEFLY)
    assert not (spoiled / "old").exists()
    assert (spoiled / "delta.safetensors").exists()
    assert {path.name for path in spoiled.parent.iterdir()} == {"facts.json", "spoiled"}


def test_an_older_delta_is_replaced(model: Path, facts: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    common = ("edit", "--model", model, "--requests", facts, "--output", output, "--no-evaluate", "--delta-only")
    works(*common, *BRIEFLY)
    works(*common, *BRIEFLY, "--seed", 5)
    assert WeightDelta.load(output / "delta.safetensors").metadata["config"]["seed"] == 5
    (output / "notes.txt").touch()
    assert "is not a checkpoint" in fails(2, *common, *BRIEFLY)
