"""Tiny random models of every supported family, and ragged samples for them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fastedit.models import Samples

VOCAB = 97
_COMMON: dict[str, Any] = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
_LLAMA: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_GPT2: dict[str, Any] = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64}
_GEMMA = _LLAMA | {"head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 8}
# name -> (model type, config); windows are shorter than samples, dropout is on (it must not act)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", _GPT2),
    "gptj": ("gptj", _GPT2 | {"rotary_dim": 4}),
    "gpt_neox": ("gpt_neox", _LLAMA | {"use_parallel_residual": True}),
    "gpt_neox_sequential": ("gpt_neox", _LLAMA | {"use_parallel_residual": False}),
    "opt": (
        "opt",
        {
            "hidden_size": 32,
            "ffn_dim": 56,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 32,
        },
    ),
    "opt_post_norm": (
        "opt",
        {
            "hidden_size": 32,
            "ffn_dim": 56,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 16,
            "do_layer_norm_before": False,
        },
    ),
    "llama": ("llama", _LLAMA),
    "mistral": ("mistral", _LLAMA | {"sliding_window": 5}),
    "qwen2": (
        "qwen2",
        _LLAMA | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    ),
    "qwen3": ("qwen3", _LLAMA | {"head_dim": 8}),
    "gemma2": (
        "gemma2",
        _GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "gemma3": ("gemma3_text", _GEMMA | {"final_logit_softcapping": 3.0}),
    "phi3": ("phi3", _LLAMA | {"sliding_window": 5}),
    "olmo2": ("olmo2", _LLAMA),
}


def tiny_model(family: str, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A random causal LM in evaluation mode, with weights far enough from zero to tell mistakes apart."""
    kind, settings = FAMILIES[family]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **_COMMON | settings))
        return randomize(model, norm=0.0 if kind.startswith("gemma") else 1.0).to(dtype).eval()


@torch.no_grad()
def randomize(model: torch.nn.Module, norm: float = 1.0) -> Any:
    """Spread all weights: biases too, which fresh models leave at 0, and norms around ``norm``."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
        else:
            parameter.normal_(norm if name.endswith("weight") else 0.0, 0.3)
    return model


def ragged_samples(lengths: list[int], *, seed: int = 0, vocab: int = VOCAB) -> Samples:
    """Random samples that read 1 … tokens each (one more with the last label), with random target starts."""
    rng = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    starts = [int(torch.randint(1, n, (), generator=rng)) for n in lengths]
    return Samples(torch.randint(2, vocab, (int(offsets[-1]),), generator=rng), offsets, torch.tensor(starts))


def alone(model: Any, samples: Samples, i: int) -> torch.Tensor:
    """Logits of the plain model on one sample, unpacked and unpadded, at its target tokens [m, V]."""
    ids = samples.input_ids[samples.offsets[i] : samples.offsets[i + 1] - 1]
    logits: torch.Tensor = model(input_ids=ids[None], use_cache=False).logits[0]
    return logits[samples.target_start[i] - 1 :]
