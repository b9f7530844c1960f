"""Commands that fail at their work: what is left of the edit, and what is said."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from calling import call, fails, works
from capitals import BRIEFLY, RECORDS, weights, write
from helpers import files_of_at_most
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaForCausalLM

from fastedit import EditError, Editor, WeightDelta
from fastedit.cli import arguments


def test_a_loss_that_is_not_finite(model: Path, facts: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    common = ("edit", "--model", model, "--requests", facts, "--output", output, "--lr", "1e38")
    said = fails(1, *common)
    assert "not finite" in said
    assert "epoch 1, batch " in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["facts.json"]


@pytest.mark.parametrize(("flags", "code"), [([], 2), (["--delta-only"], 1)])
@pytest.mark.parametrize("existing", [False, True])
def test_a_disk_that_fills_up(
    model: Path, spoiled: Path, facts: Path, tmp_path: Path, flags: list[str], code: int, existing: bool
) -> None:
    """The parts of a checkpoint that are not weights are tried before the work; of a delta only the work tells."""
    output = spoiled if existing else tmp_path / "out"
    if existing and flags:  # which replaces no checkpoint
        shutil.rmtree(output)
        output.mkdir()
        for name in ("delta.safetensors", "report.json"):
            (output / name).touch()
    before = sorted(tmp_path.rglob("*"))
    common = ("edit", "--model", model, "--requests", facts, "--output", output, *BRIEFLY, "--no-evaluate")
    with files_of_at_most(4096):
        said = fails(code, *common, *flags)
    assert "could not be saved" in said
    assert code == 2 or said.endswith("; nothing was written")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("file", ["report.json", "figures.json"])
def test_a_disk_that_is_full(
    model: Path, facts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    def full(self: Path, *args: Any, **kwargs: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))

    monkeypatch.setattr(Path, "write_text", full)
    edit = ("edit", "--output", tmp_path / "out", "--no-evaluate", *BRIEFLY)
    command = edit if file == "report.json" else ("evaluate", "--json", tmp_path / file)
    result = call(*command, "--model", model, "--requests", facts)
    assert result.exit_code == 1
    assert "No space left on device" in result.stderr
    if file == "report.json":  # the delta had room
        assert f"{tmp_path / 'out'} holds delta.safetensors, but" in result.stderr
        assert [p.name for p in (tmp_path / "out").iterdir()] == ["delta.safetensors"]
    assert {p.name for p in tmp_path.iterdir()} <= {"facts.json", "out"}


def raises(error: BaseException) -> Any:
    def function(*_: Any, **__: Any) -> None:
        raise error

    return function


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
REFUSAL = ValueError("GenerationConfig is invalid: \n- `temperature`: `do_sample` is not set to `True`.")
# what fails after the edit: where, with what, and what is said
LATE: dict[str, tuple[str, BaseException, str]] = {
    "disk full at the checkpoint": ("weights", FULL, "could not be saved: [Errno 28] No space left on device; "),
    "checkpoint refused": ("weights", REFUSAL, "could not be saved: GenerationConfig is invalid: - `temperature`"),
    "Ctrl-C at the checkpoint": ("weights", KeyboardInterrupt(), "interrupted; "),
    "measuring fails": ("after", EditError("the logits of request 1 are NaN"), "are NaN; "),
    "no memory for measuring": ("after", RuntimeError("CUDA out of memory"), "CUDA out of memory; "),
    "Ctrl-C at measuring": ("after", KeyboardInterrupt(), "interrupted; "),
    "report fails": ("compare", ZeroDivisionError("division by zero"), "division by zero; "),
}


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The weights of an edit that nothing disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    common = ("edit", "--model", model, "--requests", write(folder / "facts.json", RECORDS), "--no-evaluate")
    works(*common, *BRIEFLY, "--output", folder / "out")
    return weights(folder / "out")


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("kind", LATE)
def test_what_fails_after_the_edit_does_not_lose_it(
    model: Path,
    spoiled: Path,
    facts: Path,
    whole: dict[str, torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    existing: bool,
) -> None:
    """Delta and report are in the folder that is named, an older checkpoint stays, and the delta is the edit."""
    where, error, message = LATE[kind]
    output = spoiled if existing else tmp_path / "out"
    place = tmp_path / "spoiled.delta" if existing else output
    before = {path.name: path.read_bytes() for path in spoiled.iterdir()}
    plain, measure = LlamaForCausalLM.save_pretrained, arguments.measure

    def save_weights(self: Any, folder: Any, **how: Any) -> None:
        if Path(folder).name == "new":  # not the trial before the edit
            raise error
        plain(self, folder, **how)

    def measured(*args: Any, **how: Any) -> Any:
        if args[-1] == "after":
            raise error
        return measure(*args, **how)

    patches: dict[str, tuple[Any, ...]] = {
        "weights": (LlamaForCausalLM, "save_pretrained", save_weights),
        "after": (arguments, "measure", measured),
        "compare": ("fastedit.evaluation.report.compare", raises(error)),
    }
    with monkeypatch.context() as patch:
        patch.setattr(*patches[where])
        common = ("edit", "--model", model, "--requests", facts, *BRIEFLY)
        said = fails(1, *common, "--output", output)
    assert message in said
    assert f"the edit is not lost: {place} holds delta.safetensors and report.json, but no checkpoint" in said
    assert {path.name: path.read_bytes() for path in spoiled.iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"facts.json", "spoiled", place.name}
    assert sorted(path.name for path in place.iterdir()) == ["delta.safetensors", "report.html", "report.json"]
    report = json.loads((place / "report.json").read_text())
    assert report["edit"]["edits"] == 4
    assert ("reliability" in report) is (where == "weights")

    network = AutoModelForCausalLM.from_pretrained(model)
    WeightDelta.load(place / "delta.safetensors").apply(network)
    assert all(torch.equal(value, whole[name]) for name, value in network.state_dict().items())


def test_a_kept_edit_is_not_overwritten_by_the_next_one(
    model: Path, spoiled: Path, facts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ("edit", "--model", model, "--requests", facts, *BRIEFLY, "--no-evaluate", "--output", spoiled)
    with monkeypatch.context() as patch:
        patch.setattr("fastedit.saving.write_checkpoint", raises(FULL))
        for place in ("spoiled.delta", "spoiled.delta-2"):
            assert f"{tmp_path / place} holds " in fails(1, *common)
    works(*common)
    assert {path.name for path in tmp_path.iterdir()} == {
        "facts.json",
        "spoiled",
        "spoiled.delta",
        "spoiled.delta-2",
    }


def test_a_model_that_cannot_be_saved_is_told_before_the_work(
    model: Path, facts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As transformers 4.56 refuses settings of generation that it has read itself."""
    monkeypatch.setattr(GenerationConfig, "save_pretrained", raises(REFUSAL))
    common = ("edit", "--model", model, "--requests", facts, "--output", tmp_path / "out", "--no-evaluate", *BRIEFLY)
    with monkeypatch.context() as patch:
        patch.setattr(Editor, "run", raises(AssertionError("the work")))
        said = fails(2, *common)
    assert "GenerationConfig is invalid: - `temperature`" in said
    assert "--delta-only" in said
    assert [path.name for path in tmp_path.iterdir()] == ["facts.json"]
    works(*common, "--delta-only")
    delta = tmp_path / "out" / "delta.safetensors"
    said = fails(2, "export", delta, "--merge", tmp_path / "merged", "--model", model)
    assert "mend that, or export the updates: --dense" in said


def test_a_table_that_cannot_be_printed_comes_last(
    model: Path, facts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A terminal may lack its characters."""
    broken = raises(UnicodeEncodeError("ascii", "→", 0, 1, "ordinal not in range(128)"))
    for command in ("edit", "evaluate"):
        monkeypatch.setattr(f"fastedit.cli.{command}.show", broken)
    output = tmp_path / "out"
    said = fails(1, "edit", "--model", model, "--requests", facts, "--output", output, *BRIEFLY)
    assert "the table could not be printed: 'ascii' codec can't encode" in said
    assert f"all is written to {output}" in said
    assert (output / "model.safetensors").is_file()
    assert "reliability" in json.loads((output / "report.json").read_text())
    call("evaluate", "--model", model, "--requests", facts, "--json", tmp_path / "figures.json")
    assert "reliability" in json.loads((tmp_path / "figures.json").read_text())
