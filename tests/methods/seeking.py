"""Targets that are sought in a tiny model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from helpers import tiny_model

from fastedit import EditRequest
from fastedit.methods.batch import Batch
from fastedit.methods.locate_then_edit.config import TargetConfig
from fastedit.methods.locate_then_edit.targets import Targets, find_targets
from fastedit.models import Model
from fastedit.progress import no_progress

CONTEXTS = ["w20 w21 w22 . {}", "w23 . {}"]
Z_LAYER = 1
# about half of the random edits stop before the last step, and about half meet the clamp
CONFIG = TargetConfig(steps=12, lr=0.3, weight_decay=0.05, clamp=1.5, kl_factor=0.2, stop_loss=4.5)
CONFIGS = {"block": CONFIG, "mlp": replace(CONFIG, site="mlp", clamp=4.0)}


def found(family: str, tokenizer: Any, edits: Sequence[EditRequest], config: TargetConfig, **options: Any) -> Targets:
    about = {"progress": options.pop("progress", no_progress)}
    model = Model.of(tiny_model(family), tokenizer)
    return find_targets(Batch(model, edits, CONTEXTS, **about), Z_LAYER, config, **options)


def assert_same(found: Targets, wanted: Targets) -> None:
    """Equal up to what another batch shape does to rounding."""
    assert torch.equal(found.steps, wanted.steps)
    for name in ("z", "h0", "loss", "probability"):
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name), rtol=1e-3, atol=2e-3)
