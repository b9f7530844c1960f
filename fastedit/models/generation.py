"""Generation by a given configuration and nothing else."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from fastedit.models.hooks import eval_mode


def generate_by(model: Any, config: GenerationConfig, input_ids: Tensor, **options: Any) -> Tensor:
    """Tokens [B, R + K] that the model continues ``input_ids`` [B, R] with, no dropout; all rows are whole.

    ``generate`` would fill what a given configuration leaves open from the model's own: penalties, suppressed tokens,
    beams.
    """
    own, model.generation_config = model.generation_config, config
    try:
        with eval_mode(model):
            tokens: Tensor = model.generate(
                input_ids=input_ids, attention_mask=torch.ones_like(input_ids), generation_config=config, **options
            )
    finally:
        model.generation_config = own
    return tokens
