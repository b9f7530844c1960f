"""`fastedit ledger`: what it writes, prints and refuses; what a ledger means is tested beside the library."""

from __future__ import annotations

import json
import re
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import torch
from calling import fails, works
from helpers import tiny_model
from safetensors.torch import load_file

from fastedit import Editor
from fastedit.files import locked

RECORDS = [{"prompt": f"w{10 + i} w{20 + i} w{30 + i}", "target": f"w{40 + i}"} for i in range(3)]
LEARNS = ("--layers", 1, "--lr", 0.02, "--epochs", 15, "--batch-size", 3, "--published")


def write(path: Path, records: Any) -> Path:
    path.write_text(json.dumps(records))
    return path


@pytest.fixture(scope="module")
def work(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, and a ledger of the first with one entry."""
    work = tmp_path_factory.mktemp("ledger")
    Editor(tiny_model("llama"), tokenizer).save_model(work / "model")
    Editor(tiny_model("llama", seed=1), tokenizer).save_model(work / "other")
    facts = write(work / "facts.json", RECORDS)
    first = works("ledger", "add", work / "ledger", "--model", work / "model", "--requests", facts, *LEARNS)
    assert re.match(r"entry 1: \+3 \(f1 … f3\), learned \d of 3, 3 facts stand; ", first.stdout)
    return work


def test_a_ledger_in_use_is_read(work: Path, tmp_path: Path) -> None:
    """By what needs no lock, as on a disk that cannot be written."""
    model = ("--model", work / "model")
    with locked(work / "ledger"):
        (work / "ledger" / "lock").write_text("1 on elsewhere")
        assert "in use by process 1 on elsewhere" in fails(2, "ledger", "rollback", work / "ledger", 0)
        assert "f1" in works("ledger", "log", work / "ledger").stdout
        assert "+1.000" in works("ledger", "blame", work / "ledger", RECORDS[0]["prompt"], *model).stdout
        works("ledger", "export", work / "ledger", "--output", tmp_path / "edited", *model)
        assert "is of a model with fingerprint" in fails(
            2, "ledger", "blame", work / "ledger", "w9", "--model", work / "other"
        )


def test_facts_come_and_go(work: Path, tmp_path: Path) -> None:
    ledger, model = tmp_path / "ledger", ("--model", work / "model")
    works("ledger", "add", ledger, *model, "--requests", work / "facts.json", *LEARNS)
    newer = write(tmp_path / "newer.json", [{**RECORDS[0], "target": "w50"}])
    added = works("ledger", "add", ledger, *model, "--requests", newer, "--source", "a letter", "--evaluate")
    assert "fact f1" in added.stderr
    assert "is replaced by 'w50'" in added.stderr
    assert "reliability: " in added.stdout
    forgotten = works("ledger", "forget", ledger, RECORDS[1]["prompt"], *model, "--evaluate", "sample:1").stdout
    assert "−f2" in forgotten
    assert "reliability: " in forgotten
    assert "expected all, or sample:N" in fails(
        2, "ledger", "replace", ledger, "f3", "w51", *model, "--evaluate", "some"
    )
    works("ledger", "replace", ledger, "f3", "w51", *model)
    blamed = works("ledger", "blame", ledger, RECORDS[0]["prompt"], *model).stdout.splitlines()
    assert "+1.000" in blamed[3]
    assert "a letter" in blamed[3]
    assert "rolled back to entry 2; 3 facts stand" in works("ledger", "rollback", ledger, 2).stdout

    table = works("ledger", "log", ledger, "--json", tmp_path / "log.json").stdout
    entries = json.loads((tmp_path / "log.json").read_text())
    assert [entry["kind"] for entry in entries] == ["add", "add", "forget", "replace", "rollback"]
    assert all(entry["kind"] in table for entry in entries)
    assert entries[2]["about"]["checks"]["measures"]["sample"] == {"measured": 1, "of": 2}
    assert [entry["standing"] for entry in entries] == [3, 3, 2, 2, 3]
    assert entries[1]["added"][0] | {"id": "f1", "target": "w50", "source": "a letter"} == entries[1]["added"][0]


def test_what_stands_is_a_delta_and_a_checkpoint(work: Path, tmp_path: Path) -> None:
    model, delta = ("--model", work / "model"), tmp_path / "delta.safetensors"
    works("ledger", "export", work / "ledger", "--delta", delta)
    works("apply", delta, *model, "--output", tmp_path / "applied")
    works("ledger", "export", work / "ledger", "--output", tmp_path / "whole", *model, "--entry", 1)
    applied, whole = (load_file(tmp_path / name / "model.safetensors") for name in ("applied", "whole"))
    assert applied.keys() == whole.keys()
    assert all(torch.equal(applied[name], whole[name]) for name in applied)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("forget LEDGER f9 --model MODEL", "'f9': no fact with this id or prompt stands"),
        ("forget LEDGER f1 --model OTHER", "of a model with fingerprint"),
        ("forget NONE f1 --model MODEL", "is not a ledger"),
        ("replace LEDGER f1 w40 --model MODEL", "stand already"),
        ("rollback LEDGER 7", "there is no entry 7"),
        ("rollback NONE 1", "is not a ledger"),
        ("log NONE", "is not a ledger"),
        ("export LEDGER", "--delta FILE or --output DIR"),
        ("export LEDGER --output NONE", "--output needs --model"),
        ("add LEDGER --model MODEL --requests FACTS --lr 0.5", "lr was 0.02 and is 0.5"),
        ("add LEDGER --model MODEL --requests FACTS --method memit", "method was 'locft-bf' and is 'memit'"),
        ("add NONE --model MODEL --requests FACTS --method memit", "has no subject"),
        ("add MODEL --model MODEL --requests FACTS", "holds a model; give the ledger a folder of its own"),
        ("log MODEL", "holds a model"),
        ("burn", "No such command"),
        ("", "Missing command"),
    ],
)
def test_what_is_refused_leaves_everything_as_it_was(command: str, words: str, work: Path, tmp_path: Path) -> None:
    none = tmp_path / "none"
    names = {
        "LEDGER": work / "ledger",
        "MODEL": work / "model",
        "OTHER": work / "other",
        "FACTS": work / "facts.json",
        "NONE": none,
    }
    before = sorted(work.rglob("*"))
    assert words in fails(2, "ledger", *(names.get(word, word) for word in command.split()))
    assert sorted(work.rglob("*")) == before
    assert not none.exists()


def test_a_ledger_that_was_cut_off_before_its_first_entry_is_begun(work: Path, tmp_path: Path) -> None:
    (tmp_path / "ledger.sqlite").touch()
    works("ledger", "add", tmp_path, "--model", work / "model", "--requests", work / "facts.json", *LEARNS)
    with sqlite3.connect(tmp_path / "ledger.sqlite") as db:
        assert db.execute("SELECT count(*) FROM facts").fetchone() == (3,)


def test_help_names_the_commands() -> None:
    shown = works("ledger", "--help").stdout
    assert all(name in shown for name in ("add", "forget", "replace", "log", "blame", "rollback", "export"))
