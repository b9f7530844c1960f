"""Quantized maps stand frozen around an edited matrix of floating point; what is edited may not be one."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CONTEXTS, moments, random_edits, same, tiny_model, values
from torch import Tensor, nn

from fastedit import Editor, FileError, ModelError, WeightDelta
from fastedit.evaluation.locate import locate
from fastedit.models import Model, fingerprint, self_check, topology

EDITED = (1, 2)  # blocks whose last matrix is left in floating point


class Int8(nn.Module):
    """A linear map as packages for 8 bits have it: numbers and scales in buffers, and nothing called a weight."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        scale = weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("numbers", (weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def dequantized(self) -> Tensor:
        found: Tensor = self.numbers * self.scale  # type: ignore[operator]
        return found

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.dequantized().to(x.dtype))


class Packed(nn.Linear):
    """Another way: a parameter of whole numbers under the old name, in a class of its own."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(*weight.shape[::-1], bias=False)
        inner = Int8(weight)
        self.register_buffer("scale", inner.scale)
        self.weight = nn.Parameter(inner.numbers.view(torch.uint8).view(-1, 1), requires_grad=False)

    def dequantized(self) -> Tensor:
        found: Tensor = self.weight.view(torch.int8).view(self.out_features, self.in_features) * self.scale
        return found

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.dequantized().to(x.dtype))


def quantized(kind: Callable[[Tensor], nn.Module], plain: tuple[int, ...] = EDITED) -> tuple[Any, Any]:
    """A model with quantized maps but for some blocks' last matrices, and the same in floating point."""
    model = tiny_model("llama")
    exact = deepcopy(model)
    for path, module in list(model.model.layers.named_modules()):
        if isinstance(module, nn.Linear) and path not in [f"{layer}.mlp.down_proj" for layer in plain]:
            made: Any = kind(module.weight.detach())
            model.model.layers.set_submodule(path, made)
            exact.model.layers.get_submodule(path).weight.data = made.dequantized()
    return model.eval(), exact


EDITS = random_edits(4, 0)
METHODS: dict[str, dict[str, Any]] = {
    "locft-bf": {"published": True, "layer": 2, "epochs": 3, "lr": 1e-3},
    "memit": {"layers": EDITED, "contexts": CONTEXTS, "steps": 3, "lr": 0.5, "unchecked_statistics": True},
}


@pytest.mark.parametrize("kind", [Int8, Packed])
@pytest.mark.parametrize("method", METHODS)
def test_edits_are_those_of_the_same_weights_in_floating_point(
    method: str, kind: Any, tokenizer: Any, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastedit.evaluation.questions._NEW_TOKENS", 4)  # one more than the longest target
    model, exact = quantized(kind)
    found, deltas = [], []
    before = values(model)
    for network in (model, exact):
        config = dict(METHODS[method])
        if method == "memit":
            moments(network, tmp_path / "statistics", seed, layers=EDITED)
            config["statistics"] = str(tmp_path / "statistics")
        editor = Editor(network, tokenizer, method, **config)
        result = editor.edit(EDITS)
        found.append(editor.evaluate(EDITS).to_dict())
        deltas.append(result.delta)
    one, other = deltas
    for path, update in other.updates.items():
        wide, narrow = (u if isinstance(u, Tensor) else u.dense() for u in (update, one.updates[path]))
        torch.testing.assert_close(narrow, wide, rtol=1e-3, atol=1e-5)
    assert found[0]["reliability"] == found[1]["reliability"]
    one.revert()
    assert same(model, before)
    one.save(tmp_path / "delta")
    again = WeightDelta.load(tmp_path / "delta")
    again.apply(model)
    again.revert()
    again.apply(tiny_model("llama"), force=True)


USES: list[tuple[Any, tuple[int, ...]]] = [
    (lambda m, t: Editor(m, t, **METHODS["locft-bf"] | {"layer": (0, 2, 3)}).plan(EDITS), (0, 3)),
    (lambda m, t: Editor(m, t, "memit", layers=(0, 1, 2)).plan(EDITS), (0,)),
    (lambda m, t: locate(Model.of(m, t), EDITS, layers=[0, 2], sample=2), (0,)),
]
DELTA = (lambda m, t: WeightDelta({down(0): torch.ones(1)}, {}).apply(m, force=True), (0,))


# an Int8 has no parameter that a delta could name
@pytest.mark.parametrize(
    ("kind", "use", "named"), [*((k, *use) for k in (Int8, Packed) for use in USES), (Packed, *DELTA)]
)
def test_what_is_quantized_is_not_edited(kind: Any, use: Any, named: tuple[int, ...], tokenizer: Any) -> None:
    """All such matrices are named, and the argument by which they are loaded otherwise."""
    model, _ = quantized(kind)
    paths = [down(layer).removesuffix(".weight") for layer in named]
    with pytest.raises(ModelError) as caught:
        use(model, tokenizer)
    said = str(caught.value)
    assert f"{len(named)} matrices to edit are quantized ({kind.__name__}): {', '.join(paths)};" in said
    assert f"llm_int8_skip_modules={[*paths, 'lm_head']}" in said


def down(layer: int) -> str:
    return f"model.layers.{layer}.mlp.down_proj.weight"


def test_a_model_is_refused_that_is_quantized_wholly_or_outside_its_blocks(tokenizer: Any) -> None:
    model, _ = quantized(Int8, ())
    with pytest.raises(ModelError, match=r"1 matrices to edit are quantized \(Int8\): model.layers.1.mlp.down_proj;"):
        Editor(model, tokenizer)
    model, _ = quantized(Int8)
    model.lm_head = Int8(model.lm_head.weight.detach())
    with pytest.raises(ModelError, match=r"the head to the vocabulary, a Int8, is quantized.*llm_int8_skip_modules"):
        Editor(model, tokenizer)


def test_it_is_measured_and_known_by_its_quantized_weights(tokenizer: Any, tmp_path: Path) -> None:
    """Also of a type that is not measured otherwise; a model that is not to be saved is refused before the work."""
    model, exact = quantized(Int8)
    check = self_check(topology(model))
    assert check.problem is None
    assert check.path == down(1).removesuffix(".weight")
    before = fingerprint(model)
    model.model.layers[3].mlp.up_proj.numbers[0, 0] += 1
    assert fingerprint(model) != before != fingerprint(exact)
    editor = Editor(model, tokenizer)
    with pytest.raises(FileError, match=r"some of its weights are quantized.*save the delta.*force=True"):
        editor.save_model(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("how", ["bitsandbytes 8", "bitsandbytes 4", "torchao"])
def test_packages_for_quantized_weights(how: str, tokenizer: Any, tmp_path: Path) -> None:
    package, _, bits = how.partition(" ")
    pytest.importorskip(package, reason=f"{package} is not installed, which quantizes weights")
    transformers: Any = pytest.importorskip("transformers")
    skipped = ["model.layers.2.mlp.down_proj", "lm_head"]
    if package == "torchao":
        weights = pytest.importorskip("torchao.quantization").Int8WeightOnlyConfig()
        quantization = transformers.TorchAoConfig(weights, modules_to_not_convert=skipped)
    else:
        options = {"load_in_8bit": True} if bits == "8" else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
        quantization = transformers.BitsAndBytesConfig(**options, llm_int8_skip_modules=skipped)
    tiny_model("llama").save_pretrained(tmp_path / "plain")
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(tmp_path / "plain", quantization_config=quantization, dtype=torch.float32)
    model.save_pretrained(tmp_path / "quantized")
    tokenizer.save_pretrained(tmp_path / "quantized")
    editor = Editor.from_pretrained(tmp_path / "quantized", device="cpu", **METHODS["locft-bf"] | {"lr": 0.02})
    assert fingerprint(editor.model) == fingerprint(model)
    result = editor.edit(EDITS[:1] * 1)
    assert result.losses[-1] < result.losses[0]
    result.revert()
    with pytest.raises(ModelError, match=r"1 matrices to edit are quantized .*: model.layers.1.mlp.down_proj;"):
        Editor(editor.model, tokenizer, "memit", layers=(1,)).plan(EDITS)
