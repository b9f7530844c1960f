"""Fixtures of the methods that locate and edit: a case, and targets that are given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from published import Case, target_of

from fastedit.methods.batch import Batch
from fastedit.methods.locate_then_edit import method as method_module
from fastedit.methods.locate_then_edit.targets import Targets


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Targets are `target_of` the edits instead of sought."""

    def find(batch: Batch, *_: Any) -> Targets:
        z = torch.stack([target_of(edit) for edit in batch.edits])
        zeros = torch.zeros(len(batch))
        return Targets(z, z, zeros, zeros, zeros.long(), (), 1.0, ())

    monkeypatch.setattr(method_module, "find_targets", find)


@pytest.fixture
def case(tokenizer: Any, tmp_path: Path, seed: int) -> Case:
    return Case(tokenizer, tmp_path / "statistics", seed)
