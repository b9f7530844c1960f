"""`fastedit check-model` and `fastedit env`: what they tell of a model and of the machine."""

from __future__ import annotations

from pathlib import Path

import torch
from calling import fails, works
from capitals import save
from transformers import AutoConfig, AutoTokenizer

from fastedit import methods


def test_check_model_tells_what_was_found_and_what_differs(model: Path, tmp_path: Path) -> None:
    text = works("check-model", model).stdout
    assert text == works("check-model", "--model", model).stdout
    assert "this model can be edited" in text
    for words in ("LlamaForCausalLM (llama), 3 blocks", "down_proj mlp.down_proj", "share rows", "logits", "gradient"):
        assert words in text
    assert "locft-bf" in text
    assert "memit" in text

    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    byte_level = AutoTokenizer.from_pretrained(model)
    routed = save(AutoConfig.for_model("mixtral", **sizes | heads), byte_level, tmp_path / "mixtral")
    text = " ".join(works("check-model", routed).stdout.split())
    assert "have a row each" in text
    assert text.count("not with its defaults: model.layers.") == len(methods.METHODS)
    assert "experts" in text

    mamba = save(AutoConfig.for_model("mamba", **sizes), byte_level, tmp_path / "mamba")
    assert "(mamba) has no attention and MLP that can be told apart" in fails(1, "check-model", mamba)
    assert "give the folder" in fails(2, "check-model")


def test_env_tells_versions_and_backends() -> None:
    text = works("env").stdout
    assert torch.__version__ in text
    assert "ops.target_cross_entropy" in text
