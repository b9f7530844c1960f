"""Contexts that the model itself writes, to be put in front of prompts (ROME, MEMIT; LocFT-BF-Aug)."""

from __future__ import annotations

from typing import Any

import torch

from fastedit.models import SENTENCE_ENDS, Model, encode, generate_by, joined, sampling, trailing

BARE = "{}"
"""The template that leaves a prompt as it is."""
_OPENINGS = ("The", "Therefore", "Because", "I", "You")


@torch.no_grad()
def sample_contexts(model: Model, n: int, *, seed: int, n_tokens: int = 10) -> list[str]:
    """`n` short texts that end a sentence, such as "The river was cold that year.".

    They continue five openings, sampled among the 5 likeliest tokens (Meng et al. 2023, MEMIT, appendix B).
    They are reproducible from `seed`; the caller's random state does not change.
    """
    network: Any = model.network
    tokenizer, device = model.tokenizer, model.device
    config = sampling(tokenizer, n_tokens, top_k=5, texts=-(-n // len(_OPENINGS)))
    texts: list[list[str]] = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for ids in encode(tokenizer, _OPENINGS):
            ids = ids[: max(1, len(ids) - trailing(ids, tokenizer.eos_token_id))]
            generated = generate_by(network, config, torch.tensor([ids], device=device))
            texts.append(tokenizer.batch_decode(generated, skip_special_tokens=True))
    mixed = [text for round_ in zip(*texts, strict=True) for text in round_][:n]
    return [_ended(" ".join(text.split())) for text in mixed]


def context_templates(model: Model, n: int, *, seed: int, n_tokens: int = 10) -> list[str]:
    """Templates made of the texts of `sample_contexts`; each ends with one "{}", where the prompt goes."""
    texts = sample_contexts(model, n, seed=seed, n_tokens=n_tokens)
    return [joined(text.translate({ord(c): None for c in BARE}), BARE) for text in texts]


def _ended(text: str) -> str:
    """The text with one full stop at its end, or with the other mark that ends its sentence."""
    text = text.rstrip(".")
    return text if text.endswith(tuple(SENTENCE_ENDS)) else f"{text}."
