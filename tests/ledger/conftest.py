"""Fixtures of ledgers: statistics, ledgers that are opened, and one that holds a fact."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers import moments, tiny_model
from ledgers import WAYS, A, B, Open, bits, editor_of

from fastedit import Ledger


@pytest.fixture(scope="session")
def statistics(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("statistics")
    moments(tiny_model("llama", seed=1), folder, 3)
    return folder


@pytest.fixture
def opened(tokenizer: Any, statistics: Path, tmp_path: Path) -> Open:
    """Opens the ledger of that name with a fresh model, in one of the `WAYS`."""

    def open_(name: str = "ledger", way: str = "memit", *, at: int | None = None, seed: int = 1, **more: Any) -> Ledger:
        buffered = more.pop("buffered", WAYS[way].get("buffered"))
        editor = editor_of(tokenizer, statistics, way, seed, **more)
        return Ledger(tmp_path / name, editor, buffered=buffered, at=at)

    return open_


@pytest.fixture(scope="session")
def made_once(tokenizer: Any, statistics: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A ledger of A, and the bits of A and B."""
    folder = tmp_path_factory.mktemp("made") / "A"
    with Ledger(folder, editor_of(tokenizer, statistics)) as ledger:
        ledger.add([A])
    shutil.copytree(folder, folder.with_name("AB"))
    with Ledger(folder.with_name("AB"), editor_of(tokenizer, statistics)) as ledger:
        ledger.add([B])
        return folder, bits(ledger)


@pytest.fixture
def begun(made_once: tuple[Path, Any], tmp_path: Path) -> Path:
    """The folder of `opened()`, which holds A."""
    shutil.copytree(made_once[0], tmp_path / "ledger")
    return tmp_path / "ledger"
