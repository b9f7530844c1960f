"""Modules, weights and calls that `localized` refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastedit import ops
from fastedit.errors import ConfigError, TensorError


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: nn.Conv2d(3, 3, 1), {}, r"torch\.nn\.modules\.conv\.Conv2d is not a plain nn\.Linear or Conv1D"),
        (lambda: wrapped(nn.Linear(3, 4)), {}, r"Linear is not a plain .* its forward or its weight is its own"),
        (
            lambda: nn.Linear(3, 4).double(),
            {},
            r"the weight of this .*Linear is torch\.float64, expected float32, bfloat16",
        ),
        (
            lambda: nn.Linear(3, 4),
            {"lr": -1.0, "betas": (0.9, 1.0), "max_norm": 0.0},
            r"lr is -1\.0, expected ≥ 0; betas is \(0\.9, 1\.0\), expected .*; max_norm is 0\.0, expected > 0",
        ),
        (
            lambda: nn.Linear(3, 4),
            {"lr": "1e-3", "betas": None, "weight_decay": None, "seed": 1.5},
            r"lr is 1e-3, expected ≥ 0; weight_decay is None, .*; betas is None, .*; seed is 1\.5, expected a whole",
        ),
        (lambda: ops.localized(nn.Linear(3, 4), lr=1.0)._module, {}, r"Linear is localized already; call remove\(\)"),
        (lambda: shared(nn.Linear(3, 4)), {}, r"the weight of this .*Linear is localized already, in another module"),
    ],
    ids=["another class", "wrapped", "dtype", "options", "no numbers", "twice", "shared"],
)
def test_what_cannot_be_trained_is_refused(
    make: Callable[[], nn.Module], options: dict[str, Any], message: str
) -> None:
    module = make()
    with pytest.raises((ConfigError, TensorError), match=message):
        ops.localized(module, **{"lr": 0.1} | options)


def shared(module: nn.Linear) -> nn.Linear:
    """Another module with the same weight, which is localized."""
    other = nn.Linear(module.in_features, module.out_features)
    other.weight = module.weight
    assert ops.localized(other, lr=0.1)
    module.other = other
    return module


def wrapped(module: nn.Module) -> nn.Module:
    module.forward = module.forward  # as accelerate does
    return module


@pytest.mark.parametrize("where", [torch.bfloat16, "meta"])
def test_a_module_that_moves_afterwards_is_refused(where: Any) -> None:
    layer = nn.Linear(3, 4)
    ops.localized(layer, lr=0.1)
    layer.to(where)
    with pytest.raises(TensorError, match=r"and was torch\.float32 on cpu when localized made .* cast the model first"):
        layer(torch.ones(2, 3).to(where))


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 4)
    with pytest.raises(ConfigError, match=r"in one process, and this is one of 4 \(DDP or FSDP\)"):
        ops.localized(nn.Linear(3, 4), lr=0.1)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


REPLACED: dict[str, Callable[[nn.Linear], object]] = {
    "assigned": lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight.detach().clone())),
    "loaded": lambda layer: layer.load_state_dict({n: x.clone() for n, x in layer.state_dict().items()}, assign=True),
    "parametrized": lambda layer: nn.utils.parametrize.register_parametrization(layer, "weight", Doubled()),
    "weight norm": nn.utils.parametrizations.weight_norm,
}


@pytest.mark.parametrize("way", REPLACED)
def test_a_weight_that_took_the_place_of_the_trained_one_is_refused(way: str) -> None:
    """It would never be updated."""
    layer = nn.Linear(3, 4)
    ops.localized(layer, lr=0.1)
    REPLACED[way](layer)
    with pytest.raises(TensorError, match=r"weight of this \w*Linear is not the one that localized trains"):
        layer(torch.ones(2, 3))
    with torch.no_grad():
        layer(torch.ones(2, 3))


def test_a_call_with_another_weight_is_refused() -> None:
    layer = nn.Linear(3, 4)
    ops.localized(layer, lr=0.1)
    with pytest.raises(TensorError, match="functional_call"):
        torch.func.functional_call(layer, {"weight": torch.ones(4, 3)}, torch.ones(2, 3))


def test_a_second_derivative_is_refused() -> None:
    """The rows lack what a penalty on the input's gradient adds to that of the weight."""
    layer, x = nn.Linear(3, 4), torch.ones(2, 3, requires_grad=True)
    ops.localized(layer, lr=0.1)
    (slope,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.square().sum().backward()


def test_other_parameters_are_refused() -> None:
    layer = nn.Linear(3, 4)
    with pytest.raises(ConfigError, match="trains one weight"):
        ops.localized(layer, lr=0.1).add_param_group({"params": [layer.bias]})
