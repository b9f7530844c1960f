"""The models that the benchmarks measure: their shapes, and that they stay as they were."""

from __future__ import annotations

import pytest
import torch

from benchmarks import shapes
from fastedit.methods.presets import locft_bf_preset
from fastedit.models import topology


@pytest.mark.parametrize(
    ("size", "parameters", "theta", "layer"),
    [("8b", 8_030_261_248, 5e5, 22), ("qwen-7b", 7_615_616_512, 1e6, 6), ("1b", 1_498_482_688, 5e5, 11)],
)
def test_the_shapes_are_the_published_ones(size: str, parameters: int, theta: float, layer: int) -> None:
    model = shapes.random_model(size, "meta", 0)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert {(p.dtype, p.device.type) for p in model.parameters()} == {(torch.bfloat16, "meta")}
    about = model.config.to_dict()
    assert (about.get("rope_parameters") or about)["rope_theta"] == theta  # a field of its own before transformers 5
    preset, published = locft_bf_preset(topology(model))
    assert (preset.layer, published) == (layer, size != "1b")


def test_what_is_measured_beside_ours_leaves_the_model_as_it_was(seed: int) -> None:
    torch.manual_seed(seed)
    model = shapes.random_model("toy", "cpu", 100)
    path = "model.layers.4.mlp.down_proj.weight"
    before = {name: x.clone() for name, x in [*model.named_parameters(), *model.named_buffers()]}

    @shapes.in_fp32(model)
    @shapes.restored(model, [path])
    def train() -> None:
        weight = model.get_parameter(path)
        assert weight.dtype == torch.float32
        model.requires_grad_(False)
        weight.data.mul_(2)
        raise KeyError

    with pytest.raises(KeyError):
        train()
    for name, x in [*model.named_parameters(), *model.named_buffers()]:
        assert x.dtype == before[name].dtype, name
        assert torch.equal(x, before[name]), name
    assert all(p.requires_grad for p in model.parameters())
