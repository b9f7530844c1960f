"""`fastedit covariance`: the statistics that it makes, and what it says of its text and of how to go on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from fastedit import StreamingCovariance, cli
from fastedit.demo import World, checkpoint_path
from fastedit.models import Topology, fingerprint
from fastedit.statistics.store import StatisticsStore, user_directory

pytestmark = pytest.mark.usefixtures("cache")


def call(*args: Any) -> Result:
    with torch.random.fork_rng():
        return CliRunner().invoke(cli.app, ["covariance", *map(str, args)])


def fails(*args: Any) -> str:
    result = call(*args)
    assert (result.exit_code, result.stdout) == (2, "")
    return result.stderr.splitlines()[-1]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "world.txt").write_text("\n\n".join(World().prose(60)))
    return tmp_path / "world.txt"


SMALL = ("--dtype", "float32", "--batch-tokens", 512)


def test_the_command_makes_what_editing_looks_for_and_goes_on(
    text: Path, world: Topology, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (checkpoint_path(), "--text", text, "--layers", "1-2,5", *SMALL)
    first = call(*arguments, "--tokens", 1000)
    assert first.exit_code == 0, first.stderr
    mark = fingerprint(world.model)
    where = user_directory(mark)
    assert "down_proj of layers 1,2,5: " in first.stdout
    assert first.stdout.rstrip().endswith(f"written to {where}")
    assert sorted(os.listdir(where)) == [f"{layer}.down_proj.safetensors" for layer in (1, 2, 5)]
    StatisticsStore(world, mark, directory=where).cholesky(5)
    before = read(where)
    assert "there already" in call(*arguments, "--tokens", 1000).stdout
    assert read(where) == before
    whole = call(*arguments)
    assert whole.exit_code == 0, whole.stderr
    found = StreamingCovariance.load(where / "5.down_proj.safetensors")
    assert found.count > 1500
    elsewhere = call(*arguments, "--output", tmp_path / "alone")
    assert elsewhere.exit_code == 0
    alone = StreamingCovariance.load(tmp_path / "alone" / "5.down_proj.safetensors")
    assert torch.equal(found.finalize(), alone.finalize())


def read(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if "factor" not in path.name}


def test_the_command_tells_of_convergence_and_of_too_little_text(text: Path, tmp_path: Path) -> None:
    arguments = (checkpoint_path(), "--text", text, "--layers", 1, *SMALL, "--output", tmp_path / "out")
    few = call(*arguments, "--tokens", 100)
    assert "fewer than the width 704" in few.stderr
    ended = call(*arguments, "--until-converged")
    assert "changed C by" in ended.stderr
    assert "not converged" in ended.stderr


def test_bad_input_is_told_before_the_model_is_loaded(text: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n\n")
    (tmp_path / "file").write_text("x")
    good = ("no model", "--text", text, "--layers", "1")
    assert "--layers 3-1" in fails("no model", "--text", text, "--layers", "3-1")
    assert "is empty" in fails("no model", "--text", tmp_path / "empty.txt", "--layers", "1")
    assert "No such file" in fails("no model", "--text", tmp_path / "none.txt", "--layers", "1")
    assert "cannot be written" in fails(*good, "--output", tmp_path / "file")
    assert "--tokens" in fails(*good, "--tokens", 0)
    assert "layer 99 does not exist" in fails(checkpoint_path(), "--text", text, "--layers", "99")


def test_ctrl_c_says_how_to_go_on(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "fastedit.statistics.collect._Run._observe", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    result = call(checkpoint_path(), "--text", text, "--layers", 1, *SMALL)
    assert result.exit_code == 1
    assert "continues where" in result.stderr
