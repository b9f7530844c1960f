"""Published settings, for models that are recognized by their shapes; rules for all others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastedit.models import Topology


@dataclass(frozen=True)
class LocFTBFPreset:
    """Where and how fast LocFT-BF trains (arXiv 2509.22072, its published configurations)."""

    layer: int
    module: str = "down_proj"
    lr: float | None = None


# (model_type, hidden size, blocks, vocabulary)
_LOCFT_BF: dict[tuple[str, int, int, int], LocFTBFPreset] = {
    ("llama", 4096, 32, 128256): LocFTBFPreset(22, lr=5e-4),  # Llama-3-8B
    ("qwen2", 3584, 28, 152064): LocFTBFPreset(6, lr=5e-4),  # Qwen2.5-7B
    ("mistral", 4096, 32, 32000): LocFTBFPreset(23, "block", lr=5e-5),  # Mistral-7B-v0.1
    ("qwen2", 8192, 80, 152064): LocFTBFPreset(19),  # Qwen2.5-72B; its rate is not published
    ("llama", 160, 8, 1024): LocFTBFPreset(5),  # the fact world's
}


def locft_bf_preset(topology: Topology) -> tuple[LocFTBFPreset, bool]:
    """The preset of a published model and True; for other models 22/32 of the depth (the paper's rule) and False."""
    key = (topology.config.model_type, topology.hidden_size, topology.n_blocks, topology.config.vocab_size)
    preset = _LOCFT_BF.get(key)
    return preset or LocFTBFPreset(22 * topology.n_blocks // 32), preset is not None


def scaled_learning_rate(weights: Sequence[torch.Tensor]) -> float:
    """A learning rate for Adam in proportion to the RMS of the weights: 5e-4 at an RMS of 0.02.

    5e-4 is the published rate and 0.02 the initial scale of the published models' weights. Adam moves every weight by
    about the rate in each step, whatever the weight's size.
    """
    norms = torch.stack([w.detach().float().norm() for w in weights])
    rms: float = norms.norm().item() / math.sqrt(sum(w.numel() for w in weights))
    return 5e-4 * rms / 0.02


@dataclass(frozen=True)
class LocateThenEditPreset:
    """Published settings of the locate-then-edit methods for one model (MEMIT's table, and single-layer methods')."""

    layers: tuple[int, ...]  # of the spread
    single: int
    steps: int = 25
    lr: float | None = 0.5
    weight_decay: float = 0.5
    clamp: float = 0.75
    least_squares_cov_weight: float = 15000.0
    equality_cov_weight: float = 1e5
    null_threshold: float | None = 2e-2
    l2: float = 10.0

    def cov_weight(self, equality: bool) -> float:
        """λ, the weight of C; that of equality is larger, as published."""
        return self.equality_cov_weight if equality else self.least_squares_cov_weight


_LOCATE_THEN_EDIT: dict[tuple[str, int, int, int], LocateThenEditPreset] = {
    ("gpt2", 1600, 48, 50257): LocateThenEditPreset(  # GPT2-XL
        (13, 14, 15, 16, 17), 17, steps=20, least_squares_cov_weight=20000.0, equality_cov_weight=1e4
    ),
    ("gptj", 4096, 28, 50400): LocateThenEditPreset((3, 4, 5, 6, 7, 8), 5),  # GPT-J
    ("llama", 4096, 32, 32000): LocateThenEditPreset((4, 5, 6, 7, 8), 5, weight_decay=1e-3, clamp=4.0),  # Llama-2-7B
    ("llama", 4096, 32, 128256): LocateThenEditPreset((4, 5, 6, 7, 8), 5, lr=0.1),  # Llama-3-8B
    ("qwen2", 3584, 28, 152064): LocateThenEditPreset((4, 5, 6, 7, 8), 5, weight_decay=1e-3, clamp=4.0),  # Qwen2.5-7B
    ("llama", 160, 8, 1024): LocateThenEditPreset(  # the fact world's
        (1, 2, 3),
        3,
        lr=None,
        weight_decay=1e-3,
        clamp=4.0,
        least_squares_cov_weight=700.0,
        equality_cov_weight=700.0,
        null_threshold=0.05,
    ),
}


def locate_then_edit_preset(topology: Topology) -> tuple[LocateThenEditPreset, bool]:
    """The preset of a published model and True; for other models a rule and False.

    The rule: layers from an eighth to a quarter of the depth, such as 4 to 8 of 32; a rate in proportion to the states
    (`lr` None). λ is the key width times the number of layers, but at least twice that width, divided by α for an
    equality (measured on SmolLM2-135M and Gemma 3 270M, benchmarks/README.md). AlphaEdit writes in the quarter of the
    directions that have the smallest eigenvalues of C.
    """
    key = (topology.config.model_type, topology.hidden_size, topology.n_blocks, topology.config.vocab_size)
    if key in _LOCATE_THEN_EDIT:
        return _LOCATE_THEN_EDIT[key], True
    last = max(0, min(max(1, topology.n_blocks // 4), topology.n_blocks - 2))  # no block reads the last one's output
    layers = tuple(range(topology.n_blocks // 8, last + 1))
    return LocateThenEditPreset(layers, last, lr=None, clamp=4.0, weight_decay=1e-3, null_threshold=None), False
