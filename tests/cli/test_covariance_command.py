"""`fastedit covariance`: what it refuses before the work, and what is saved if it is cut off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from calling import CtrlC, fails, works
from helpers import files_of_at_most

from fastedit.cli.bars import Bars


@pytest.fixture
def collecting(model: Path, tmp_path: Path) -> tuple[Any, ...]:
    (tmp_path / "text.txt").write_text("\n\n".join(f"The king of Gaul has {n} geese." for n in range(200)))
    return ("covariance", model, "--text", tmp_path / "text.txt", "--layers", "0-1", "--batch-tokens", 1)


def test_covariance_sees_first_whether_its_folder_can_be_written(
    collecting: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    works(*collecting, "--output", tmp_path / "out", "--tokens", 1)
    (tmp_path / "out" / "statistics").mkdir()
    works(*collecting, "--output", tmp_path / "out", "--tokens", 1)
    monkeypatch.setattr("fastedit.statistics.collect.Collection", None)
    monkeypatch.setattr("fastedit.statistics.store.user_directory", lambda mark: Path("/proc") / mark)
    assert "/proc/" in (said := fails(2, *collecting))
    assert "cannot be written" in said


def test_covariance_tells_the_line_that_is_not_utf_8(collecting: tuple[Any, ...], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(b"caf\xe9\n")
    assert "line 1 is not UTF-8" in fails(2, *collecting)
    (tmp_path / "text.txt").write_bytes("é\n".encode() * 9999 + b"caf\xe9\n")
    assert "line 10000 is not UTF-8" in fails(2, *collecting, "--output", tmp_path / "out")


def test_covariance_of_another_text_is_refused_before_the_work(collecting: tuple[Any, ...], tmp_path: Path) -> None:
    kept = (*collecting, "--output", tmp_path / "out")
    works(*kept)
    lines = (text := tmp_path / "text.txt").read_text().split("\n\n")
    for other, said in (
        (["The queen of Gaul.", *lines], "another text or tokenizer"),
        ([*lines[:100], "The queen of Gaul.", *lines[100:]], "from some document on"),
        (lines[:100], "another text, which is longer"),
    ):
        text.write_text("\n\n".join(other))
        assert said in fails(2, *kept)


def test_a_disk_that_fills_up_under_covariance(collecting: tuple[Any, ...], tmp_path: Path) -> None:
    wide = (*collecting, "--output", tmp_path / "out")
    with files_of_at_most(4096):
        said = fails(1, *wide)
    assert "the statistics could not be saved" in said
    assert "nothing was saved yet" in said
    works(*wide, "--tokens", 1)
    with files_of_at_most(4096):
        assert said.partition("; ")[0] in (again := fails(1, *wide))
    assert "continues where the statistics were last saved" in again


@pytest.mark.parametrize("saved", [False, True])
def test_covariance_says_after_ctrl_c_whether_anything_was_saved(
    collecting: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved: bool
) -> None:
    wide = (*collecting, "--output", tmp_path / "out")
    if saved:
        works(*wide, "--tokens", 1)
    interrupt = CtrlC("covariance", 10**9)
    monkeypatch.setattr(Bars, "callback", lambda *args: interrupt.of(*args))
    monkeypatch.setattr(
        "fastedit.statistics.collect._Run._observe", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    said = fails(1, *wide)
    assert ("continues where the statistics were last saved" in said) == saved
    assert ("nothing was saved yet" in said) != saved
