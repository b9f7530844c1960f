"""The configuration of LocFT-BF; importing it takes no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fastedit.configs import check_fields, described, option
from fastedit.errors import ConfigError


@described
@dataclass(frozen=True)
class LocFTBFConfig:
    """Configuration of LocFT-BF; the defaults are the published values (arXiv 2509.22072)."""

    layer: int | None = option(
        None, "block of the edited module; None is the preset of a published model, else 22/32 of the depth."
    )
    module: str | None = option(
        None, "down_proj, up_proj, gate_proj, mlp, attn, block, or a module path; None is the preset's."
    )
    lr: float | None = option(
        None, "Adam's learning rate, constant; None is the preset's, else 0.025 of the weights' RMS."
    )
    batch_size: int | Literal["auto"] = option(
        "auto", 'edits a step; "auto" is 100 from 3,000 edits on, and at least 30 steps an epoch below that.'
    )
    epochs: int = option(25, "at most this many passes over the edits.")
    stop_loss: float = option(0.01, "stop after an epoch whose mean loss is below.")
    skip_loss: float = option(0.01, "a batch whose loss is below does no backward pass and no step.")
    loss_average: Literal["sample", "token"] = option(
        "sample", "mean over a sample's target tokens, then over samples; or over all target tokens."
    )
    schedule: Literal["breadth-first", "depth-first"] = option(
        "breadth-first",
        "breadth-first, or the baseline that the paper refutes: depth-first trains each batch to `stop_loss` (at most "
        "`epochs` steps) with a fresh optimizer before it turns to the next.",
    )
    shuffle: bool = option(True, "a new order every epoch.")
    augment: int = option(
        0, "extra copies of each edit after random contexts (the paper's LocFT-BF-Aug has 5); 0 for none."
    )
    seed: int = option(0, "of the order and of the contexts.")
    weight_decay: float = option(0.0, "Adam's L2 term.")
    cache_bytes: int | None = option(
        None,
        "budget of the prefix cache and of the edited block's frozen part on the model's device, and again in host "
        "memory; a cache that fits in neither goes to a memory-mapped file. None is half of what is free.",
    )
    keep_partial: bool = option(
        False,
        "on Ctrl-C keep the last whole epoch, or the last batch that depth-first was done with, instead of restoring "
        "the model. Takes another fp32 copy of the edited weights.",
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if self.epochs < 1:
            raise ConfigError(f"epochs is {self.epochs}; give at least 1")
        if self.lr is not None and not (math.isfinite(self.lr) and self.lr > 0):
            raise ConfigError(f"lr is {self.lr}; give a positive learning rate, or leave it out")
        for name in ("stop_loss", "skip_loss", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; give 0 or more")
        if self.augment < 0:
            raise ConfigError(f"augment is {self.augment}; give a number of contexts an edit, 0 for none")
