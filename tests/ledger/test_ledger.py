"""A ledger: what stands decides every bit of the model, whatever was done before and wherever it was cut off."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CONTEXTS, moments, random_edits, same, tiny_model, values
from torch import Tensor

from fastedit import ConfigError, Editor, EditRequest, FastEditError, FileError, Ledger, ModelError, RequestError
from fastedit.ledger import Records, making, records
from fastedit.weights import LowRank

SOLVER: dict[str, Any] = {
    "layers": (1, 2), "contexts": tuple(CONTEXTS[:1]), "steps": 3, "lr": 0.3, "unchecked_statistics": True,
}  # fmt: skip
ONE_LAYER = {**SOLVER, "layers": (1,)}
LOCFT: dict[str, Any] = {"method": "locft-bf", "layer": 1, "lr": 3e-3, "epochs": 2, "batch_size": 2, "published": True}
WAYS: dict[str, dict[str, Any]] = {
    "memit": {**SOLVER, "method": "memit"},
    "alphaedit": {**SOLVER, "method": "alphaedit"},
    "rome": {**ONE_LAYER, "method": "rome"},
    "emmet": {**ONE_LAYER, "method": "emmet"},
    "locft-bf": LOCFT,
    "buffered": {**LOCFT, "buffered": True},
    "bf16": {**SOLVER, "method": "memit", "dtype": torch.bfloat16},
}
Open = Callable[..., Ledger]
EDITS = [replace(edit, id=name) for edit, name in zip(random_edits(4, 5), "ABCD", strict=True)]
A, B, C, D = EDITS


@pytest.fixture(scope="module")
def statistics(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("statistics")
    moments(tiny_model("llama", seed=1), folder, 3)
    return folder


@pytest.fixture
def opened(tokenizer: Any, statistics: Path, tmp_path: Path) -> Open:
    """Opens the ledger of that name with a fresh model, in one of the `WAYS`."""

    def open_(name: str = "ledger", way: str = "memit", *, at: int | None = None, seed: int = 1, **more: Any) -> Ledger:
        buffered = more.pop("buffered", WAYS[way].get("buffered"))
        editor = editor_of(tokenizer, statistics, way, seed, **more)
        return Ledger(tmp_path / name, editor, buffered=buffered, at=at)

    return open_


@pytest.fixture(scope="module")
def made_once(tokenizer: Any, statistics: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A ledger of A, and the bits of A and B."""
    folder = tmp_path_factory.mktemp("made") / "A"
    with Ledger(folder, editor_of(tokenizer, statistics)) as ledger:
        ledger.add([A])
    shutil.copytree(folder, folder.with_name("AB"))
    with Ledger(folder.with_name("AB"), editor_of(tokenizer, statistics)) as ledger:
        ledger.add([B])
        return folder, bits(ledger)


@pytest.fixture
def begun(made_once: tuple[Path, Any], tmp_path: Path) -> Path:
    """The folder of `opened()`, which holds A."""
    shutil.copytree(made_once[0], tmp_path / "ledger")
    return tmp_path / "ledger"


def editor_of(tokenizer: Any, statistics: Path, way: str = "memit", seed: int = 1, **more: Any) -> Editor:
    options = {**WAYS[way], **more}
    for name in ("dtype", "buffered"):
        options.pop(name, None)
    if options["method"] != "locft-bf":
        options["statistics"] = statistics
    return Editor(tiny_model("llama", seed=seed, dtype=WAYS[way].get("dtype", torch.float32)), tokenizer, **options)


def bits(ledger: Ledger, entry: int | None = None) -> dict[str, Tensor]:
    delta = ledger.delta(entry)
    updates = delta.updates if delta else {}
    return {path: u.dense() if isinstance(u, LowRank) else u for path, u in updates.items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[path], other[path]) for path in one)


def near(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[path] - other[path]).norm() / other[path].norm()) for path in one)


def ids(ledger: Ledger) -> str:
    return "".join(fact.id for fact in ledger.facts)


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


def test_a_name_of_two_facts_is_refused(opened: Open) -> None:
    with opened(way="locft-bf") as ledger:
        ledger.add([replace(A, id=B.prompt), B])
        with pytest.raises(RequestError, match="is the id of one fact and the prompt of another, B; give the first"):
            ledger.forget([B.prompt])
        ledger.forget([A.prompt])
        ledger.forget(B.prompt)
        assert ledger.facts == []


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


@pytest.mark.parametrize("way", ["memit", "locft-bf"])
def test_blame_names_the_facts_with_near_keys(way: str, opened: Open) -> None:
    with opened(way=way) as ledger:
        ledger.add(EDITS)
        found = ledger.blame(B.prompt)
        assert len(found) == 4
        assert (found[0].fact.id, found[0].at) == ("B", B.subject)
        assert found[0].cosine == pytest.approx(1, abs=1e-5)
        assert found[1].cosine < 0.99
        assert ledger.blame(f"w80 {C.subject} w81")[0].at == C.subject
        (first, *_) = ledger.blame("w80 w81 w82", subject="w81")
        assert first.at == "w81"
        with pytest.raises(RequestError, match="the prompt"):
            ledger.blame("w80 w81", subject="w9")


def test_blame_reads_a_fact_without_its_subject_at_the_end(opened: Open) -> None:
    with opened(way="locft-bf") as ledger:
        ledger.add([A, EditRequest("w80 w81", "w9", "w7", id="aside"), EditRequest("w82 w83", "w9", id="bare")])
        assert [ledger.blame(prompt)[0].fact.id for prompt in ("w80 w81", "w82 w83")] == ["aside", "bare"]


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


def test_only_training_is_buffered(opened: Open) -> None:
    with pytest.raises(ConfigError, match="buffered is for locft-bf"):
        opened(buffered=True)
    assert issubclass(ConfigError, FastEditError)


def test_a_ledger_is_kept_by_one_process(opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastedit.parallel.world", lambda: 2)
    with pytest.raises(ConfigError, match="without torchrun"):
        opened()
    assert not (tmp_path / "ledger").exists()
