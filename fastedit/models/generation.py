"""Generation by a given configuration and nothing else."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from fastedit.errors import ModelError
from fastedit.models.hooks import eval_mode

NOT_FINITE = (
    "the model gives NaN or infinity for ordinary text: it may have weights that are not finite, or numbers too large "
    "for its dtype"
)


def sampling(tokenizer: Any, n_tokens: int, *, top_k: int = 0, texts: int = 1) -> GenerationConfig:
    """Exactly ``n_tokens`` more tokens, sampled at temperature 1.

    Args:
        top_k: likeliest tokens to sample from; 0 is all of them.
        texts: for each row.
    """
    return GenerationConfig(
        do_sample=True,
        num_beams=1,
        top_k=top_k,
        top_p=1.0,
        temperature=1.0,
        max_new_tokens=n_tokens,
        min_new_tokens=n_tokens,
        num_return_sequences=texts,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )


def generate_by(model: Any, config: GenerationConfig, input_ids: Tensor, **options: Any) -> Tensor:
    """Tokens [B, R + K] that the model continues ``input_ids`` [B, R] with, no dropout; all rows are whole.

    ``generate`` would fill what a given configuration leaves open from the model's own: penalties, suppressed tokens,
    beams.

    Raises:
        ModelError: the model gives NaN or infinity, of which nothing can be sampled.
    """
    own, model.generation_config = model.generation_config, config
    try:
        with eval_mode(model):
            tokens: Tensor = model.generate(
                input_ids=input_ids, attention_mask=torch.ones_like(input_ids), generation_config=config, **options
            )
    except RuntimeError as error:
        if "probability tensor" not in str(error):  # torch.multinomial's
            raise
        raise ModelError(NOT_FINITE) from error
    finally:
        model.generation_config = own
    return tokens
