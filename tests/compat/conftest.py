"""Fixtures of the calls of rome, memit, EMMET and AlphaEdit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import CONTEXTS
from memit_calls import Case

from fastedit.compat import memit


@pytest.fixture
def case(
    tokenizer: Any, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Case:
    found = Case(tokenizer, tmp_path / "statistics", seed, getattr(request, "param", "llama"))
    monkeypatch.setattr(memit, "COV_CACHE", found.C)
    monkeypatch.setattr(memit, "CONTEXT_TEMPLATES_CACHE", [["{}"], CONTEXTS])
    monkeypatch.setattr(memit, "STATS_DIR", str(tmp_path / "none"))
    return found


@pytest.fixture(autouse=True)
def _cache() -> Iterator[None]:
    yield
    memit.COV_CACHE.clear()
