"""`fastedit watch` and the status that it reads: of an edit that runs, has ended, failed, or was killed."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from calling import call, fails, works
from rich.console import Console

from fastedit.cli import bars as bars_module
from fastedit.cli import status as status_module
from fastedit.cli import watch as watch_module
from fastedit.cli.bars import Bars
from fastedit.cli.status import STATUS, Status
from fastedit.demo import World, checkpoint_path
from fastedit.methods.locft_bf.trainer import Trainer


@pytest.fixture
def edit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The words of a command that edits the shipped model; its output is missing."""
    monkeypatch.chdir(tmp_path)
    records = [{"prompt": r.prompt, "target": r.target} for r in World().requests(6)]
    (tmp_path / "facts.json").write_text(json.dumps(records))
    what = ["--model", str(checkpoint_path()), "--requests", "facts.json", "--delta-only", "--no-evaluate"]
    how = ["--published", "--batch-size", "3", "--epochs", "3", "--stop-loss", "0", "--save-every", "0"]
    return ["edit", *what, "--dtype", "float32", "--device", "cpu", *how]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status_module, "_OFTEN", 0.05)
    monkeypatch.setattr(watch_module, "_EVERY", 0.005)


def at_step(number: int, then: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Call something in front of a training step."""
    step, left = Trainer._step, [number]

    def stopping(self: Trainer, *args: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            then()
        step(self, *args)

    monkeypatch.setattr(Trainer, "_step", stopping)


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("state", ["out.run", "here"])
def test_a_running_edit_is_shown_by_its_output_or_its_state(
    state: str, edit: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def look() -> None:
        wait_for(lambda: json.loads(Path(state, STATUS).read_text()).get("done") == 2)
        folders = (state, "out") if state == "out.run" else (state,)
        seen.extend(call("watch", folder, "--once") for folder in folders)

    at_step(5, look, monkeypatch)  # in the third epoch
    works(*edit, "--output", "out", *(["--state", state] if state == "here" else []))
    assert seen
    for result in seen:
        assert result.exit_code == 3, result.stderr
        for words in ("running for 0:0", "stage training, 2 of 3", " edits/s", "; loss ", "learned ", " of 6 edits",
                      "state saved 0:0", "memory host "):  # fmt: skip
            assert words in result.stdout
        assert result.stdout.count("\n") == 1
    done = works("watch", "out", "--once")
    assert done.stdout == "ended; written to out\n"
    assert not Path(state).exists()


@pytest.mark.usefixtures("quick")
def test_an_edit_that_failed_says_why_and_how_to_go_on(edit: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        at_step(5, stop, patch)
        assert call(*edit, "--output", "out").exit_code == 1
    result = call("watch", "out", "--once")
    assert result.exit_code == 1
    assert result.stdout.startswith(
        "failed: interrupted; fastedit edit --resume out continues it; stage training, 2 of 3"
    )
    works("edit", "--resume", "out")
    assert not Path("out.run").exists()


def status_of(folder: Path, **figures: Any) -> Path:
    """A status as an edit on another machine has written it some time ago."""
    now = time.time()
    found = {"state": "running", "method": "memit", "model": "m", "edits": 6, "output": str(folder / "out")}
    found |= {"process": "7 on far", "began": now - 100, "moved": now, "updated": now, "saved": None}
    found |= {"memory": {"host": 2**31, "device": None}}
    path = folder / "out.run" / STATUS
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(found | figures))
    return path


@pytest.mark.parametrize(
    ("figures", "code", "said"),
    [
        ({}, 3, "running for 1:40; memory host 2 GiB"),
        ({"stage": "targets", "done": 1, "total": 9, "speed": "2 e/s", "left": ""}, 3, "targets, 1 of 9; speed 2 e"),
        ({"moved": time.time() - 50}, 3, "without progress for "),
        ({"updated": time.time() - 40}, 1, "was it killed? fastedit edit --resume {} starts it again"),
        ({"updated": time.time() - 40, "saved": 9.0}, 1, "was it killed? fastedit edit --resume {} continues it"),
        ({"updated": time.time() + 999}, 3, "running for "),  # that machine's clock is ahead
        ({"state": "ended"}, 0, "ended; written to {}"),
        ({"state": "failed", "error": "[no] disk"}, 1, "failed: [no] disk; fastedit edit --resume {} starts it again"),
    ],
)  # fmt: skip
def test_what_a_status_means(figures: dict[str, Any], code: int, said: str, tmp_path: Path) -> None:
    status_of(tmp_path, **figures)
    result = call("watch", tmp_path / "out", "--once")
    assert result.exit_code == code, result.stderr
    assert said.format(tmp_path / "out") in result.stdout


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("report", "code", "said"), [(True, 0, "ended; written to"), (False, 1, "gone: its state is no longer there")]
)
def test_it_is_followed_to_its_end(
    report: bool, code: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it is read in part, silent, and back again."""
    shown: list[str] = []
    table = watch_module._table

    def spy(job: Any) -> Any:
        console = Console(width=200)
        with console.capture() as capture:
            console.print(table(job))
        shown.append(capture.get())
        return table(job)

    monkeypatch.setattr(watch_module, "_table", spy)
    path = status_of(tmp_path, output="/far/out")  # there, on another machine, whose folder is synced

    def live() -> None:
        wait_for(lambda: any("no news for" in text for text in shown))
        path.write_text('{"state": "runn')
        status_of(tmp_path, error="[red]", saved=1.0, output="/far/out")
        if report:
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "report.json").touch()
        path.unlink()

    thread = threading.Thread(target=live)
    thread.start()
    result = call("watch", tmp_path / "out", "--silent", 0.05)
    thread.join()
    assert "6 by memit, m, process 7 on far" in shown[0]
    assert result.exit_code == code
    assert result.stdout.startswith(said)


def test_what_cannot_be_watched(tmp_path: Path) -> None:
    assert f"there is no {tmp_path / 'out.run' / STATUS}" in fails(2, "watch", tmp_path / "out")
    assert "--silent 0: expected more than 0" in fails(2, "watch", tmp_path / "out", "--silent", 0)
    for content in ("{", "null", "{}", json.dumps({"state": "running", "updated": 1.0, "moved": 1.0})):
        status_of(tmp_path).write_text(content)
        assert "cannot be read" in fails(2, "watch", tmp_path / "out", "--once")


@pytest.mark.usefixtures("quick")
def test_a_status_fails_nothing_and_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a full disk too; it is written by its own thread, rarely, however often it changes."""
    written: list[str] = []

    def full(path: Path) -> Any:
        written.append(threading.current_thread().name)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(status_module, "replacing", full)
    monkeypatch.setattr(status_module, "_OFTEN", 0.05)
    with Status(tmp_path, method="memit") as status:
        started = time.perf_counter()
        for done in range(1000):
            status.update(done=done)
        assert time.perf_counter() - started < 0.2
        wait_for(lambda: len(written) > 1)
    assert len(written) < 20
    assert not list(tmp_path.iterdir())


def test_without_a_terminal_a_line_is_printed_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 0.0, 30.0, 61.0, 70.0, 130.0])
    monkeypatch.setattr(bars_module.time, "perf_counter", lambda: next(clock))
    with Bars() as bars:
        report = bars.callback("", n_edits=100)
        for done in (1, 2, 3, 4):
            report("train", done, 10, 2.0)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "training: 2 of 10, 0.328 edits/s, loss 2, 4:04 left",
        "training: 4 of 10, 0.308 edits/s, loss 2, 3:15 left",
    ]
