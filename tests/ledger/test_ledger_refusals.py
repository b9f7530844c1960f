"""A ledger's refusals, which change nothing."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import same, values
from ledgers import A, B, C, D, Open

from fastedit import ConfigError, EditRequest, FileError, Ledger, ModelError, RequestError
from fastedit.ledger import Records


@pytest.mark.parametrize(
    ("refused", "kind", "words"),
    [
        (lambda ledger: ledger.forget(["A", "fact-7", "zzz"]), RequestError, "2 facts cannot.*did you mean fact-1"),
        (lambda ledger: ledger.replace("fact-7", "w9"), RequestError, "did you mean fact-1"),
        (lambda ledger: ledger.replace("A", A.target), RequestError, "stand already"),
        (lambda ledger: ledger.add([replace(C, id="A"), replace(D, id="fact-1")]), RequestError, "2 ids cannot"),
        (lambda ledger: ledger.add([replace(C, id="x"), replace(D, id="x")]), RequestError, "id x: it names"),
        (lambda ledger: ledger.add([A]), RequestError, "nothing to add"),
        (lambda ledger: ledger.add([EditRequest("w9 w10", "w11")]), RequestError, "subject"),
        (lambda ledger: ledger.rollback(5), RequestError, "entries are 1 to 1"),
        *((lambda ledger, entry=entry: ledger.rollback(entry), RequestError, "give its number")
          for entry in (None, True, "1", 1.0)),
        (lambda ledger: ledger.delta("1"), RequestError, "the entry is '1'; give its number"),
        *((lambda ledger, facts=facts: ledger.forget(facts), RequestError, "give ids or prompts, at least one")
          for facts in ([], None, [1], ("A", None))),
        (lambda ledger: ledger.replace(["A"], "w9"), RequestError, "give ids or prompts"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_changes_nothing(refused: Any, kind: Any, words: str, opened: Open, tmp_path: Path) -> None:
    with opened() as ledger:
        ledger.add([A, replace(B, id="fact-1")])
        held = values(ledger.editor.model)
        with pytest.raises(kind, match=words):
            refused(ledger)
        assert same(ledger.editor.model, held)
        assert len(ledger.log()) == 1
        ledger.add([C])


def test_a_sample_that_cannot_be_drawn_is_refused_before_the_edit(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened() as ledger:
        ledger.add([A])
        monkeypatch.setattr(ledger.editor, "run", lambda plan: pytest.fail("the edit has begun"))
        for refused in (
            lambda: ledger.add([C], evaluate=-1),
            lambda: ledger.forget("A", evaluate=-1),
            lambda: ledger.replace("A", "w9", evaluate=-1),
        ):
            with pytest.raises(ConfigError, match="sample is -1"):
                refused()


def test_a_name_of_two_facts_is_refused(opened: Open) -> None:
    with opened(way="locft-bf") as ledger:
        ledger.add([replace(A, id=B.prompt), B])
        with pytest.raises(RequestError, match="is the id of one fact and the prompt of another, B; give the first"):
            ledger.forget([B.prompt])
        ledger.forget([A.prompt])
        ledger.forget(B.prompt)
        assert ledger.facts == []


def _newer(folder: Path) -> None:
    with sqlite3.connect(folder / "ledger.sqlite") as db:
        db.execute("PRAGMA user_version = 9")


@pytest.mark.parametrize(
    ("meddle", "options", "kind", "words"),
    [
        (None, {"seed": 2}, ModelError, "is of a model with fingerprint"),
        (None, {"way": "alphaedit"}, ConfigError, "method was 'memit' and is 'alphaedit'"),
        (None, {"steps": 5, "lr": 0.1}, ConfigError, "(steps was 3 and is 5|lr was 0.3 and is 0.1).*; "),
        (None, {"way": "bf16"}, ConfigError, "dtype was 'float32' and is 'bfloat16'"),
        (_newer, {}, FileError, "has format 9.*install a newer fastedit"),
        (lambda folder: (folder / "ledger.sqlite").write_bytes(b"x" * 5000), {}, FileError, "damaged"),
    ],
    ids=["model", "method", "settings", "dtype", "newer", "damaged"],
)
def test_what_is_not_this_ledger_is_refused(
    meddle: Any, options: dict[str, Any], kind: Any, words: str, opened: Open, begun: Path
) -> None:
    if meddle:
        meddle(begun)
    with pytest.raises(kind, match=words):
        opened(**options)


def test_a_ledger_has_one_user(opened: Open, begun: Path) -> None:
    with opened():
        with pytest.raises(FileError, match="open in this process already"):
            opened()
        reader = Records(begun)  # reading takes no lock
        assert len(reader.entries()) == 1
        reader.close()
    code = (
        "from pathlib import Path; from fastedit.files import locked\nwith locked(Path()): print(flush=True), input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=begun, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout
        other.stdout.readline()
        with pytest.raises(FileError, match=f"in use by process {other.pid} on .*; wait"):
            opened()
        other.kill()
    opened().close()


def test_an_edited_model_has_no_ledger(opened: Open, tmp_path: Path) -> None:
    with opened() as ledger:
        ledger.add([A])
        editor = ledger.editor
    with pytest.raises(ModelError, match="holds edits that are not the ledger's"):
        Ledger(tmp_path / "other", editor)
    with opened() as ledger:
        other = ledger.editor.edit([B])
        with pytest.raises(ModelError, match="something else has changed the ledger's model"):
            ledger.add([C])
        other.revert()
        ledger.add([C])


@pytest.mark.parametrize("facts", [[], [A]], ids=["no fact stands", "a fact stands"])
@pytest.mark.parametrize("place", ["1.mlp.down_proj", "3.mlp.up_proj"])
def test_a_model_that_something_else_has_changed_takes_no_facts(place: str, facts: list[Any], opened: Open) -> None:
    """Neither a matrix that the ledger writes nor another one, and not at the second attempt either."""
    with opened() as ledger:
        if facts:
            ledger.add(facts)
        weight = ledger.editor.model.get_submodule(f"model.layers.{place}").weight
        before = weight.detach().clone()
        weight.data *= 1.5
        held = values(ledger.editor.model)
        for change in (lambda: ledger.add([B]), lambda: ledger.add([B]), lambda: ledger.rollback(0)):
            with pytest.raises(ModelError, match="something else has changed the ledger's model: its fingerprint is"):
                change()
        assert same(ledger.editor.model, held)
        assert len(ledger.log()) == len(facts)
        weight.data = before
        ledger.add([B])


def test_a_ledger_is_kept_by_one_process(opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastedit.parallel.world", lambda: 2)
    with pytest.raises(ConfigError, match="without torchrun"):
        opened()
    assert not (tmp_path / "ledger").exists()
