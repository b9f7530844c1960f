"""Text that a model writes itself, and its second moments: for methods that need to know ordinary inputs by and large.

Statistics of real text are the better ones (`fastedit covariance`); these need nothing but the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from fastedit.models import Model, generate_by, trailing
from fastedit.progress import Progress, no_progress
from fastedit.statistics.collect import collect
from fastedit.statistics.moment import StreamingCovariance
from fastedit.statistics.store import user_directory

_OPENINGS = ("The", "In", "A", "I", "It", "What", "How", "She", "This", "For", "When", "You", "1", "If", "And", "To")
_LENGTH, _ROWS = 128, 64  # tokens of a text, texts at once
_TOKENS = 4  # for each input that the projection reads


def own_text_directory(fingerprint: str) -> Path:
    """The folder for statistics of a model's own text in the user's cache; apart from those of real text."""
    return user_directory(fingerprint) / "own-text"


def own_text_tokens(model: Model, layers: Sequence[int], module: str) -> int:
    """Tokens that are written for these layers: enough for every direction of their inputs."""
    return _TOKENS * max(model.topology.input_width(layer, module) for layer in layers)


@torch.no_grad()
def write_text(model: Model, n_tokens: int, *, seed: int = 0) -> list[str]:
    """Texts of `n_tokens` tokens in all, or a few more, sampled from the model's whole distribution.

    Reproducible from `seed`; the caller's random state is left alone.
    """
    network: Any = model.network
    tokenizer, device = model.tokenizer, model.device
    starts = [tokenizer(opening)["input_ids"] for opening in _OPENINGS]
    starts = [ids[: max(1, len(ids) - trailing(ids, tokenizer.eos_token_id))] for ids in starts]
    begun = min(map(len, starts))
    length = min(_LENGTH, model.topology.context_length) - begun
    rows = torch.tensor([ids[:begun] for ids in starts], device=device)
    n_texts = -(-n_tokens // (begun + length))
    sampling = GenerationConfig(
        do_sample=True,
        num_beams=1,
        top_k=0,
        top_p=1.0,
        temperature=1.0,
        max_new_tokens=length,
        min_new_tokens=length,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )
    texts: list[str] = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for some in torch.arange(n_texts, device=device).split(_ROWS):
            out = generate_by(network, sampling, rows[some % len(rows)])
            texts += tokenizer.batch_decode(out, skip_special_tokens=True)
    return texts


def collect_own(
    model: Model,
    layers: Sequence[int],
    directory: Path,
    *,
    module: str = "down_proj",
    seed: int = 0,
    progress: Progress = no_progress,
) -> dict[int, StreamingCovariance]:
    """Second moments of some layers' inputs in text that the model writes, kept in a folder.

    Raises:
        ConfigError, ModelError, FileError: as `collect`.
    """
    texts = write_text(model, own_text_tokens(model, layers, module), seed=seed)
    return collect(model, texts, layers, module=module, directory=directory, progress=progress)
