"""Topology: every family's parts are found, and what a model lacks is said with what it has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import FAMILIES, random_edits, randomize, tiny_model
from torch import nn
from torch.nn.utils import parametrizations, prune
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
)

from fastedit import Editor, EditRequest, WeightDelta
from fastedit.errors import ModelError, RequestError
from fastedit.models import fingerprint, topology
from fastedit.models.editable import check_editable

GATED = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "olmo2")
# family -> list of blocks, and where block 1 keeps attention, MLP, up, gate and down
PATHS = {
    "gpt2": ("transformer.h", "attn", "mlp", "mlp.c_fc", None, "mlp.c_proj"),
    "gptj": ("transformer.h", "attn", "mlp", "mlp.fc_in", None, "mlp.fc_out"),
    "gpt_neox": (
        "gpt_neox.layers",
        "attention",
        "mlp",
        "mlp.dense_h_to_4h",
        None,
        "mlp.dense_4h_to_h",
    ),
    "opt": ("model.decoder.layers", "self_attn", None, "fc1", None, "fc2"),
    "phi3": (
        "model.layers",
        "self_attn",
        "mlp",
        "mlp.gate_up_proj",
        "mlp.gate_up_proj",
        "mlp.down_proj",
    ),
} | {family: ("model.layers", "self_attn", "mlp", "mlp.up_proj", "mlp.gate_proj", "mlp.down_proj") for family in GATED}


@pytest.mark.parametrize("family", PATHS)
def test_parts_are_where_the_family_keeps_them(family: str) -> None:
    model = tiny_model(family)
    found = topology(model)
    blocks, *parts = PATHS[family]
    assert found.blocks_path == blocks
    assert found.blocks is model.get_submodule(blocks)
    assert found.n_blocks == 4
    assert found.head is model.get_output_embeddings()
    assert (found.hidden_size, found.context_length) == (32, 64)
    assert found.resolve(1, "block") == (f"{blocks}.1", found.blocks[1])
    for name, inside in zip(("attn", "mlp", "up_proj", "gate_proj", "down_proj"), parts, strict=True):
        if inside is None:
            with pytest.raises(ModelError, match=rf"block 1 .* has no {name}; it has down_proj"):
                found.resolve(1, name)
        else:
            path, module = found.resolve(1, name)
            assert path == f"{blocks}.1.{inside}"
            assert module is model.get_submodule(path)
            assert found.resolve(1, inside) == found.resolve(1, path) == (path, module)
    assert found.attn(2) is model.get_submodule(f"{blocks}.2.{parts[0]}")


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_models_own(family: str) -> None:
    model = tiny_model(family)
    ids = torch.arange(2, 19)[None]
    found = topology(model)
    with torch.no_grad():
        hidden = found.backbone(input_ids=ids, use_cache=False)[0]
        torch.testing.assert_close(found.logits(hidden[0]), model(ids).logits[0], rtol=0, atol=0)


def test_a_square_mlp_is_no_riddle() -> None:
    config = AutoConfig.for_model("gpt2", n_embd=32, n_inner=32, n_layer=3, n_head=4, n_positions=32, vocab_size=50)
    model = AutoModelForCausalLM.from_config(config)
    assert topology(model).resolve(2, "down_proj")[0] == "transformer.h.2.mlp.c_proj"
    assert topology(model).resolve(2, "up_proj")[0] == "transformer.h.2.mlp.c_fc"


def test_absent_layers_and_modules_are_listed() -> None:
    found = topology(tiny_model("llama"))
    for layer in (-1, 4):
        with pytest.raises(ModelError, match=rf"layer {layer} does not exist: .* blocks 0 to 3 \(model\.layers\)"):
            found.resolve(layer, "down_proj")
    with pytest.raises(ModelError, match=r"'mlp\.c_proj'.* choose one of down_proj, .*mlp\.gate_proj"):
        found.resolve(1, "mlp.c_proj")
    with pytest.raises(ModelError, match=r"does not exist in block 1"):  # a path that names another block
        found.resolve(1, "model.layers.2.mlp.down_proj")
    with pytest.raises(ModelError, match=r"does not exist in block 1"):
        found.resolve(1, "mlp.down")  # a part of a name is no name


def test_a_module_that_was_replaced_is_found_anew() -> None:
    parts = topology(tiny_model("llama"))
    mlp = parts.mlp(1)
    assert parts.resolve(1, "down_proj") == ("model.layers.1.mlp.down_proj", mlp.down_proj)
    mlp.down_proj = other = nn.Linear(56, 32, bias=False)
    assert parts.resolve(1, "down_proj") == ("model.layers.1.mlp.down_proj", other)
    assert other in parts.writers(1)
    parts.blocks[1].mlp = nn.Identity()
    assert not parts.rowwise(1)
    with pytest.raises(ModelError, match=r"block 1 of .* has no attention and MLP that can be told apart"):
        parts.mlp(1)
    assert parts.mlp(2) is parts.blocks[2].mlp


def test_a_wrapped_model_is_found() -> None:
    model = tiny_model("llama")
    wrapped = nn.Sequential(nn.Sequential(model))
    assert topology(wrapped).model is model
    assert topology(wrapped).resolve(3, "down_proj")[0] == "model.layers.3.mlp.down_proj"


def test_of_two_models_in_a_wrapper_none_is_chosen() -> None:
    model = tiny_model("llama")
    wrapped = nn.ModuleDict({"policy": nn.Sequential(model), "reference": tiny_model("gpt2")})
    with pytest.raises(ModelError, match=r"ModuleDict holds 2 models \(policy\.0, reference\); give one"):
        topology(wrapped)
    assert topology(nn.ModuleDict({"policy": model, "again": model})).model is model


def test_models_without_the_expected_parts_say_what_is_missing() -> None:
    with pytest.raises(ModelError, match="not a Hugging Face causal language model"):
        topology(nn.Linear(2, 2))
    mamba = AutoConfig.for_model("mamba", hidden_size=32, num_hidden_layers=2, vocab_size=50)
    with pytest.raises(ModelError, match=r"block 0 of .* \(mamba\) has no attention and MLP that can be told apart"):
        topology(AutoModelForCausalLM.from_config(mamba)).resolve(0, "down_proj")
    with pytest.raises(ModelError, match="no head to the vocabulary"):
        topology(AutoModel.from_config(tiny_model("llama").config))
    cut = tiny_model("llama")
    del cut.model.layers[0]
    with pytest.raises(ModelError, match="looked for one list of 4 equal blocks"):
        topology(cut)
    headed = tiny_model("llama")
    headed.lm_head = nn.Sequential(headed.lm_head, nn.Tanh())
    with pytest.raises(ModelError, match=r"the head of .* is a Sequential without a weight"):
        check_editable(topology(headed))
    looped = tiny_model("llama")
    looped.model.layers[3] = looped.model.layers[1]
    with pytest.raises(ModelError, match=r"1 blocks of .* stand lower down already: 3"):
        topology(looped)
    listing = tiny_model("llama")
    listing.model.layers[0].register_forward_hook(lambda _, __, output: [output])
    with pytest.raises(ModelError, match=r"block 0 of .* returns a list"):
        assert topology(listing).packs


def test_the_text_part_of_a_vision_model() -> None:
    text = tiny_model("gemma3").config.to_dict()
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 4,  # as many blocks as the text part: only the embedding tells them apart
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    model = randomize(
        Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4))
    ).eval()
    found = topology(model)
    assert found.blocks is model.model.language_model.layers
    ids = torch.arange(2, 19)[None]
    with torch.no_grad():
        hidden = found.backbone(input_ids=ids, use_cache=False)[0]
        torch.testing.assert_close(found.logits(hidden), model(ids).logits, rtol=0, atol=0)


class Elsewhere(nn.Parameter):
    """A parameter that says it is on another device."""

    device = torch.device("cuda:1")  # type: ignore[assignment]


DOWN = "model.layers.1.mlp.down_proj.weight"  # [32, 56]


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (nn.Parameter(torch.ones(32, 56, dtype=torch.int8), False), "holds torch.int8: it is quantized; load"),
        (nn.Parameter(torch.ones(896, 1, dtype=torch.uint8), False), "holds torch.uint8: it is quantized"),
        (nn.Parameter(torch.ones(32, 56).to(torch.float8_e4m3fn), False), "holds torch.float8_e4m3fn: it is quantized"),
        (nn.Parameter(torch.ones(448, 1)), r"has shape \(448, 1\), expected \(32, 56\): it is quantized or sharded"),
        (nn.Parameter(torch.ones(32, 56, device="meta")), "is on the meta device: it was never loaded; .* one device"),
        (Elsewhere(torch.ones(32, 56)), r"is on cuda:1, but the last block on cpu; load .* one device"),
    ],
)
def test_weights_that_cannot_be_edited_are_named(weight: nn.Parameter, message: str, tokenizer: Any) -> None:
    """Before any work, and with what to do."""
    model = tiny_model("llama")
    model.get_submodule(DOWN.removesuffix(".weight")).weight = weight
    for use in (
        lambda: Editor(model, tokenizer),
        lambda: WeightDelta({DOWN: torch.ones(32, 56)}, {}).apply(model, force=True),
        lambda: fingerprint(model),
    ):
        with pytest.raises(ModelError, match=DOWN.replace(".", r"\.") + " " + message):
            use()


@pytest.mark.parametrize("method", ["locft-bf", "memit"])
def test_a_weight_of_two_blocks_is_not_edited(method: str, tokenizer: Any) -> None:
    model, edits = tiny_model("llama"), random_edits(2, 0)
    model.model.layers[2].mlp.down_proj.weight = model.model.layers[0].mlp.down_proj.weight
    for layer, other in ((0, 2), (2, 0)):
        given: dict[str, Any] = {"layer": layer} if method == "locft-bf" else {"layers": (layer,)}
        editor = Editor(model, tokenizer, method, **given)
        with pytest.raises(ModelError, match=rf"{layer}\.mlp\.down_proj\.weight is a weight of block {other} too"):
            editor.plan(edits)
    Editor(model, tokenizer, layer=2, module="up_proj").plan(edits)


@pytest.mark.parametrize("method", ["locft-bf", "memit"])
@pytest.mark.parametrize(
    "make",
    [
        parametrizations.weight_norm,
        parametrizations.orthogonal,
        lambda module: prune.l1_unstructured(module, "weight", 0.5),
        nn.utils.spectral_norm,
    ],
    ids=["weight_norm", "orthogonal", "pruned", "spectral_norm"],
)
def test_a_weight_that_is_made_of_others_is_not_edited(make: Any, method: str, tokenizer: Any) -> None:
    model, edits = tiny_model("llama"), random_edits(2, 0)
    make(model.get_submodule(DOWN.removesuffix(".weight")))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for module in ("down_proj", "mlp") if method == "locft-bf" else ("down_proj",):
        layers: dict[str, Any] = {"layer": 1} if method == "locft-bf" else {"layers": (1, 2)}
        editor = Editor(model, tokenizer, method, module=module, **layers)
        with pytest.raises(ModelError, match=rf"^1 weights to edit are not parameters: {DOWN}\. .*remove_param"):
            editor.plan(edits)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    Editor(model, tokenizer, layer=2, module="down_proj").plan(edits)


@pytest.mark.parametrize("family", ["phi3", "llama"])
def test_samples_are_shorter_than_what_changes_the_rotation_of_all(family: str, tokenizer: Any) -> None:
    """With LongRoPE a row that is longer than the first context rotates by other angles."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [9.0] * 4}
    more = {"rope_parameters": rope | {"original_max_position_embeddings": 13}, "original_max_position_embeddings": 13}
    config = AutoConfig.for_model(**tiny_model(family).config.to_dict() | more)
    model = randomize(AutoModelForCausalLM.from_config(config)).eval()
    editor = Editor(model, tokenizer, layer=1)
    assert editor.topology.context_length == 13
    with pytest.raises(RequestError, match="more than the model's context of 13"):
        editor.plan([EditRequest("w9 " * 14, "w10")])


def test_packing_is_found_out_without_dropout() -> None:
    assert not topology(tiny_model("opt")).packs
    model = tiny_model("gpt2")
    assert model.config.attn_pdrop > 0
    model.train()
    assert topology(model).packs
    assert model.training
    assert all(module.training for module in model.modules())
