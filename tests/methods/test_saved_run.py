"""A run that was cut off goes on to the same bits; nothing else than this run does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CONTEXTS, moments, random_edits, tiny_model
from torch import Tensor

from fastedit import Editor, EditRequest, FileError
from fastedit.methods import saved_run
from fastedit.methods.saved_run import SavedRun
from fastedit.weights import LowRank

LOCFT: dict[str, Any] = {
    "layer": 1, "lr": 3e-3, "batch_size": 4, "epochs": 3, "stop_loss": 0.0, "module": "down_proj", "published": True,
}  # fmt: skip
SUBJECT = {**LOCFT, "published": False, "tokens": "subject", "preserve": "null-space", "epochs": 6}
SOLVER: dict[str, Any] = {"layers": (1, 2), "contexts": tuple(CONTEXTS), "steps": 4, "unchecked_statistics": True}
RUNS: dict[str, dict[str, Any]] = {
    "published": LOCFT,
    "whole MLPs, skipped batches": {**LOCFT, "family": "gpt2", "module": "mlp", "skip_loss": 4.4},
    "depth-first": {**LOCFT, "schedule": "depth-first"},
    "a rate that falls": {**LOCFT, "lr_schedule": "linear"},
    "masters of bf16": {**LOCFT, "dtype": torch.bfloat16},
    # edits sit out some epochs, and those that stay learned more
    "subject, focus, null space": {**SUBJECT, "focus": 4.0, "epochs": 24},
    "anchors": {**SUBJECT, "tokens": "all", "preserve": "both", "anchors": 2},
    "memit": {**SOLVER, "method": "memit"},
    "memit in batches": {**SOLVER, "method": "memit", "batch_size": 3},
    "memit, given rate": {**SOLVER, "method": "memit", "batch_size": 4, "lr": 0.3},
    "alphaedit in batches": {**SOLVER, "method": "alphaedit", "batch_size": 3},
    "rome": {**SOLVER, "method": "rome", "layers": (1,), "module": "down_proj"},
}


class Crash(BaseException):
    """An exception that no code handles."""


@pytest.fixture
def run(tokenizer: Any, seed: int, tmp_path: Path) -> Callable[..., dict[str, Tensor]]:
    """Makes the edits of a row of `RUNS`; returns the updates, the losses and the targets' probabilities."""

    def edited(edits: list[EditRequest], **options: Any) -> dict[str, Tensor]:
        options = {**options}
        family, dtype = options.pop("family", "llama"), options.pop("dtype", torch.float32)
        statistics_seed = options.pop("statistics_seed", 3)
        model = tiny_model(family, dtype=dtype, seed=1)
        folder = tmp_path / "statistics"
        if options.get("method") or options.get("preserve"):
            moments(model, folder, statistics_seed)
            options["statistics"] = folder
        result = Editor(model, options.pop("tokenizer", tokenizer), **options).edit(edits)
        edited.notes, edited.lr = result.notes, result.delta.metadata["config"]["lr"]  # type: ignore[attr-defined]
        updates = result.delta.updates.items()
        found = {path: update.dense() if isinstance(update, LowRank) else update for path, update in updates}
        curves = {"losses": torch.tensor(result.losses), "learned": torch.tensor(result.learned)}
        return found | curves | {"probability": result.probability}

    return edited


def crashing(after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the run crash right after so many states are written."""
    write, left = SavedRun._write, [after]

    def counted(self: SavedRun, *args: Any) -> bool:
        written = write(self, *args)
        left[0] -= 1
        if left[0] == 0:
            raise Crash
        return written

    monkeypatch.setattr(SavedRun, "_write", counted)


def assert_same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for path, update in wanted.items():
        assert torch.equal(found[path], update), path


@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_a_run_that_crashed_goes_on_to_the_same_bits(
    options: dict[str, Any], run: Any, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastedit.methods.locate_then_edit.method._SAVED_TARGETS", 4)
    edits = random_edits(10, seed)
    states: list[int] = []
    with monkeypatch.context() as patch:
        write = SavedRun._write
        patch.setattr(SavedRun, "_write", lambda self, *args: states.append(1) or write(self, *args))
        wanted = run(edits, **options, state=tmp_path / "whole", save_every=0)
    lr, plain = run.lr, run(edits, **options)
    assert run.lr == pytest.approx(lr, rel=1e-5)  # that of all edits, not of those that are sought together
    if "method" not in options:
        assert_same(plain, wanted)
    for crash in {1, len(states) // 2, len(states) - 1}:
        folder = {"state": tmp_path / f"crash {crash}", "save_every": 0}
        with monkeypatch.context() as patch:
            crashing(crash, patch)
            with pytest.raises(Crash):
                run(edits, **options, **folder)
        assert_same(run(edits, **options, **folder), wanted)
    assert_same(run(edits, **options, **folder), wanted)  # one that is done, too


@pytest.mark.parametrize("fits", [True, False])
def test_less_or_more_free_memory_does_not_change_the_bits(
    fits: bool, run: Any, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether states are kept is decided once: a run that goes on does not decide it again."""
    edits, found = random_edits(10, seed), []
    options = {**SUBJECT, "save_every": 0}

    def free(enough: bool) -> None:
        monkeypatch.setattr("fastedit.models.token_states.free_bytes", lambda _: 10**9 if enough else 0)

    for enough in (fits, not fits):
        free(enough)
        found.append(run(edits, **options, state=tmp_path / f"whole {enough}"))
    assert any(not torch.equal(one, other) for one, other in zip(*(f.values() for f in found), strict=True))
    free(fits)
    folder = {"state": tmp_path / "crash"}
    with monkeypatch.context() as patch:
        crashing(3, patch)
        with pytest.raises(Crash):
            run(edits, **options, **folder)
    free(not fits)
    assert_same(run(edits, **options, **folder), found[0])


@pytest.mark.parametrize("name", ["published", "memit in batches"])
def test_a_damaged_state_is_left_for_the_one_before(name: str, run: Any, seed: int, tmp_path: Path) -> None:
    edits, options = random_edits(10, seed), {**RUNS[name], "state": tmp_path / "run", "save_every": 0}
    wanted = run(edits, **options)
    *_, last = sorted((tmp_path / "run").glob("*.safetensors"))
    content = bytearray(last.read_bytes())
    content[-3] ^= 1
    last.write_bytes(content)
    assert_same(run(edits, **options), wanted)
    assert any("damaged, the one before it is used" in note for note in run.notes)


def test_the_state_of_another_run_is_refused_before_the_work(
    run: Any, tokenizer: Any, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edits, options = random_edits(6, seed), {**LOCFT, "state": tmp_path / "run", "save_every": 0}
    with monkeypatch.context() as patch:
        crashing(2, patch)
        with pytest.raises(Crash):
            run(edits, **options)
    for others, change, named in (
        (edits, {"lr": 1e-3}, "lr was 0.003 and is 0.001"),
        (edits[:-1], {}, "number of edits was 6 and is 5"),
        ([*edits[:-1], EditRequest("w30 w31", "w32")], {}, "edits was '[0-9a-f]+' and is"),
        (edits, {"dtype": torch.bfloat16}, "dtype was"),
    ):
        with pytest.raises(FileError, match=f"state of another run.*{named}"):
            run(others, **options | change)
    in_chat = {**options, "state": tmp_path / "chat", "chat_template": True}
    monkeypatch.setattr(tokenizer, "chat_template", "{% for m in messages %}{{ m.content + ' ' }}{% endfor %}")
    with monkeypatch.context() as patch:
        crashing(2, patch)
        with pytest.raises(Crash):
            run(edits, **in_chat)
    monkeypatch.setattr(tokenizer, "chat_template", "{% for m in messages %}{{ 'w9 ' + m.content + ' ' }}{% endfor %}")
    with pytest.raises(FileError, match=r"state of another run.*: chat_template was '[0-9a-f]+' and is '"):
        run(edits, **in_chat)
    other = deepcopy(tokenizer)
    other.add_tokens(["w1w1"])
    with pytest.raises(FileError, match=r"tokenizer was '[0-9a-f]+' and is"):
        run(edits, **options, tokenizer=other)
    memit = {**RUNS["memit in batches"], "state": tmp_path / "solver", "save_every": 0}
    with monkeypatch.context() as patch:
        crashing(2, patch)
        with pytest.raises(Crash):
            run(edits, **memit)
    with pytest.raises(FileError, match="second moments was"):
        run(edits, **memit, statistics_seed=4)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        with pytest.raises(FileError, match="threads was"):
            run(edits, **options)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ["published", "memit in batches"])
def test_a_full_disk_costs_the_state_but_not_the_edit(
    name: str, run: Any, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edits, options = random_edits(6, seed), {**RUNS[name], "save_every": 0}
    wanted = run(edits, **options, state=tmp_path / "whole")

    def full(path: Path, *args: Any) -> None:
        raise FileError(path, "No space left on device")

    monkeypatch.setattr(saved_run, "save_tensors", full)
    assert_same(run(edits, **options, state=tmp_path / "run"), wanted)
    assert (
        [note for note in run.notes if "No space left" in note]
        == [note for note in run.notes if note.startswith("after a crash this run could not go on")]
        != []
    )


@pytest.mark.parametrize("name", ["published", "memit in batches"])
def test_the_state_of_a_run_that_is_done_gives_way_to_the_next_edit(
    name: str, run: Any, seed: int, tmp_path: Path
) -> None:
    options = {**RUNS[name], "save_every": 0}
    first, second = random_edits(6, seed), random_edits(8, seed + 1)
    wanted = run(second, **options)
    run(first, **options, state=tmp_path / "run")
    assert_same(run(second, **options, state=tmp_path / "run"), wanted)
    assert not run.notes or not any("damaged" in note for note in run.notes)


def test_a_plan_that_is_not_run_leaves_the_state_of_another_run(tmp_path: Path) -> None:
    done = SavedRun(tmp_path / "run", {"lr": 1}, 0)
    done.replace({"w": torch.ones(1)}, {})
    done.finish()
    next_run = SavedRun(tmp_path / "run", {"lr": 2}, 0)
    assert next_run.newest() is None
    again = SavedRun(tmp_path / "run", {"lr": 1}, 0)
    assert again.newest() is not None
    next_run.replace({"w": torch.zeros(1)}, {})
    assert [path.name for path in sorted((tmp_path / "run").glob("*.safetensors"))] == ["00000001.safetensors"]
    assert SavedRun(tmp_path / "run", {"lr": 2}, 0).newest() is not None


def test_a_run_does_not_go_on_from_the_state_of_one_that_was_begun_after_its_plan(tmp_path: Path) -> None:
    mine, other = SavedRun(tmp_path / "run", {"lr": 1}, 0), SavedRun(tmp_path / "run", {"lr": 2}, 0)
    other.replace({"w": torch.ones(1)}, {})
    with pytest.raises(FileError, match="by now holds the state of another run"):
        mine.newest()


def test_what_else_a_user_keeps_in_the_folder_is_left_alone(run: Any, seed: int, tmp_path: Path) -> None:
    (tmp_path / "mine" / "deep").mkdir(parents=True)
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(FileError, match=r"mine is to hold the state of a run alone, but has deep, thesis\.txt; give"):
        run(random_edits(4, seed), **LOCFT, state=tmp_path / "mine")
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == ["deep", "thesis.txt"]
