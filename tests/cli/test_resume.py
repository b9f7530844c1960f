"""`fastedit edit --resume`: an edit whose process was killed, and what the command leaves."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from fastedit import WeightDelta, cli
from fastedit.demo import World, checkpoint_path
from fastedit.methods.locft_bf.trainer import Trainer

FLAGS = ["--published", "--batch-size", "4", "--epochs", "6", "--stop-loss", "0", "--save-every", "0"]


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """The words of a command that edits the shipped model; its output is missing."""
    records = [{"prompt": r.prompt, "target": r.target} for r in World().requests(12)]
    (tmp_path / "facts.json").write_text(json.dumps(records))
    what = ["--model", str(checkpoint_path()), "--requests", "facts.json", "--delta-only", "--no-evaluate"]
    return ["edit", *what, "--dtype", "float32", "--device", "cpu", *FLAGS]


def call(*args: str) -> Result:
    return CliRunner().invoke(cli.app, [*args])


def updates(output: Path) -> dict[str, Any]:
    return WeightDelta.load(output / "delta.safetensors").updates


def test_an_edit_that_was_killed_goes_on_to_the_same_bits(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    whole = call(*command, "--output", "whole")
    assert whole.exit_code == 0, whole.stderr
    code = "import torch; torch.set_num_threads(1); from fastedit.cli import main; main()"
    process = subprocess.Popen([sys.executable, "-c", code, *command, "--output", "out"], env=os.environ)
    states = tmp_path / "out.run"
    while process.poll() is None and not list(states.glob("*2.safetensors")):
        time.sleep(0.01)
    process.send_signal(signal.SIGSTOP)
    (states / ".tmpXb72LM").touch()  # as if safetensors had just begun to write a state
    second = call(*command, "--output", "out")
    assert second.exit_code == 2, second.stderr
    assert f"out.run is in use by process {process.pid} on " in second.stderr
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not Path("out").exists()
    assert {file.name for file in states.iterdir()} > {"command.json", "run.json"}
    monkeypatch.chdir("/")  # wherever it is called from
    resumed = call("edit", "--resume", str(tmp_path / "out"))
    assert resumed.exit_code == 0, resumed.stderr
    wanted = updates(tmp_path / "whole")
    for path, update in updates(tmp_path / "out").items():
        assert torch.equal(update, wanted[path])
    assert not states.exists()


@pytest.mark.parametrize(("elsewhere", "named"), [([], "out"), (["--state", "here"], "here")])
def test_ctrl_c_says_how_to_go_on(
    elsewhere: list[str], named: str, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    step, left = Trainer._step, [5]

    def stopping(self: Trainer, *args: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", stopping)
        stopped = call(*command, "--output", "out", *elsewhere)
    assert stopped.exit_code == 1
    assert stopped.stderr.strip().endswith(f"interrupted; to continue: fastedit edit --resume {named}")
    other = call(*command, "--output", "out", *elsewhere, "--lr", "1e-5")
    assert other.exit_code == 2
    assert "holds the state of another run" in other.stderr
    # the whole command goes on, too
    again = call("edit", "--resume", named) if elsewhere else call(*command, "--output", "out")
    assert again.exit_code == 0, again.stderr
    assert not Path(elsewhere[-1] if elsewhere else "out.run").exists()


def test_a_short_edit_leaves_no_state(command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_step", stop)
    stopped = call(*command, "--output", "out", "--save-every", "300")
    assert (stopped.exit_code, stopped.stderr.strip()) == (1, "fastedit: interrupted; nothing was written")
    assert [path.name for path in tmp_path.iterdir()] == ["facts.json"]


def test_what_cannot_be_resumed_is_refused(command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for args, message in (
        (["--resume", "out"], "--resume out: there is no .*out.run/command.json; the edit is done, or it never began"),
        (
            ["--resume", "out", "--lr", "1e-3"],
            "takes the folder of --output or of --state and no other flag, got out --lr 1e-3",
        ),
        (["--resume"], "and no other flag, got nothing"),
    ):
        result = call("edit", *args)
        assert result.exit_code == 2
        assert re.search(message, result.stderr), result.stderr
    Path("out.run").mkdir()
    Path("out.run/command.json").write_text("{")
    result = call("edit", "--resume", "out")
    assert result.exit_code == 2
    assert "run the whole command again, which continues it" in result.stderr
    Path("out.run/command.json").write_text(json.dumps({"arguments": command, "folder": str(tmp_path / "gone")}))
    assert f"the folder {tmp_path / 'gone'} where it began is gone" in call("edit", "--resume", "out").stderr


@pytest.mark.parametrize("how", ["moved", "copied", "moved with its folder"])
def test_a_state_at_another_place_does_not_begin_anew(
    how: str, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, now = tmp_path / "there", tmp_path / ("here" if how == "moved with its folder" else "there")
    folder.mkdir()
    shutil.copy(tmp_path / "facts.json", folder)
    monkeypatch.chdir(folder)
    step = Trainer._step

    def stop(self: Trainer, *args: Any) -> Any:
        if list(Path("out.run").glob("*1.safetensors")):
            raise KeyboardInterrupt
        return step(self, *args)

    monkeypatch.setattr(Trainer, "_step", stop)
    assert call(*command, "--output", "out").exit_code == 1
    monkeypatch.setattr(Trainer, "_step", step)
    if how == "moved with its folder":
        shutil.copytree(folder, now)  # and the old one is still there
    else:
        {"moved": shutil.move, "copied": shutil.copytree}[how]("out.run", "other.run")
    monkeypatch.chdir(now)
    name = "out" if how == "moved with its folder" else "other"
    result = call("edit", "--resume", name)
    assert result.exit_code == 2
    assert f"{name}.run was moved or copied from {folder}/out.run, where its edit would start again" in result.stderr
    assert not [*tmp_path.rglob("delta.safetensors")]
    assert call(*command, "--output", "result", "--state", f"{name}.run").exit_code == 0
    assert not Path(f"{name}.run").exists()


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ("mine", "mine is to hold the state of a run alone, but has thesis.txt"),
        ("model", "model is to hold the state of a run alone, but has README.md, "),
        ("out", "one contains the other"),
        ("out/state", "one contains the other"),
        (".", "one contains the other"),
        (None, "out.run is to hold the state of a run alone, but has thesis.txt"),
    ],
)
def test_a_state_takes_no_folder_of_the_users(
    state: str | None, message: str, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "out.run"):
        Path(name).mkdir()
        (Path(name) / "thesis.txt").touch()
    shutil.copytree(checkpoint_path(), "model")
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    words = ["model" if word == str(checkpoint_path()) else word for word in command]
    result = call(*words, "--output", "out", *(["--state", state] if state else []))
    assert result.exit_code == 2
    assert message in result.stderr
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before


def test_two_edits_have_two_outputs(command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever their states are: the one that ends first would give the other its delta."""
    monkeypatch.chdir(tmp_path)
    code = "import sys; from pathlib import Path; from fastedit.cli.resume import resumable\n"
    code += "with resumable(Path('out'), Path('elsewhere')): print('begun', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        result = call(*command, "--output", "out", "--state", "here")
        other.kill()
    assert result.exit_code == 2
    assert f"out.run is in use by process {other.pid}" in result.stderr
