"""Updates in factors: their room, their rounding, and weights that are put back after an error or an interrupt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_holds, factors, state, tiny_model
from torch import Tensor

from fastedit import ModelError, WeightDelta
from fastedit import delta as delta_module
from fastedit.models import fingerprint
from fastedit.weights import LowRank

LINEAR, CONV = "model.layers.1.mlp.down_proj.weight", "transformer.h.1.mlp.c_proj.weight"  # [out, in] and [in, out]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("family", "path"), [("llama", LINEAR), ("gpt2", CONV)])
def test_factors_are_saved_loaded_applied_and_reverted_without_losing_a_bit(
    family: str, path: str, dtype: torch.dtype, seed: int, tmp_path: Path
) -> None:
    """The sum is rounded once, from fp32; a dense update of another weight lies beside the factors."""
    model = tiny_model(family, dtype=dtype, seed=seed)
    before, bias = state(model), path.replace("down_proj.weight", "up_proj.weight").replace("weight", "bias")
    bias = bias if bias in before else path.replace("down_proj", "up_proj")
    dense = torch.randn(before[bias].shape, generator=torch.Generator().manual_seed(seed))
    delta = WeightDelta({path: factors(before[path].shape, seed), bias: dense}, {"fingerprint": fingerprint(model)})
    delta.save(tmp_path / "edit")
    loaded = WeightDelta.load(tmp_path / "edit")
    assert loaded.metadata == delta.metadata
    assert loaded.updates.keys() == delta.updates.keys()
    low, kept = delta.updates[path], loaded.updates[path]
    assert isinstance(low, LowRank)
    assert isinstance(kept, LowRank)
    assert torch.equal(kept.left, low.left)
    assert torch.equal(kept.right, low.right)

    loaded.apply(model)
    exact = before[path].double() + low.left.double() @ low.right.double()
    terms = before[path].abs().double() + low.left.abs().double() @ low.right.abs().double()
    info = torch.finfo(dtype)  # below the smallest normal number, fp16 is as coarse as there
    allowed = exact.abs().clamp(min=info.smallest_normal) * info.eps / 2 + terms * 4 * torch.finfo(torch.float32).eps
    assert ((model.get_parameter(path) - exact).abs() <= allowed).all()
    assert torch.equal(model.get_parameter(bias), (before[bias].float() + dense).to(dtype))
    after = state(model)
    with pytest.raises(ModelError, match="already applied"):
        loaded.apply(model)
    loaded.revert()
    assert_holds(model, before)
    delta.apply(model)
    assert_holds(model, after)


def test_ten_edits_of_a_large_layer_take_the_room_of_their_factors(tmp_path: Path) -> None:
    whole = torch.randn(14336, 20)
    low = LowRank(torch.randn(4096, 10), whole[:, ::2].T)  # a view into something larger
    WeightDelta({"w": low}, {}).save(tmp_path / "edit")
    assert 0 <= (tmp_path / "edit").stat().st_size - 10 * (4096 + 14336) * 4 < 1000
    kept = WeightDelta.load(tmp_path / "edit").updates["w"]
    assert kept.shape == (4096, 14336)
    assert isinstance(kept, LowRank)
    assert torch.equal(kept.right, whole[:, ::2].T)


def test_reverts_whatever_arithmetic_wrote_the_weights(seed: int) -> None:
    """Other threads or another device may round a product another way than the one that wrote it."""
    model = tiny_model("llama", seed=seed)
    before, low = state(model), factors(torch.Size((32, 56)), seed)
    p = model.get_parameter(LINEAR)
    p.data.copy_((p.double() + (low.left.double() @ low.right.double())) * (1 + 2e-7))
    delta = WeightDelta({LINEAR: low}, {}, applied_to=model, originals={LINEAR: before[LINEAR]})
    p.data = p.data.T.contiguous().T  # as a move does: other memory, other strides, the same values
    held = p.data[3, 4].clone()
    p.data[3, 4] = held.nextafter(torch.tensor(9.0))
    with pytest.raises(ModelError, match=LINEAR.replace(".", r"\.")):
        delta.revert()
    p.data[3, 4] = held
    delta.revert()
    assert_holds(model, before)


def test_an_interrupted_application_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    before, add = state(model), delta_module.add_

    def interrupted(parameter: Tensor, update: Any) -> None:
        add(parameter, update)
        if parameter is model.model.norm.weight:
            raise KeyboardInterrupt

    monkeypatch.setattr(delta_module, "add_", interrupted)
    delta = WeightDelta({LINEAR: torch.ones(32, 56), "model.norm.weight": torch.ones(32)}, {})
    with pytest.raises(KeyboardInterrupt):
        delta.apply(model, force=True)
    assert_holds(model, before)
    assert not delta.applied
