"""A ledger: what stands decides every bit of the model, whatever was done before."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from helpers import same, values
from ledgers import EDITS, WAYS, A, B, C, Open, bits, equal, ids, near

from fastedit import ConfigError, EditRequest, FastEditError, RequestError
from fastedit.ledger import making


@pytest.mark.parametrize("way", WAYS)
def test_what_is_forgotten_was_never_there(way: str, opened: Open) -> None:
    with opened("one", way) as ledger:
        for edit in (A, B, C):
            ledger.add([edit])
        assert ledger.forget("B").standing == 2
        forgotten, model = bits(ledger), values(ledger.editor.model)
    with opened("other", way) as ledger:
        ledger.add([A])
        ledger.add([C])
        assert equal(forgotten, bits(ledger))
        assert same(ledger.editor.model, model)
    with opened("one", way) as ledger:  # by another process
        assert same(ledger.editor.model, model)
        assert ids(ledger) == "AC"


@pytest.mark.parametrize(("way", "off"), [("memit", 1e-5), ("rome", 1e-5), ("locft-bf", 0.0)])
def test_one_by_one_is_all_at_once(way: str, off: float, opened: Open) -> None:
    """Targets are sought in other batches, which round otherwise; nothing else differs."""
    with opened("one", way) as ledger:
        for edit in EDITS:
            ledger.add([edit])
        one = bits(ledger)
    with opened("all", way) as ledger:
        ledger.add(EDITS)
        assert near(one, bits(ledger)) <= off


def test_targets_are_sought_once(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    written, sizes = making.write, []

    def write(*given: Any) -> Any:
        found = written(*given)
        sizes.append((len(given[1]), len(found.sought)))
        return found

    monkeypatch.setattr("fastedit.ledger.ledger.write", write)
    with opened() as ledger:
        ledger.add([A, B])
        ledger.add([C])
        ledger.forget("A")
        ledger.forget("C")  # B alone was never written
    assert sizes == [(2, 2), (3, 1), (2, 0), (1, 0)]


@pytest.mark.parametrize("way", ["memit", "buffered"])
def test_every_entry_comes_back_bit_for_bit(way: str, opened: Open) -> None:
    with opened(way=way) as ledger:
        unedited, states = values(ledger.editor.model), []
        for change in (lambda: ledger.add([A, B]), lambda: ledger.add([C]), lambda: ledger.replace("A", "w50 w51")):
            change()
            states.append((values(ledger.editor.model), ids(ledger)))
        assert states[-1][1] == "BCA"
        for number in (1, 3, 2):
            ledger.rollback(number)
            wanted, standing = states[number - 1]
            assert same(ledger.editor.model, wanted)
            assert ids(ledger) == standing
        assert ledger.forget("C").about["checks"]["edits"] == 2  # entry 1 once more
        assert same(ledger.editor.model, states[0][0])
        assert ledger.rollback(0).standing == 0
        assert same(ledger.editor.model, unedited)
        assert ledger.delta() is None
        ledger.add([A, B])
        assert equal(bits(ledger), bits(ledger, 1))
        assert [entry.kind for entry in ledger.log()] == [
            "add",
            "add",
            "replace",
            *["rollback"] * 3,
            "forget",
            "rollback",
            "add",
        ]


def test_the_newest_target_of_a_prompt_counts(opened: Open) -> None:
    newer = replace(A, target="w60 w61", id=None)
    with opened("one") as ledger:
        ledger.add([A, B], source="a list")
        entry = ledger.add([replace(newer, target="w9"), newer, B])
        assert [fact.id for fact in (*entry.added, *entry.gone)] == ["A", "A"]
        assert entry.gone[0].source == "a list"
        assert any("fact A" in note and "is replaced by 'w60 w61'" in note for note in entry.notes)
        assert any("the last one counts; 1 were left out" in note for note in entry.notes)
        assert any("1 facts stand already: B" in note for note in entry.notes)
        replaced = bits(ledger)
        ledger.rollback(1)
        assert ledger.replace(A.prompt, "w60 w61").standing == 2
        assert equal(bits(ledger), replaced)
    with opened("other") as ledger:
        ledger.add([B])
        ledger.add([newer])
        assert near(replaced, bits(ledger)) < 1e-5  # the target of B was sought beside that of A
        assert ids(ledger) == "Bf2"


FORGOTTEN = EditRequest("w30 w31 w32 w33", forget="w50", subject="w30 w31", id="P")


@pytest.mark.parametrize("other", [{"subject": "w33"}, {"forget": "w51"}, {"forget": None}], ids=str)
def test_a_fact_with_another_subject_or_answer_to_forget_is_another_fact(other: dict[str, Any], opened: Open) -> None:
    newer = replace(FORGOTTEN, **other)
    with opened("one", "locft-bf") as ledger:
        ledger.add([FORGOTTEN])
        (name,) = other
        assert any(
            f"is replaced by {FORGOTTEN.target!r}, {name} {other[name]!r}" in n for n in ledger.add([newer]).notes
        )
        assert [fact.request for fact in ledger.facts] == [newer]
        with pytest.raises(RequestError, match="stand already"):
            ledger.add([newer])


def test_the_log_has_what_was_done(opened: Open) -> None:
    with opened(way="locft-bf") as ledger:
        entry = ledger.add([A, {"prompt": "w9 w10", "target": "w11", "neighbours": [["w8 w7", "w6"]]}], evaluate=True)
        assert entry.about["checks"]["edits"] == 2
        assert {"id", "why"} == set(entry.about["checks"]["unlearned"][0])
        assert 0 <= entry.about["checks"]["measures"]["locality"]["teacher_forced"] <= 1
        found = ledger.log()[0].to_dict()
        assert found == entry.to_dict()
        assert [fact["id"] for fact in found["added"]] == ["A", "f2"]
        assert ledger.facts[1].request.neighbours == (("w8 w7", "w6"),)
        assert ledger.facts[0].request == A


def test_only_training_is_buffered(opened: Open) -> None:
    with pytest.raises(ConfigError, match="buffered is for locft-bf"):
        opened(buffered=True)
    assert issubclass(ConfigError, FastEditError)
