"""The command line under torchrun: the processes share an edit, and one of them speaks and writes."""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastedit import WeightDelta, cli
from fastedit.cli.status import Status
from fastedit.demo import World, checkpoint_path

FLAGS = ["--published", "--batch-size", "4", "--epochs", "2", "--stop-loss", "0", "--device", "cpu", "--evaluate"]


def _command(rank: int, port: int, arguments: list[str]) -> None:
    """A process as torchrun starts it; its output is in files."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_PORT": str(port)}
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{name}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    code: Any = 1
    try:
        cli.app(arguments, prog_name="fastedit")
    except SystemExit as error:
        code = error.code
    sys.stdout.flush()
    sys.stderr.flush()
    Path(f"code-{rank}").write_text(str(code or 0))


def in_two(*arguments: str) -> tuple[list[str], list[str], list[str]]:
    """Exit codes, output and errors of the two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # spawned ones would import everything anew
    torch.multiprocessing.start_processes(_command, (port, [*arguments]), nprocs=2, start_method="fork")
    return tuple([Path(f"{name}-{rank}").read_text() for rank in range(2)] for name in ("code", "out", "err"))  # type: ignore[return-value]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    records = [{"prompt": r.prompt, "target": r.target} for r in World().requests(9)]
    (tmp_path / "facts.json").write_text(json.dumps(records))
    return ["edit", "--model", str(checkpoint_path()), "--requests", "facts.json", "--dtype", "float32", *FLAGS]


def test_two_processes_edit_as_one_does_and_one_of_them_speaks(
    command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:  # which the processes inherit
        patch.setattr(Status, "_write", lambda _: Path(f"status-{os.environ['RANK']}").touch())
        codes, out, err = in_two(*command, "sample:4", "--output", "two")
    assert (codes, out[1], err[1]) == (["0", "0"], "", "")
    assert err[0].count("layer 5") == err[0].count("\n") // 3 == 1
    assert out[0].count("written to two") == out[0].count("reliability") == 1
    with pytest.raises(SystemExit, match="0"):
        cli.app([*command, "sample:4", "--output", "one"])
    one, two = (WeightDelta.load(Path(name, "delta.safetensors")).updates for name in ("one", "two"))
    for path, update in one.items():
        assert float((two[path] - update).norm() / update.norm()) < 1e-5
    assert sorted(p.name for p in Path("two").iterdir()) == sorted(p.name for p in Path("one").iterdir())
    assert [path.name for path in Path().glob("status-*")] == ["status-0"]


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--lr", "1e38"], "1", "the loss is not finite"),
        (["--layers", "99"], "2", "99"),
        (["--requests", "none.json"], "2", "none.json"),
    ],
)
def test_what_fails_is_said_once_and_nothing_is_written(
    more: list[str], code: str, message: str, command: list[str]
) -> None:
    codes, out, err = in_two(*command, "all", *more, "--output", "new")
    assert (codes, out, err[1]) == ([code, code], ["", ""], "")
    assert err[0].splitlines()[-1].startswith("fastedit: ")
    assert message in err[0].splitlines()[-1]
    assert not Path("new").exists()


def test_commands_that_share_no_work_refuse_several_processes(command: list[str]) -> None:
    codes, _, err = in_two("env")
    assert codes == ["2", "2"]
    assert "env runs in one process, without torchrun; commands that share their work: edit, evaluate" in err[0]
