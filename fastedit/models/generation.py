"""Generation with a given configuration only, without the model's own defaults."""

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
    """A configuration that samples exactly ``n_tokens`` more tokens at temperature 1.

    Args:
        top_k: number of likeliest tokens to sample from; 0 is all of them.
        texts: number of texts for each row.
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
    """Continue ``input_ids`` [B, R], which have no pads, without dropout; returns tokens [B, R + K].

    The model's own configuration is set aside meanwhile: ``generate`` would fill gaps from it, such as penalties,
    suppressed tokens or beams.

    Raises:
        ModelError: the model computes NaN or infinity, so that nothing can be sampled.
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
