"""Folders that appear whole or not at all; what `save_model` writes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastedit import FileError, ModelError
from fastedit.files import (
    ADAPTER,
    BY_ADAPTER,
    BY_CHECKPOINT,
    BY_DELTA,
    CHECKPOINT,
    DELTA,
    check_directory,
    check_file,
    check_writable,
    locked,
    replacing_directory,
)


def checkpoint(path: Path, text: str) -> None:
    path.mkdir()
    (path / "config.json").write_text(text)
    (path / "model.safetensors").write_text(text)


def write_folder(path: Path, text: str, error: BaseException | None = None) -> None:
    with replacing_directory(path) as temporary:
        (temporary / "config.json").write_text(text)
        if error:
            raise error


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "model"
    checkpoint(path, "old")
    (path / "model-00002.safetensors").write_text("a shard that the new one does not have")
    for error in (OSError("full"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            write_folder(path, "new", error)
        assert (path / "config.json").read_text() == "old"
        assert len(list(path.iterdir())) == 3
        assert list(tmp_path.iterdir()) == [path]
    write_folder(path, "new")
    assert [(p.name, p.read_text()) for p in path.iterdir()] == [("config.json", "new")]
    assert list(tmp_path.iterdir()) == [path]
    (tmp_path / "usual").mkdir()
    assert path.stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_the_old_folder_stays_if_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model"
    checkpoint(path, "old")
    rename, replace = Path.rename, os.replace

    def refuse(real: Callable[..., Any]) -> Callable[..., Any]:
        def function(source: Path, target: Path) -> Any:
            if Path(target) == path and (Path(source) / "config.json").read_text() == "new":
                raise OSError("the disk went away")
            return real(source, target)

        return function

    monkeypatch.setattr(Path, "rename", refuse(rename))
    monkeypatch.setattr(os, "replace", refuse(replace))
    with pytest.raises(OSError, match="went away"):
        write_folder(path, "new")
    assert (path / "config.json").read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("held", ["notes", "config.json", "model.safetensors"])
def test_a_folder_of_something_else_is_not_replaced(held: str, tmp_path: Path) -> None:
    """A config.json alone may be any project's."""
    path = tmp_path / "work"
    path.mkdir()
    (path / held).write_text("mine")
    with pytest.raises(ModelError, match="not a checkpoint"), replacing_directory(path):
        pytest.fail("it was accepted")
    assert (path / held).read_text() == "mine"
    with pytest.raises(ModelError, match="not a checkpoint"), replacing_directory(path / held):
        pytest.fail("a file was accepted")
    assert list(tmp_path.iterdir()) == [path]


def test_the_working_folder_and_links_can_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint(tmp_path / "model", "old")
    (tmp_path / "link").symlink_to("model")
    for i, path in enumerate([Path("."), tmp_path / "link"]):
        monkeypatch.chdir(tmp_path / "model")
        with replacing_directory(path) as temporary:
            (temporary / "config.json").write_text(f"new {i}")
            (temporary / "model.safetensors").write_text("new")
        assert (tmp_path / "model" / "config.json").read_text() == f"new {i}"
        assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "model"]
    assert (tmp_path / "link").is_symlink()
    shutil.rmtree(tmp_path / "model")


def test_a_folder_of_a_delta_and_its_report_is_replaced_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "edit"
    path.mkdir()
    (path / "report.json").touch()
    with pytest.raises(ModelError, match="not a checkpoint"):
        check_directory(path)
    (path / "delta.safetensors").touch()
    check_directory(path)
    (path / "notes").touch()
    with pytest.raises(ModelError, match="not a checkpoint"):
        check_directory(path)


HELD = {
    CHECKPOINT: ["config.json", "model.safetensors"],
    DELTA: ["delta.safetensors", "report.json"],
    ADAPTER: ["adapter_config.json", "adapter_model.safetensors"],
}


@pytest.mark.parametrize(
    ("over", "lost"),
    [(BY_CHECKPOINT, [ADAPTER]), (BY_DELTA, [CHECKPOINT, ADAPTER]), (BY_ADAPTER, [CHECKPOINT, DELTA])],
    ids=["by a checkpoint", "by a delta", "by an adapter"],
)
def test_weights_are_not_replaced_by_what_has_none(over: tuple[str, ...], lost: list[str], tmp_path: Path) -> None:
    for kind, names in HELD.items():
        path = tmp_path / kind
        path.mkdir()
        for name in names:
            (path / name).touch()
        if kind in lost:
            with pytest.raises(FileError, match=f"is {kind}, which is not replaced by this; give a new folder"):
                check_directory(path, over=over)
        else:
            check_directory(path, over=over)
        assert sorted(file.name for file in path.iterdir()) == names


def test_an_output_may_stand_beside_an_input_but_not_around_it(tmp_path: Path) -> None:
    checkpoint(tmp_path / "run", "old")
    checkpoint(tmp_path / "run" / "checkpoint-5", "input")
    checkpoint(tmp_path / "run-2", "beside")
    inputs = {"the model": tmp_path / "run" / "checkpoint-5"}
    check_directory(tmp_path / "run-2", inputs)
    check_directory(tmp_path / "run" / "checkpoint-6", inputs)
    check_file(tmp_path / "run" / "checkpoint-5" / "new.json", inputs)
    for output in (tmp_path / "run", tmp_path / "run" / "checkpoint-5", tmp_path / "run-2" / ".." / "run"):
        with pytest.raises(ModelError, match="the model"):
            check_directory(output, inputs)
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "model.safetensors").symlink_to(tmp_path / "run-2" / "model.safetensors")
    with pytest.raises(ModelError, match="is inside it"):
        check_directory(tmp_path / "run-2", {"the model": tmp_path / "linked"})


def test_what_cannot_be_written_is_told_and_a_trial_leaves_nothing(tmp_path: Path) -> None:
    check_writable(tmp_path / "deep" / "folder")
    check_file(tmp_path / "deep" / "file")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ModelError, match=r"/file cannot be written: it is a file"):
        check_writable(tmp_path / "file")
    with pytest.raises(ModelError, match=r"/file/a/b cannot be written: .*/file is a file"):
        check_writable(tmp_path / "file" / "a" / "b")
    with pytest.raises(ModelError, match=r"^/proc cannot be written"):  # not even by root
        check_writable(Path("/proc"))
    with pytest.raises(ModelError, match="no ordinary file"):
        check_file(Path(os.devnull))
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


_HOLD = """
import sys
from pathlib import Path
from fastedit.files import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_a_folder_is_locked_until_its_process_ends_however_that_is(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, "-c", _HOLD, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(FileError, match=rf"run is in use by process {other.pid} on .*; wait"), locked(folder):
            pass
        other.kill()
    with locked(folder), locked(folder):  # the lock of a process that was killed is free; one's own is no obstacle
        (folder / "state").touch()
    assert [path.name for path in folder.iterdir()] == ["state"]
    (folder / "state").unlink()
    with locked(folder):
        pass
    assert not folder.exists()
