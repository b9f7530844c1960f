"""Models and tokenizers for benchmarks. Weights are random, because speed does not depend on what a model knows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, GPT2TokenizerFast, LlamaConfig, LlamaForCausalLM

from fastedit import StreamingCovariance
from fastedit.models import fingerprint, topology
from fastedit.statistics.store import statistics_path

# Llamas of 16 blocks: one that a CPU can edit in minutes, and the shape of Llama-3.2-1B
SIZES = {
    "small": {"vocabulary": 50_304, "hidden": 512, "inner": 1792, "heads": 8, "kv_heads": 8},
    "1b": {"vocabulary": 128_256, "hidden": 2048, "inner": 8192, "heads": 32, "kv_heads": 8},
}


def random_llama(size: str, device: torch.device | str = "cpu") -> LlamaForCausalLM:
    """A Llama with random fp32 weights from torch's global seed."""
    chosen = SIZES[size]
    config = LlamaConfig(
        vocab_size=chosen["vocabulary"],
        hidden_size=chosen["hidden"],
        intermediate_size=chosen["inner"],
        num_hidden_layers=16,
        num_attention_heads=chosen["heads"],
        num_key_value_heads=chosen["kv_heads"],
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).to(device).eval()


def load_tokenizer(path: Path) -> Any:
    # with only GPT-2's vocab.json and merges.txt, AutoTokenizer would not know the class
    kind = AutoTokenizer if (path / "tokenizer_config.json").exists() else GPT2TokenizerFast
    tokenizer = kind.from_pretrained(path)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def random_statistics(model: Any, folder: Path, layers: Sequence[int]) -> list[Tensor]:
    """Make second moments of random keys for some layers, as files and as matrices."""
    parts, now, found = topology(model), fingerprint(model), []
    for layer in layers:
        width = parts.input_width(layer, "down_proj")
        about = {"fingerprint": now, "layer": layer, "module": parts.resolve(layer, "down_proj")[0]}
        covariance = StreamingCovariance(width, device=model.device, metadata=about)
        covariance.update(torch.randn(4 * width, width, device=model.device) * 0.1)
        covariance.save(statistics_path(parts, folder, layer))
        found.append(covariance.finalize())
    return found
