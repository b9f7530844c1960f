"""Fixtures of statistics: a cache of their own, and the fact world's model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from stored import OURS, parts

from fastedit.demo import checkpoint_path
from fastedit.models import Topology, topology


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty user's cache, and no checkpoint on disk."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield tmp_path / "cache" / "fastedit" / OURS
    parts.model.config._name_or_path = ""  # type: ignore[union-attr]


@pytest.fixture(scope="session")
def world() -> Topology:
    from transformers import AutoModelForCausalLM

    return topology(AutoModelForCausalLM.from_pretrained(checkpoint_path(), dtype=torch.float32))
