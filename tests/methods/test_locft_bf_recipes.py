"""LocFT-BF's choices where nothing is given, and choices that it cannot take."""

from __future__ import annotations

import inspect
import json
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import MakeEdits, state, tiny_model
from locft_loop import DOWN_PROJ, changed, run
from transformers import AutoConfig, AutoModelForCausalLM

from fastedit import ConfigError, EditRequest, ModelError, RequestError
from fastedit.methods import LocFTBFConfig
from fastedit.methods.locft_bf.method import plan
from fastedit.methods.locft_bf.recipes import batch_size_for
from fastedit.methods.presets import locft_bf_preset
from fastedit.models import Model, topology


def test_batch_size_is_the_published_one_and_keeps_30_steps() -> None:
    assert batch_size_for(3000) == batch_size_for(100_000) == 100
    assert batch_size_for(200) == 6
    assert batch_size_for(3) == 1
    for n in range(30, 4000, 7):
        assert -(-n // batch_size_for(n)) >= 30


def published_model(kind: str, h: int, blocks: int, vocabulary: int) -> Any:
    """A model of these shapes without memory."""
    config = AutoConfig.for_model(
        kind,
        hidden_size=h,
        num_hidden_layers=blocks,
        vocab_size=vocabulary,
        intermediate_size=64,
        num_attention_heads=32 if h % 32 == 0 else 28,
        num_key_value_heads=4,
    )
    with torch.device("meta"):
        return topology(AutoModelForCausalLM.from_config(config))


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [
        (("llama", 4096, 32, 128256), (22, "down_proj", 5e-4)),  # Llama-3-8B
        (("qwen2", 3584, 28, 152064), (6, "down_proj", 5e-4)),  # Qwen2.5-7B
        (("mistral", 4096, 32, 32000), (23, "block", 5e-5)),  # Mistral-7B-v0.1
        (("qwen2", 8192, 80, 152064), (19, "down_proj", None)),  # Qwen2.5-72B
    ],
)
def test_published_models_get_their_preset(shape: Any, wanted: tuple[Any, ...]) -> None:
    preset, is_published = locft_bf_preset(published_model(*shape))
    assert is_published
    assert (preset.layer, preset.module, preset.lr) == wanted


@pytest.mark.parametrize(
    "shape",
    [
        ("llama", 4096, 32, 32000),  # Llama-2-7B: the shape of Mistral-7B, and Llama-3-8B but for its tokens
        ("mistral", 4096, 32, 128256),
        ("llama", 4096, 16, 128256),
    ],
)
def test_other_models_get_two_thirds_of_their_depth(shape: Any) -> None:
    preset, is_published = locft_bf_preset(published_model(*shape))
    assert not is_published
    assert (preset.layer, preset.module, preset.lr) == (22 * shape[2] // 32, "down_proj", None)


def test_a_preset_is_used_and_noted(tokenizer: Any, make_edits: MakeEdits, monkeypatch: pytest.MonkeyPatch) -> None:
    module = inspect.getmodule(locft_bf_preset)
    preset = module.LocFTBFPreset(1, "block", 2e-4)
    monkeypatch.setitem(module._LOCFT_BF, ("llama", 32, 4, 97), preset)
    result = plan(Model.of(tiny_model("llama"), tokenizer), make_edits(5), LocFTBFConfig(epochs=1)).run()
    assert (result.config["layer"], result.config["module"], result.config["lr"]) == (1, "block", 2e-4)
    assert sum("published preset" in note for note in result.notes) == 3


def test_what_is_chosen_is_said_and_fits_the_weights(tokenizer: Any, make_edits: MakeEdits) -> None:
    """The rate is 5e-4 for weights of 0.02: it grows with the scale of the weights that it moves."""
    rates = []
    for scale in (1, 10):
        model = tiny_model("llama")
        weight = model.get_parameter("model.layers.2.mlp.down_proj.weight")
        weight.data *= scale * 0.02 / weight.square().mean().sqrt()
        result = plan(Model.of(model, tokenizer), make_edits(61), LocFTBFConfig(epochs=1)).run()
        assert list(result.updates) == ["model.layers.2.mlp.down_proj.weight"]  # 22/32 of 4 blocks
        assert result.config["batch_size"] == 2
        rates.append(result.config["lr"])
        notes = "\n".join(result.notes)
        for said in ("layer 2", "module down_proj", f"lr {rates[-1]:.3g}", "batch_size 2"):
            assert said in notes
    assert rates == pytest.approx([5e-4, 5e-3], rel=1e-5)


def test_absent_layers_and_modules_are_errors_that_list_what_there_is(tokenizer: Any, make_edits: MakeEdits) -> None:
    model = tiny_model("gpt2")
    before = state(model)
    with pytest.raises(ModelError, match=r"layer 4 .*blocks 0 to 3"):
        run(model, tokenizer, make_edits(5), layer=4)
    with pytest.raises(ModelError, match=r"no gate_proj.*down_proj"):
        run(model, tokenizer, make_edits(5), module="gate_proj")
    with pytest.raises(ModelError, match=r"'mlp\.w1'.*mlp\.c_proj"):
        run(model, tokenizer, make_edits(5), module="mlp.w1")
    with pytest.raises(ModelError, match="no weights"):
        run(model, tokenizer, make_edits(5), module="mlp.act")
    assert not changed(model, before)


def test_weights_from_which_no_rate_follows_are_named(tokenizer: Any, make_edits: MakeEdits) -> None:
    """Where a rate is given, the weights may be zeros."""
    cases = ((torch.nan, f"{DOWN_PROJ}.weight is not finite"), (0.0, f"{DOWN_PROJ} are all zero, .*give lr"))
    for value, said in cases:
        model = tiny_model("llama")
        weight = model.get_parameter(f"{DOWN_PROJ}.weight").data
        weight[1 if value else slice(None)] = value
        before = state(model)
        with pytest.raises(ModelError, match=said):
            run(model, tokenizer, make_edits(3), epochs=1, lr=None)
        assert value or not changed(model, before)
    run(model, tokenizer, make_edits(3), epochs=1, lr=1e-3)


@pytest.mark.parametrize("augment", [0, 2])
def test_a_prompt_longer_than_the_context_names_its_edit(augment: int, tokenizer: Any, make_edits: MakeEdits) -> None:
    """63 words and two of the target fill the context of 64 tokens but for one; a context does not fit."""
    edits = make_edits(5)
    longest = EditRequest(" ".join(["w9"] * 63), "w10", id="just fits")
    run(tiny_model("llama"), tokenizer, [*edits, longest], epochs=1)
    if not augment:
        longest = replace(longest, prompt=longest.prompt + " w9", id="too long")
    remedy = "prompt, or take shorter contexts" if augment else "prompt that begins 'w9"
    with pytest.raises(RequestError, match=f"edit {longest.id}.*context of 64; shorten the {remedy}"):
        run(tiny_model("llama"), tokenizer, [*edits, longest], augment=augment)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("batch_size", 0),
        ("batch_size", "all"),
        ("epochs", 0),
        ("lr", 0.0),
        ("lr", float("nan")),
        ("augment", -1),
        ("stop_loss", float("nan")),
        ("skip_loss", -0.1),
        ("weight_decay", -0.1),
        ("loss_average", "batch"),
        ("schedule", "width-first"),
        ("lr", "x"),
        ("lr", True),
        ("epochs", "3"),
        ("epochs", 1.5),
        ("augment", None),
        ("weight_decay", None),
        ("layer", "3"),
        ("layer", 3.0),
        ("module", 5),
        ("shuffle", "yes"),
        ("cache_bytes", "1G"),
        ("cache_bytes", -5),
        ("seed", None),
        ("seed", 1.5),
        ("seed", -1),
        ("seed", 2**64),
        ("preserve", "all"),
        ("null_space", 0.0),
        ("null_space", 1.0),
        ("null_space", float("nan")),
        ("anchors", 0),
        ("anchor_weight", 0.0),
        ("anchor_weight", float("inf")),
        ("weight_decay", float("inf")),
    ],
)
def test_values_that_a_field_cannot_take(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{field} is {value!r}; (give|choose)"):
        LocFTBFConfig(**{field: value})


def test_values_that_only_look_different_are_taken() -> None:
    """Whole numbers where a number is wanted, and numbers of numpy, which no file of an edit could hold as they are."""
    config = LocFTBFConfig(lr=1, epochs=np.int64(3), layer=np.int32(2), stop_loss=np.float32(0.5), seed=2**63 - 1)  # type: ignore[arg-type]
    assert json.loads(json.dumps(asdict(config))) == asdict(replace(config, lr=1.0, epochs=3, layer=2, stop_loss=0.5))
