"""The published LocFT-BF training loop, as its paper and code describe it: the baseline of our figures.

It runs the full forward pass every epoch, on padded batches that are tokenized each time, with logits of the whole
vocabulary at every position and one host synchronization per batch (arXiv 2509.22072, section 4 and published code).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


def locft_bf(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[tuple[str, str]],
    weight: torch.nn.Parameter,
    *,
    lr: float,
    batches: Iterator[Tensor],
    skip_loss: float = 0.01,
) -> list[float]:
    """Fine-tune `weight` on the batches of (prompt, target) pairs; returns the loss of each batch."""
    for p in model.parameters():
        p.requires_grad_(p is weight)
    optimizer = torch.optim.Adam([weight], lr=lr)
    losses = []
    for batch in batches:
        texts = [f"{pairs[i][0]} {pairs[i][1]}{tokenizer.eos_token}" for i in batch.tolist()]
        encoded = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right").to(model.device)
        n_prompt = [len(tokenizer(pairs[i][0]).input_ids) for i in batch.tolist()]
        labels = encoded.input_ids.masked_fill(encoded.attention_mask == 0, -100)
        for row, n in enumerate(n_prompt):
            labels[row, :n] = -100
        logits = model(**encoded, use_cache=False).logits[:, :-1]
        mask = labels[:, 1:] != -100
        logp = logits.log_softmax(-1).gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
        loss = (-(logp * mask).sum(1) / mask.sum(1)).mean()
        losses.append(loss.item())
        if losses[-1] >= skip_loss:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return losses
