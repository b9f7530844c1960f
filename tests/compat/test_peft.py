"""Edits as LoRA adapters: `peft` computes what the edited model computes, and what LoRA cannot carry is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from fastedit import ConfigError, Editor, FileError, ModelError, WeightDelta
from fastedit.compat.peft import as_adapter, export_peft
from fastedit.demo import World, checkpoint_path
from fastedit.models import fingerprint, topology
from fastedit.weights import LowRank, norm, truncated

IDS = torch.tensor([[3, 40, 41, 42, 17], [9, 60, 5, 33, 71]])
WITHOUT_PEFT = "peft is not installed (pip install 'fastedit-llm[peft]')"


def linear(model: nn.Module, block: int) -> list[str]:
    """The weights of all linear layers of a block: fused projections and Conv1D too."""
    path = f"{topology(model).blocks_path}.{block}"
    found = model.get_submodule(path).named_modules()
    return [f"{path}.{name}.weight" for name, module in found if isinstance(module, nn.Linear | Conv1D)]


def factors(model: nn.Module, paths: list[str], rng: torch.Generator) -> WeightDelta:
    """An edit of these matrices in factors, whose ranks are 1 to 4."""
    updates = {}
    for i, path in enumerate(paths):
        m, n = model.get_parameter(path).shape
        rank = i % 4 + 1
        updates[path] = LowRank(0.2 * torch.randn(m, rank, generator=rng), torch.randn(rank, n, generator=rng) / 5)
    return WeightDelta(updates, {"method": "memit", "fingerprint": fingerprint(model)})


def assert_served(model: Any, delta: WeightDelta, folder: Path, loaded_onto: Any) -> None:
    """The adapter on the unedited model answers as the edited model does."""
    peft = pytest.importorskip("peft", reason=WITHOUT_PEFT)
    if not delta.applied:
        delta.apply(model)
    served = peft.PeftModel.from_pretrained(loaded_onto, folder).eval()
    with torch.no_grad():
        wanted = model(IDS).logits
        assert (served(IDS).logits - wanted).abs().max() < 1e-4
        with served.disable_adapter():
            assert (served(IDS).logits - wanted).abs().max() > 1e-2
    how: dict[str, Any] = {"input_ids": IDS[:1], "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(served.generate(**how), model.generate(**how))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "phi3", "opt", "gemma2"])
def test_the_adapter_is_the_edit(family: str, rng: torch.Generator, tmp_path: Path) -> None:
    """Matrices of any kind, of different ranks; gpt2's are [in, out], phi3's are fused, gemma2 ties its head."""
    model = tiny_model(family)
    delta = factors(model, [*linear(model, 1), *linear(model, 2)], rng)
    adapter = export_peft(delta, model, tmp_path / "adapter")
    assert set(adapter.errors.values()) == {0.0}
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text("utf-8"))
    assert config["r"] == config["lora_alpha"] == 4
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert config["fan_in_fan_out"] == (family == "gpt2")
    for name, tensor in load_file(tmp_path / "adapter" / "adapter_model.safetensors").items():
        module, kind = name.removeprefix("base_model.model.").removesuffix(".weight").rsplit(".", 1)
        assert module in config["target_modules"]
        rows, columns = model.get_parameter(f"{module}.weight").shape
        inputs, outputs = (rows, columns) if family == "gpt2" else (columns, rows)
        rank = config["rank_pattern"].get(module, 4)
        assert tensor.shape == ((rank, inputs) if kind == "lora_A" else (outputs, rank))
    assert_served(model, delta, tmp_path / "adapter", tiny_model(family))


def test_64_edits_of_memit_as_an_adapter(tmp_path: Path) -> None:
    """Of the trained model that ships with the package."""
    quick: dict[str, Any] = {"layers": (2, 3), "steps": 2, "contexts": ("{}",)}
    editor = Editor.from_pretrained(checkpoint_path(), "memit", dtype="float32", device="cpu", **quick)
    result = editor.edit(World().requests(64))
    adapter = export_peft(result.delta, editor.model, tmp_path / "adapter")
    assert set(adapter.ranks.values()) == {64}
    assert set(adapter.errors.values()) == {0.0}
    base = AutoModelForCausalLM.from_pretrained(checkpoint_path(), dtype=torch.float32)
    assert_served(editor.model, result.delta, tmp_path / "adapter", base)


@pytest.mark.parametrize("given", ["factors", "dense", "dense, wide"])
def test_a_cut_update_is_the_nearest_one_and_tells_its_error(given: str, rng: torch.Generator) -> None:
    left, right = torch.randn(40, 9, generator=rng), torch.randn(9, 23, generator=rng)
    whole = (left @ right).T if given == "dense, wide" else left @ right
    cut, error = truncated(LowRank(left, right) if given == "factors" else whole, 4)
    assert (cut.left.shape[1], cut.shape) == (4, whole.shape)
    u, s, v = torch.linalg.svd(whole.double(), full_matrices=False)
    torch.testing.assert_close(cut.dense().double(), u[:, :4] * s[:4] @ v[:4], atol=2e-5, rtol=0)
    assert error == pytest.approx(float((whole - cut.dense()).norm() / whole.norm()), rel=1e-4)
    same, lost = truncated(LowRank(left, right), 12)
    assert (lost, norm(same)) == (pytest.approx(0.0, abs=1e-7), pytest.approx(float((left @ right).norm())))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_updates_without_factors_are_cut_to_a_rank_that_is_given(
    family: str, rng: torch.Generator, tmp_path: Path
) -> None:
    model = tiny_model(family)
    path = linear(model, 1)[-1]
    update = 0.1 * torch.randn(model.get_parameter(path).shape, generator=rng)
    delta = WeightDelta({path: update}, {"fingerprint": fingerprint(model)})
    with pytest.raises(ConfigError, match=f"1 updates are not in factors: {path}; give the rank"):
        as_adapter(delta, model)
    adapter = export_peft(delta, model, tmp_path / "adapter", rank=8)
    assert adapter.ranks == {path: 8}
    assert 0.1 < adapter.errors[path] < 1
    assert_served(model, adapter.delta, tmp_path / "adapter", tiny_model(family))


CANNOT = {
    "a bias": ("opt", ["model.decoder.layers.1.fc1.bias"], "of Linear"),
    "a norm": ("llama", ["model.layers.1.mlp.down_proj.weight", "model.norm.weight"], r"1 of the 2 .*of LlamaRMSNorm"),
    "an embedding": ("llama", ["model.embed_tokens.weight"], "of Embedding"),
    "a tied head": ("gemma2", ["model.embed_tokens.weight"], "of Gemma2.*Embedding"),
    "tied matrices": ("llama", ["model.layers.1.mlp.up_proj.weight"], "tied to model.layers.2.mlp.up_proj.weight"),
    "experts": ("mixtral", ["model.layers.1.mlp.experts.down_proj"], "of MixtralExperts"),
    "nothing": ("llama", [], "changes nothing"),
}


@pytest.mark.parametrize("case", CANNOT)
def test_what_lora_cannot_carry_is_refused_by_name(case: str, tmp_path: Path) -> None:
    family, paths, message = CANNOT[case]
    model = tiny_model(family)
    if any(name not in dict(model.named_parameters()) for name in paths):
        pytest.skip("the installed transformers has no fused experts in this model")
    if case == "tied matrices":
        model.model.layers[2].mlp.up_proj.weight = model.model.layers[1].mlp.up_proj.weight
    updates = {path: torch.ones_like(model.get_parameter(path)) for path in paths}
    delta = WeightDelta(updates, {"fingerprint": fingerprint(model)})
    with pytest.raises(ModelError, match=message):
        export_peft(delta, model, tmp_path / "adapter", rank=2)
    assert not list(tmp_path.iterdir())


def test_another_base_and_a_folder_of_something_else_are_refused(rng: torch.Generator, tmp_path: Path) -> None:
    model, other = tiny_model("llama"), tiny_model("llama", seed=1)
    delta = factors(model, linear(model, 1), rng)
    with pytest.raises(ModelError, match=f"fingerprint {fingerprint(model)}, this one has {fingerprint(other)}"):
        export_peft(delta, other, tmp_path / "adapter")
    for _ in range(2):  # an adapter is replaced
        export_peft(delta, model, tmp_path / "adapter")
    (tmp_path / "adapter" / "thesis.tex").touch()
    with pytest.raises(FileError, match="nothing was overwritten"):
        export_peft(delta, model, tmp_path / "adapter")
