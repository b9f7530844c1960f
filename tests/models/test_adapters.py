"""Models that carry adapters are refused before any work, and models whose adapters were merged are not.

The look-alikes below leave in a model what peft leaves in it; peft need not be installed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_model
from torch import Tensor, nn

from fastedit import Editor, ModelError, WeightDelta
from fastedit.models import Model, fingerprint, topology


class Lora(nn.Module):
    """As peft's layer of LoRA: the layer that it stands for, and two matrices for each adapter."""

    def __init__(self, base: nn.Linear, *names: str) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.ModuleDict({name: nn.Linear(base.in_features, 2, bias=False) for name in names})
        self.lora_B = nn.ModuleDict({name: nn.Linear(2, base.out_features, bias=False) for name in names})

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base_layer(x)
        for name, down in self.lora_A.items():
            y = y + self.lora_B[name](down(x))
        return y


class Copied(nn.Module):
    """As peft's wrapper of a module that is trained whole (`modules_to_save`)."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.original_module = module

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.original_module(x)
        return y


class Peft(nn.Module):
    """As PeftModel, whose configurations are a property."""

    def __init__(self, model: nn.Module, **configs: Any) -> None:
        super().__init__()
        self.base_model = model
        self._configs = configs

    @property
    def peft_config(self) -> dict[str, Any]:
        return self._configs


def inject(model: Any, *names: str) -> Any:
    for block in model.model.layers:
        for projection in ("q_proj", "v_proj"):
            setattr(block.self_attn, projection, Lora(getattr(block.self_attn, projection), *names))
    return model


def added(model: Any) -> Any:
    """As after `model.add_adapter(LoraConfig(target_modules=["q_proj", "v_proj"]))`."""
    model = inject(model, "default")
    model.peft_config, model._hf_peft_config_loaded = {"default": object()}, True
    return model


def deleted(model: Any) -> Any:
    """As after `model.delete_adapter("default")`: the layers stay."""
    return inject(model)


def marked(model: Any) -> Any:
    model._hf_peft_config_loaded = True
    return model


def head_copied(model: Any) -> Any:
    model.lm_head = Copied(model.lm_head)
    model.get_output_embeddings = lambda: model.lm_head.original_module
    return model


REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "added": (added, r"the adapter 'default' in 8 modules, model\.layers\.0\.self_attn\.q_proj among them, not merged"),
    "wrapped": (
        lambda m: Peft(inject(m, "facts", "style"), facts=1, style=2),
        "the adapters 'facts', 'style' in 8 mod",
    ),
    "compiled": (lambda m: torch.compile(Peft(inject(m, "a"), a=1)), "the adapter 'a' in 8 modules"),
    "prompts": (lambda m: Peft(m, soft=1), "carries the adapter 'soft', not merged"),
    "deleted": (deleted, "an adapter in 8 modules"),
    "marked": (marked, "carries an adapter, not merged"),
    "head copied": (head_copied, "an adapter in 1 modules, lm_head among them"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_an_adapter_is_refused_by_name_with_what_to_do(kind: str, tokenizer: Any) -> None:
    make, message = REFUSED[kind]
    model = make(tiny_model("llama"))
    for use in (
        lambda: Editor(model, tokenizer),
        lambda: Model.of(model, tokenizer),
        lambda: topology(model),
        lambda: fingerprint(model),
        lambda: WeightDelta({}, {}).apply(model, force=True),
    ):
        with pytest.raises(
            ModelError, match=rf"LlamaForCausalLM carries .*{message.split('carries ')[-1]}.*merge_and_unload\(\)"
        ):
            use()


def merged(model: Any) -> Any:
    """As after `merge_and_unload`, which leaves the configurations."""
    model.peft_config = {"default": object()}
    return model


@pytest.mark.parametrize("wrap", [lambda m: m, torch.compile, nn.Sequential])
def test_a_merged_model_is_none_with_an_adapter(wrap: Callable[[Any], Any], tokenizer: Any) -> None:
    model = merged(tiny_model("llama"))
    assert Editor(wrap(model), tokenizer).parts.network is model


@pytest.mark.parametrize("alone", [True, False])
def test_a_folder_of_an_adapter_is_refused(alone: bool, tokenizer: Any, tmp_path: Path) -> None:
    """Before transformers takes the model that the adapter was made for instead."""
    path = tmp_path / "tuned"
    path.mkdir()
    if not alone:
        tiny_model("llama").save_pretrained(path)
    tokenizer.save_pretrained(path)
    (path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    with pytest.raises(ModelError, match=rf"{path} holds an adapter of org/base.*merge_and_unload\(\)") as caught:
        Editor.from_pretrained(path, device="cpu")
    assert ("take adapter_config.json away" in str(caught.value)) is not alone
    (path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": None}))
    with pytest.raises(ModelError, match="holds an adapter of MODEL"):
        Editor.from_pretrained(path, device="cpu")
