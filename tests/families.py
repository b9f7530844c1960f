"""Configs of tiny models of types that are measured when they are loaded, by what is special about them."""

from __future__ import annotations

from typing import Any

_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_HEADS = {"head_dim": 8}
_EXPERTS: dict[str, Any] = {
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
}
_LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "head_dim": 4,
}
_ENDS = "full_attention"
# model type -> what its config has besides the sizes
DENSE: dict[str, dict[str, Any]] = {
    "smollm3": {},
    "olmo": {},
    "olmo3": {},  # norms after attention and MLP
    "exaone4": _HEADS,  # the same
    "granite": {"logits_scaling": 4.0, "residual_multiplier": 0.5},
    "seed_oss": _HEADS,
    "ministral3": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 8,
        }
    },
    "cohere2": {"logit_scale": 0.25},
    "glm4": _HEADS,
    "gemma": _HEADS,
    "gemma4_text": _HEADS | {"global_head_dim": 8, "hidden_size_per_layer_input": 0},
    "starcoder2": {},
    "stablelm": {},
    "nemotron": {},
    "nanochat": {"final_logit_softcapping": 3.0},
    "persimmon": {},
    "falcon": {},  # attention and MLP side by side; positions do not restart
    "bloom": {"n_layer": 4, "n_head": 4},  # ALiBi; an MLP that adds the residual
    "mpt": {"d_model": 32, "n_layers": 4, "n_heads": 4, "max_seq_len": 64},  # the same
    "xglm": {"d_model": 32, "ffn_dim": 56, "num_layers": 4, "attention_heads": 4},  # no MLP module
    "gpt_neo": {"num_layers": 4, "num_heads": 4, "window_size": 5, "attention_types": [[["global", "local"], 2]]},
    "qwen3_5_text": _HEADS | _LINEAR | {"layer_types": [_ENDS, "linear_attention", "linear_attention", _ENDS]},
    "lfm2": {"layer_types": [_ENDS, "conv", "conv", _ENDS]},
    "falcon_h1": _HEADS
    | {
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_chunk_size": 16,
        "lm_head_multiplier": 0.5,
    },
}
SHARED: dict[str, dict[str, Any]] = {  # blocks with a router and an expert for all tokens
    "qwen2_moe": _EXPERTS,
    "deepseek_v3": _EXPERTS | _LATENT | {"first_k_dense_replace": 1},
    "llama4_text": _EXPERTS | _HEADS,
    "glm4_moe": _EXPERTS | _HEADS | {"first_k_dense_replace": 1},
    "qwen3_next": _EXPERTS | _HEADS | _LINEAR | {"layer_types": ["linear_attention", _ENDS] * 2},
}
ROUTED: dict[str, dict[str, Any]] = {  # and without
    "qwen3_moe": _EXPERTS | _HEADS | {"mlp_only_layers": [1]},
    "gpt_oss": _EXPERTS | _HEADS,
    "mixtral": _EXPERTS,
}

UNVERIFIED = {name: _SIZES | settings for name, settings in (DENSE | SHARED | ROUTED).items()}
