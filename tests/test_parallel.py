"""Several processes that make one edit: the same as one, written once, and failing together."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CONTEXTS, in_fp64, moments, random_edits, same, tiny_model, values
from torch import Tensor

from fastedit import EditError, Editor, EditRequest, parallel
from fastedit.methods.saved_run import SavedRun
from fastedit.weights import LowRank

LOCFT: dict[str, Any] = {
    "layer": 1, "lr": 3e-3, "batch_size": 5, "epochs": 3, "stop_loss": 0.0, "module": "down_proj", "published": True,
}  # fmt: skip
SOLVER: dict[str, Any] = {"layers": (1, 2), "contexts": tuple(CONTEXTS), "steps": 4, "unchecked_statistics": True}
RUNS: dict[str, dict[str, Any]] = {
    "published": LOCFT,
    "batches of fewer than the processes": {**LOCFT, "batch_size": 1},
    "whole MLPs, whose biases are summed": {**LOCFT, "family": "gpt2", "module": "mlp", "skip_loss": 4.4},
    "sums in fp64": {**LOCFT, "dtype": torch.float64},
    "depth-first": {**LOCFT, "schedule": "depth-first"},
    "anchors, focus": {
        **LOCFT, "published": False, "tokens": "subject", "preserve": "both", "anchors": 2, "focus": 5.0,
    },
    "rome": {**SOLVER, "method": "rome", "layers": (1,), "module": "down_proj"},
    "memit": {**SOLVER, "method": "memit"},
    "emmet": {**SOLVER, "method": "emmet", "layers": (1,)},
    "alphaedit in batches": {**SOLVER, "method": "alphaedit", "batch_size": 4},
}  # fmt: skip
IN_FOUR = ["published", "memit"]


def editor_of(tokenizer: Any, folder: Path, options: dict[str, Any]) -> Editor:
    options = {"family": "llama", "dtype": torch.float32, **options}
    model = tiny_model(options.pop("family"), dtype=options.pop("dtype"), seed=1)
    if options.get("method") or options.get("preserve"):
        if parallel.first() and not (folder / "statistics").exists():
            moments(model, folder / "statistics", 3)
        parallel.gathered(None)
        options["statistics"] = folder / "statistics"
    return Editor(model, tokenizer, **options)


def outcome(editor: Editor, edits: Any) -> dict[str, Any]:
    result = editor.edit(edits)
    updates = result.delta.updates.items()
    found: dict[str, Any] = {
        path: (update.dense() if isinstance(update, LowRank) else update).cpu() for path, update in updates
    }
    return found | {"losses": torch.tensor(result.losses), "probability": result.probability, "notes": result.notes}


def measured(editor: Editor, edits: Any) -> Any:
    return editor.evaluate(edits, text=["w1 w2 w3 . The w4", "w5 w6"]).to_dict()


def edited(names: Sequence[str], tokenizer: Any, folder: Path, seed: int) -> dict[str, Any]:
    edits = random_edits(9, seed)
    found: dict[str, Any] = {}
    for name in names:
        with in_fp64() if name == "sums in fp64" else nullcontext():
            editor = editor_of(tokenizer, folder, RUNS[name])
            found[name] = outcome(editor, edits)
        if name == "memit":
            measures = editor.evaluate(edits, text=["w1 w2 w3 . The w4", "w5 w6"]).to_dict()
            found["measures"] = {
                path: torch.tensor(float(x)) for path, x in flat(measures) if isinstance(x, int | float)
            }
    return found


def flat(values: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, x in values.items():
        yield from flat(x, f"{path} {name}") if isinstance(x, dict) else [(f"{path} {name}", x)]


def _begin(rank: int, port: int, world: int, folder: Path, work: Callable[..., Any], *args: Any) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=world, rank=rank)
    torch.save(work(*args), folder / f"of-{rank}-{world}")
    torch.distributed.destroy_process_group()


def in_processes(world: int, folder: Path, work: Callable[..., Any], *args: Any) -> list[Any]:
    """The results of `work` in each of the processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = (port, world, folder, work, *args)  # spawned ones would import everything anew
    torch.multiprocessing.start_processes(_begin, given, nprocs=world, start_method="fork")
    return [torch.load(folder / f"of-{rank}-{world}", weights_only=False) for rank in range(world)]


@pytest.fixture(scope="module")
def by_world(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """Of each number of processes, what each of them found."""
    folder, seed = tmp_path_factory.mktemp("parallel"), 5
    found = {1: [edited([*RUNS], tokenizer, folder, seed)]}
    for world, names in {2: [*RUNS], 4: IN_FOUR}.items():
        found[world] = in_processes(world, folder, edited, names, tokenizer, folder, seed)
    return found


def assert_close(found: dict[str, Any], wanted: dict[str, Any], relative: float = 1e-5) -> None:
    assert found.keys() == wanted.keys()
    for name, x in wanted.items():
        if isinstance(x, Tensor):
            assert float((found[name] - x).double().norm() / x.double().norm().clamp(min=1e-9)) < relative, name


@pytest.mark.parametrize(
    ("world", "name"), [*((2, name) for name in [*RUNS, "measures"]), *((4, name) for name in [*IN_FOUR, "measures"])]
)
def test_several_processes_find_what_one_does(world: int, name: str, by_world: Any) -> None:
    wanted = by_world[1][0][name]
    for found in by_world[world]:
        assert_close(found[name], wanted, 1e-12 if name == "sums in fp64" else 1e-5)
        for path, x in found[name].items():  # no process goes its own way
            assert not isinstance(x, Tensor) or torch.equal(x, by_world[world][0][name][path])


class Crash(BaseException):
    """An exception that no code handles."""


def _crash_after(n: int) -> None:
    """Let the run of this process crash right after it has written so many states."""
    write, left = SavedRun._write, [n]

    def counted(self: SavedRun, *args: Any) -> bool:
        written = write(self, *args)
        left[0] -= parallel.first()
        if left[0] == 0:
            SavedRun._write = write  # type: ignore[method-assign]
            raise Crash
        return written

    SavedRun._write = counted  # type: ignore[method-assign]


def cut_off(names: Sequence[str], tokenizer: Any, folder: Path, seed: int) -> list[str]:
    for name in names:
        _crash_after(3)
        editor = editor_of(tokenizer, folder, {**RUNS[name], "state": str(folder / name), "save_every": 0.0})
        with pytest.raises(Crash):
            editor.edit(random_edits(9, seed))
    return []


def gone_on(names: Sequence[str], tokenizer: Any, folder: Path, seed: int) -> dict[str, Any]:
    found = {}
    for name in names:
        editor = editor_of(tokenizer, folder, {**RUNS[name], "state": str(folder / name), "save_every": 1e6})
        found[name] = outcome(editor, random_edits(9, seed))
    return found


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 4)])
def test_a_run_goes_on_in_another_number_of_processes(
    before: int, after: int, tokenizer: Any, by_world: Any, tmp_path: Path
) -> None:
    names = ["published", "alphaedit in batches"]
    found = []
    for world, work in ((before, cut_off), (after, gone_on)):
        given = (names, tokenizer, tmp_path, 5)
        found = [work(*given)] if world == 1 else in_processes(world, tmp_path, work, *given)
    for name in names:
        for each in found:
            assert_close(each[name], by_world[1][0][name])
        note = f"the run was begun by {before} processes and goes on in {after}: the same edit, but not to the bit"
        assert note in found[0][name]["notes"]


def failing(tokenizer: Any, folder: Path, seed: int) -> dict[str, Any]:
    """How each of several edits failed, if this is the process that fails or another one; and the model then."""
    edits, found, last = random_edits(9, seed), {}, parallel.rank() == 1
    broken = [EditRequest("w1", "w2", "w3", id="bad"), *edits]
    for name, (options, where, of) in FAILURES.items():
        with pytest.MonkeyPatch.context() as patch:
            editor = editor_of(tokenizer, folder, options)
            before = values(editor.model)
            if where and last:
                patch.setattr(where, raising(RuntimeError("no memory")))
            with pytest.raises(Exception) as caught:  # which one is compared
                editor.edit(broken if of == "bad" else edits)
            found[name] = f"{type(caught.value).__name__}: {caught.value}", same(editor.model, before)
    torch.distributed.barrier()
    if last:  # a process that ends
        torch.save(found, folder / "of-1-2")
        os._exit(0)
    with pytest.raises(EditError) as lost:
        parallel.gathered(0)
    return found | {"lost": str(lost.value)}


def raising(error: Exception) -> Callable[..., Any]:
    def function(*_: Any, **__: Any) -> Any:
        raise error

    return function


# options, what fails in the second process alone, the edits
FAILURES: dict[str, tuple[dict[str, Any], str, str]] = {
    "training": (LOCFT, "fastedit.methods.locft_bf.passes.Passes.run", ""),
    "what comes after it": (LOCFT, "fastedit.editor.WeightDelta", ""),
    "targets": (RUNS["memit"], "fastedit.methods.locate_then_edit.method.find_targets", ""),
    "writing": (RUNS["memit"], "fastedit.methods.locate_then_edit.write.Writer._write", ""),
    "a plan": (RUNS["memit"], "fastedit.editor.prompt_notes", ""),
    "a loss that diverges": ({**LOCFT, "lr": 1e38}, "", ""),
    "edits that are refused": (RUNS["memit"], "", "bad"),
}


@pytest.fixture(scope="module")
def failures(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("failing")
    return in_processes(2, folder, failing, tokenizer, folder, 5)


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_in_one_process_is_the_same_in_all_and_leaves_the_models_alone(name: str, failures: Any) -> None:
    wanted = "RuntimeError: no memory" if FAILURES[name][1] else failures[0][name][0]
    assert wanted.split(":")[0] in ("RuntimeError", "EditError", "RequestError")
    for found in failures:
        assert found[name] == (wanted, True)


def test_a_process_that_ends_is_an_error_of_the_others(failures: Any) -> None:
    assert failures[0]["lost"].startswith("process 0 of 2 lost the others: one of them ended")
