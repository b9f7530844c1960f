"""`export`, `apply`, `revert` and `diff`: what they write, say and refuse."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from calling import call, fails, works
from helpers import tiny_model
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

from fastedit import Editor, ModelError, WeightDelta
from fastedit.tensorfile import checksums
from fastedit.undo import subtracted

RECORDS = [
    {"prompt": f"w{10 + i} w{20 + i} w{30 + i}", "target": f"w{40 + i}", "paraphrases": [f"w9 w{20 + i} w{30 + i}"]}
    for i in range(3)
]
FLAGS = ("--layers", 1, "--lr", 0.02, "--epochs", 15, "--batch-size", 3, "--no-evaluate")


@pytest.fixture(scope="module")
def work(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in bf16 and an edit of it, as `fastedit edit` writes it."""
    work = tmp_path_factory.mktemp("deltas")
    Editor(tiny_model("llama", dtype=torch.bfloat16), tokenizer).save_model(work / "model")
    Editor(tiny_model("llama", seed=1), tokenizer).save_model(work / "other")
    (work / "facts.json").write_text(json.dumps(RECORDS))
    (work / "text.txt").write_text("w9 w10 w11 w12")
    works("edit", "--model", work / "model", "--requests", work / "facts.json", "--output", work / "edited", *FLAGS)
    return work


@pytest.fixture(scope="module")
def twice(work: Path) -> Path:
    """The edited checkpoint, edited once more: the same matrix."""
    (work / "more.json").write_text(json.dumps([record | {"target": "w50"} for record in RECORDS]))
    works("edit", "--model", work / "edited", "--requests", work / "more.json", "--output", work / "twice", *FLAGS)
    return work / "twice"


def same_weights(one: Path, other: Path) -> bool:
    a, b = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_an_edited_checkpoint_is_reverted_bit_for_bit_or_not_at_all(work: Path, tmp_path: Path) -> None:
    delta, undo = work / "edited" / "delta.safetensors", work / "edited" / "delta.undo"
    assert "bit for bit" in works("revert", delta, "--model", work / "edited", "--output", tmp_path / "back").stdout
    assert same_weights(tmp_path / "back", work / "model")
    assert {p.name for p in (tmp_path / "back").iterdir()} == {p.name for p in (work / "model").iterdir()}

    assert not works("apply", delta, "--model", tmp_path / "back", "--output", tmp_path / "again").stderr
    assert same_weights(tmp_path / "again", work / "edited")
    works("revert", delta, "--model", tmp_path / "again", "--output", tmp_path / "back")
    assert same_weights(tmp_path / "back", work / "model")

    (tmp_path / "again" / "delta.undo").unlink()
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes(delta.read_bytes())
    common = ("revert", alone, "--model", tmp_path / "again", "--output", tmp_path / "near")
    assert "--approximate" in fails(2, *common)
    assert not (tmp_path / "near").exists()
    assert "not checked to the bit" in works(*common, "--approximate").stdout
    works(*common, "--undo", undo)
    assert same_weights(tmp_path / "near", work / "model")


def test_the_difference_of_two_checkpoints_is_a_delta(work: Path, tmp_path: Path) -> None:
    model, edited, delta = work / "model", work / "edited", tmp_path / "found.safetensors"
    told = works("diff", model, edited, "--output", delta).stdout
    paths = WeightDelta.load(work / "edited" / "delta.safetensors").updates.keys()
    assert f"{len(paths)} of 39 parameters differ" in told
    assert all(path in told for path in paths)
    works("apply", delta, "--model", model, "--output", tmp_path / "again")
    assert "0 of 39 parameters differ" in works("diff", edited, tmp_path / "again").stdout
    works("revert", delta, "--model", edited, "--output", tmp_path / "back")
    assert same_weights(tmp_path / "back", model)


def test_the_undo_file_of_a_checkpoint_counts_before_that_of_the_difference(work: Path, tmp_path: Path) -> None:
    """The difference was taken of a checkpoint in fp32, and applied to one in bf16."""
    delta = tmp_path / "d.safetensors"
    works("diff", work / "model", work / "other", "--output", delta)
    works("apply", delta, "--model", work / "model", "--output", tmp_path / "applied")
    for edited in (tmp_path / "applied", work / "other"):
        works("revert", delta, "--model", edited, "--output", tmp_path / "back")
        assert same_weights(tmp_path / "back", work / "model")


def with_weight(folder: Path, value: float | None, new: Path, dtype: torch.dtype) -> Path:
    """A copy of a checkpoint, with a value for the first weight in the last norm."""
    shutil.copytree(folder, new)
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(new / "model.safetensors").items()}
    if value is not None:
        tensors["model.norm.weight"][0] = value
    save_file(tensors, new / "model.safetensors", {"format": "pt"})
    return new


# the first weight in the last norm of B, B's dtype -> what is told, why there is no delta of it
NO_DELTA: dict[str, tuple[float | None, torch.dtype, str, str]] = {
    "equal": (None, torch.bfloat16, "0 of 39 parameters differ", "have the same weights"),
    "another dtype": (None, torch.float32, "39 parameters have another dtype", "have the same weights"),
    "a NaN": (float("nan"), torch.bfloat16, "1 not finite", "NaN or infinite, which no delta can add: model.norm"),
}


@pytest.mark.parametrize("case", NO_DELTA)
def test_a_difference_that_is_no_delta_is_told_and_not_written(case: str, work: Path, tmp_path: Path) -> None:
    value, dtype, told, why = NO_DELTA[case]
    other, output = with_weight(work / "model", value, tmp_path / "b", dtype), tmp_path / "d.safetensors"
    assert told in works("diff", work / "model", other).stdout
    output.write_bytes(b"stale")
    result = call("diff", work / "model", other, "--output", output)
    assert result.exit_code == 1
    assert told in result.stdout
    assert why in result.stderr
    assert result.stderr.endswith(f"no delta was written; what is in {output} is older\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "d.safetensors"]


def test_a_stack_of_matrices_has_no_rank(tmp_path: Path) -> None:
    model = tiny_model("llama4_text")
    model.save_pretrained(tmp_path / "a")
    experts, head = "model.layers.0.feed_forward.experts.down_proj", "lm_head.weight"
    for path in (experts, head):
        model.get_parameter(path).data += 1
    model.save_pretrained(tmp_path / "b")
    lines = {
        line.split()[0]: line.split() for line in works("diff", tmp_path / "a", tmp_path / "b").stdout.split("\n")[3:5]
    }
    assert lines[head][-1] == "1"
    assert len(lines[experts]) == len(lines[head]) - 1


# where it is cut off, by what -> the command, and what is written by then
ADAPTER = "export {1}/edited/delta.safetensors --peft {0}/adapter --rank 2 --requests {1}/facts.json --model {1}/model"
DIFFERENCE = "diff {1}/model {1}/edited --output {0}/d.safetensors"
ASKED = "--model {1}/model --requests {1}/facts.json"
CUT: dict[tuple[str, str], tuple[str, list[str]]] = {
    ("cli.arguments.measure", "interrupted"): (ADAPTER, ["adapter"]),
    ("cli.arguments.measure", "it broke"): (ADAPTER, ["adapter"]),
    ("undo.Undo.keep", "interrupted"): (DIFFERENCE, ["d.safetensors"]),
    ("undo.Undo.save", "it broke"): (DIFFERENCE, ["d.safetensors"]),
    ("cli.evaluate.show", "interrupted"): (f"evaluate {ASKED} --json {{0}}/e.json", ["e.json"]),
    ("cli.tune.show", "interrupted"): (
        f"tune {ASKED} --text {{1}}/text.txt --trials 1 --sample 1 --epochs 1 --output {{0}}",
        ["config.json", "report.json"],
    ),
}


@pytest.mark.parametrize(("place", "why"), CUT)
def test_what_is_written_when_a_command_is_cut_off_is_told(
    place: str, why: str, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt if why == "interrupted" else ModelError(why)

    command, left = CUT[place, why]
    monkeypatch.setattr(f"fastedit.{place}", cut)
    result = call(*(word.format(tmp_path, work) for word in command.split()))
    assert result.exit_code == 1, result.stderr
    there = ", ".join(str(tmp_path / name) for name in left)
    assert result.stderr.splitlines()[-1] == f"fastedit: {why}; written before that: {there}"
    assert {path.name for path in tmp_path.iterdir()} - {"trials.jsonl"} == {*left}


def test_deltas_of_two_models_are_not_put_together(work: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs.safetensors"
    works("diff", work / "other", work / "edited", "--output", theirs)  # of another dtype, too
    works("revert", theirs, "--model", work / "edited", "--output", tmp_path / "back")
    assert same_weights(tmp_path / "back", work / "other")
    delta = work / "edited" / "delta.safetensors"
    wrong = fails(2, "apply", delta, theirs, "--model", work / "model", "--output", tmp_path / "new")
    first, second = (WeightDelta.load(path).metadata["fingerprint"] for path in (delta, theirs))
    assert f"fingerprint is {first}" in wrong
    assert f"delta 2 was made for {second}" in wrong
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "command",
    ["apply DELTA --output NEW", "revert DELTA --output NEW", "export DELTA --peft NEW", "export DELTA --merge NEW"],
)
def test_the_folder_of_a_delta_is_told_from_its_file(command: str, work: Path, tmp_path: Path) -> None:
    names = {"DELTA": work / "edited", "NEW": tmp_path / "new"}
    given = [names.get(word, word) for word in command.split()]
    said = fails(2, *given, "--model", work / "model")
    assert f"{work / 'edited'} is a folder; give its file, such as {work / 'edited' / 'delta.safetensors'}" in said
    assert not (tmp_path / "new").exists()


def test_a_delta_is_not_put_on_twice(work: Path, tmp_path: Path) -> None:
    delta, copy = work / "edited" / "delta.safetensors", tmp_path / "copy.safetensors"
    copy.write_bytes(delta.read_bytes())
    wrong = fails(2, "apply", delta, delta, copy, "--model", work / "model", "--output", tmp_path / "new")
    assert f"2 of the 3 deltas repeat others: delta 2 ({delta}) is delta 1 ({delta}), delta 3 ({copy}) is" in wrong
    assert not (tmp_path / "new").exists()


def undo_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.undo")}


@pytest.mark.parametrize("way", ["edit", "apply"])
def test_an_edit_below_another_keeps_its_undo_file(way: str, work: Path, twice: Path, tmp_path: Path) -> None:
    first, top = work / "edited", twice
    if way == "apply":
        top = tmp_path / "top"
        works("apply", twice / "delta.safetensors", "--model", first, "--output", top)
    assert undo_files(top).keys() == {"delta.undo", "delta-1.undo"}
    works("revert", twice / "delta.safetensors", "--model", top, "--output", tmp_path / "back")
    assert same_weights(tmp_path / "back", first)
    assert undo_files(tmp_path / "back") == undo_files(first)
    alone = tmp_path / "first.safetensors"  # no undo file beside it
    alone.write_bytes((first / "delta.safetensors").read_bytes())
    works("revert", alone, "--model", tmp_path / "back", "--output", tmp_path / "before")
    assert same_weights(tmp_path / "before", work / "model")
    assert not undo_files(tmp_path / "before")


def test_an_edit_below_another_is_subtracted_from_both(work: Path, twice: Path, tmp_path: Path) -> None:
    delta, near = work / "edited" / "delta.safetensors", tmp_path / "near"
    common = ("revert", delta, "--model", twice, "--output", near)
    assert "they were changed after these edits" in fails(2, *common)
    assert "subtracted; not checked to the bit" in works(*common, "--approximate").stdout
    held, found = (load_file(folder / "model.safetensors") for folder in (twice, near))
    for path, update in WeightDelta.load(delta).updates.items():
        assert torch.equal(found[path], subtracted(held[path], update))


def test_edits_on_one_another_are_reverted_in_any_order(work: Path, twice: Path, tmp_path: Path) -> None:
    deltas = [work / "edited" / "delta.safetensors", twice / "delta.safetensors"]
    works("apply", *deltas, "--model", work / "model", "--output", tmp_path / "both")
    for order in (deltas, deltas[::-1]):
        works("revert", *order, "--model", tmp_path / "both", "--output", tmp_path / "back")
        assert same_weights(tmp_path / "back", work / "model")


def written_anew(tensors: dict[str, torch.Tensor], about: dict[str, Any], **notes: Any) -> bytes:
    """The file of these tensors, with checksums that are right."""
    header = {"format": "fastedit-undo-1", "checksums": json.dumps(checksums(tensors))}
    return save(tensors, header | {"fastedit": json.dumps(about | notes)})


# tensors and notes of an undo file -> the damaged one, and what is said of it
DAMAGED: dict[str, tuple[Callable[[dict[str, torch.Tensor], dict[str, Any]], bytes], str]] = {
    "no safetensors": (lambda *_: b"12345678", "not a readable"),
    "cut off": (lambda *given: written_anew(*given)[:-1], "not a readable"),
    "notes that are a list": (lambda *given: written_anew(*given, originals=[1]), "its notes are not those of an edit"),
    "no notes": (lambda *given: written_anew(*given, edit=None), "its notes are not those of an edit"),
    "nothing kept": (lambda _, about: written_anew({}, about), "1 parameters are not as noted: model.layers.1"),
    "less kept": (
        lambda tensors, about: written_anew({name: value[:1] for name, value in tensors.items()}, about),
        "1 parameters are not as noted: model.layers.1",
    ),
    "weights at no place": (
        lambda tensors, about: written_anew({name: value[:, 0].clone() for name, value in tensors.items()}
        | {name.replace("..was", "..at"): torch.zeros(2) for name in tensors}, about),
        "1 parameters are not as noted",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGED)
def test_an_undo_file_that_is_damaged_is_left_out(kind: str, work: Path, tmp_path: Path) -> None:
    delta, held = work / "edited" / "delta.safetensors", tmp_path / "held"
    shutil.copytree(work / "edited", held)
    damaged, said = DAMAGED[kind]
    with safe_open(held / "delta.undo", "pt") as file:
        about = json.loads(file.metadata()["fastedit"])
    (held / "delta.undo").write_bytes(damaged(load_file(held / "delta.undo"), about))
    common = ("revert", delta, "--model", held, "--output", tmp_path / "back")
    told = works(*common).stderr  # the one beside the delta is whole
    assert f"{held / 'delta.undo'}: " in told
    assert said in told
    assert same_weights(tmp_path / "back", work / "model")
    assert said in fails(2, *common, "--undo", held / "delta.undo")
    alone = ("revert", held / "delta.safetensors", *common[2:])
    assert "no undo file of these deltas" in fails(2, *alone)
    assert "subtracted" in works(*alone, "--approximate", "--undo", held / "delta.undo").stdout


def test_a_delta_is_exported(work: Path, twice: Path, tmp_path: Path) -> None:
    delta, model = work / "edited" / "delta.safetensors", ("--model", work / "model")
    works("export", delta, "--dense", tmp_path / "updates.safetensors")
    updates = WeightDelta.load(delta).updates
    for name, tensor in load_file(tmp_path / "updates.safetensors").items():
        assert torch.equal(tensor, updates[name])
    works("export", delta, "--merge", tmp_path / "merged", *model)
    assert same_weights(tmp_path / "merged", work / "edited")
    merge = ("export", twice / "delta.safetensors", "--merge", tmp_path / "merged", "--model", work / "edited")
    assert f"the undo files of earlier edits stay in {work / 'edited'}" in works(*merge).stderr

    adapter = ("export", delta, "--peft", tmp_path / "adapter", *model)
    assert "give the rank" in fails(2, *adapter)
    told = works(*adapter, "--rank", 2, "--requests", work / "facts.json").stdout
    assert "rank 2 was written" in told
    assert "--max-lora-rank 8" in told
    assert "reliability lost by the adapter:" in told
    assert {p.name for p in (tmp_path / "adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


@pytest.mark.parametrize("command", ["export", "edit"])
def test_a_checkpoint_is_not_replaced_by_less(command: str, work: Path) -> None:
    """Refused before the model is loaded."""
    output, model = work / "other", ("--model", work / "no such model")
    before = {path: path.read_bytes() for path in output.iterdir()}
    given: dict[str, tuple[Any, ...]] = {
        "export": (work / "edited" / "delta.safetensors", "--peft", output, "--rank", 2),
        "edit": ("--requests", work / "facts.json", "--output", output, "--delta-only"),
    }
    wrong = fails(2, command, *given[command], *model)
    assert f"{output} is a checkpoint, which is not replaced by this; give a new folder" in wrong
    assert {path: path.read_bytes() for path in output.iterdir()} == before


WRONG: dict[str, tuple[tuple[str, ...], str]] = {
    "no way": ((), "expected one of --peft, --merge and --dense, got none"),
    "two ways": (("--peft", "{new}", "--dense", "{new}"), "got --peft and --dense"),
    "no model": (("--peft", "{new}"), "--peft needs --model"),
    "a rank for nothing": (("--dense", "{new}", "--rank", "4"), "--rank belong to --peft"),
    "a model for nothing": (
        ("--dense", "{new}", "--model", "/nowhere", "--device", "cuda:7"),
        "--model and --device belong to --peft and --merge; --dense reads the delta alone",
    ),
    "a dtype for nothing": (("--dense", "{new}", "--dtype", "float16"), "--dtype belong to --peft and --merge"),
    "another base": (("--peft", "{new}", "--rank", "4", "--model", "{other}"), "was made for a model with fingerprint"),
    "over its input": (("--dense", "{delta}"), "is the input of --delta"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_exported_is_refused_before_the_work(case: str, work: Path, tmp_path: Path) -> None:
    flags, message = WRONG[case]
    delta = work / "edited" / "delta.safetensors"
    places = {"new": tmp_path / "new", "other": work / "other", "delta": delta}
    before = delta.read_bytes()
    assert message in fails(2, "export", delta, *(flag.format(**places) for flag in flags))
    assert not list(tmp_path.iterdir())
    assert delta.read_bytes() == before
