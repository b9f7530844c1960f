"""A ledger after a failure, damage of its files, or a kill: it holds a whole entry."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import same, values
from ledgers import A, B, C, D, Open, bits, equal, ids

from fastedit import FileError
from fastedit.ledger import Records, records


def test_a_failure_leaves_the_entry_before(opened: Open, begun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk, when the model holds the new facts already."""
    with opened() as ledger:
        held = values(ledger.editor.model)
        with monkeypatch.context() as patch:
            patch.setattr(Records, "commit", lambda *_, **__: (_ for _ in ()).throw(FileError("x", "no room")))
            with pytest.raises(FileError, match="no room"):
                ledger.add([B])
        assert same(ledger.editor.model, held)
        ledger.forget("A")
        assert not ledger.facts


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def test_a_damaged_delta_leaves_the_entry_before(opened: Open, begun: Path) -> None:
    with opened() as ledger:
        held = values(ledger.editor.model)
        ledger.add([B])
    _flip(begun / "tensors" / "00000002.delta.safetensors")
    with pytest.raises(FileError, match=r"delta of entry 2 is damaged.*rollback \S+ledger 1`"):
        opened()
    with opened(at=1) as ledger:
        assert same(ledger.editor.model, held)
        assert ids(ledger) == "A"
        ledger.add([B])


def test_damaged_targets_are_sought_again(opened: Open, tmp_path: Path) -> None:
    with opened() as ledger:
        ledger.add([A, B])
        ledger.add([C])
        whole = bits(ledger)
        ledger.add([D])
        _flip(tmp_path / "ledger" / "tensors" / "00000001.targets.safetensors")
        entry = ledger.forget("D")
        assert equal(bits(ledger), whole)  # which is kept
        entry = ledger.forget("C")
        assert entry.standing == 2
        entry = ledger.add([D])
        assert any("2 facts are sought again" in note for note in ledger.log()[-1].notes + entry.notes)
        entry = ledger.replace("D", "w33")
        assert not any("sought again" in note for note in entry.notes)


PLACES = {
    "its targets are not yet written": ("fastedit.ledger.making.save_tensors", "before"),
    "its targets are written": ("fastedit.ledger.making.save_tensors", "after"),
    "its delta is written": ("fastedit.delta.save_tensors", "after"),
    "its file has no name yet": ("os.replace", "before"),
    "its rows are written": ("COMMIT", "before"),
    "it is committed": ("COMMIT", "after"),
}


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _dying(function: Any, when: str, asked: Callable[..., bool] = lambda *_: True) -> Any:
    def call(*given: Any, **named: Any) -> Any:
        if when == "before" and asked(*given):
            _die()
        found = function(*given, **named)
        if asked(*given):
            _die()
        return found

    return call


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_kill_at_any_moment_leaves_a_whole_entry(
    place: str, opened: Open, begun: Path, made_once: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (begun / "tensors" / "mine.safetensors").touch()  # which is no file of the ledger
    where, when = PLACES[place]
    child = os.fork()
    if child == 0:
        try:
            ledger = opened()
            if where == "COMMIT":
                patched = _dying(Records._all, when, lambda _, statement, *__: statement == "COMMIT")
                monkeypatch.setattr(records.Records, "_all", patched)
            else:
                module, _, name = where.rpartition(".")
                monkeypatch.setattr(where, _dying(getattr(sys.modules[module], name), when))
            ledger.add([B])
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    with opened() as ledger:
        committed = place == "it is committed"
        assert ids(ledger) == ("AB" if committed else "A")
        used = {entry.delta for entry in ledger.log()} | {fact.targets for fact in ledger.facts}
        assert {file.name for file in (begun / "tensors").iterdir()} == used | {"mine.safetensors"}
        if not committed:
            ledger.add([B])
        assert equal(bits(ledger), made_once[1])
