"""The operations as torch's own: schemas, fake results, whole graphs, gradients, no wait for the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cross_entropy import plain, problem
from helpers import NoWait
from torch import Tensor
from torch.library import opcheck

from fastedit import ops
from fastedit.errors import TensorError

F64 = torch.float64


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def adam(**options: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    moments = (normal(9, 7, seed=3), normal(9, 7, seed=4).abs())
    return (normal(9, 7), normal(5, 9, seed=1), normal(5, 7, seed=2), *moments, torch.tensor(3)), {"lr": 0.1} | options


def solve(*sizes: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (normal(*sizes, 8), normal(*sizes, 6, seed=1), torch.eye(8, dtype=F64)), {"ridge": 1.0}


def loss(**options: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    hidden, head, labels, weight, bias = problem(0, 5, 8, 11).values()
    return (hidden.T.contiguous().T, head, labels, weight), {"bias": bias} | options  # strides of a [h, R]


@pytest.fixture(autouse=True)
def anew() -> None:
    """Torch compiles a function a few times only, and these tests make the same one."""
    torch._dynamo.reset()


TOTAL, BASIS = torch.zeros(8, 8, dtype=F64), torch.eye(8)[:, :4]
CALLS: dict[str, tuple[str, tuple[tuple[Any, ...], dict[str, Any]]]] = {
    "adam": ("localized_adam_", adam()),
    "adam, all options": (
        "localized_adam_",
        adam(max_norm=1.0, copy=torch.zeros(9, 7), original=normal(9, 7), max_change=0.1, seed=3, skip=torch.zeros(())),
    ),
    "sgd": ("localized_adam_", ((*adam()[0][:3], None, None, torch.tensor(1)), {"lr": 0.1})),
    "loss": ("target_cross_entropy", loss()),
    "loss, soft-capped": ("target_cross_entropy", loss(softcap=3.0)),
    "solve": ("rank_k_update", solve(3)),
    "solves": ("rank_k_update", solve(2, 3)),
    "solve, more keys than width": ("rank_k_update", solve(12)),
    "null space": ("null_space_update", ((*solve(3)[0][:2], BASIS, torch.eye(4)), {"l2": 1.0})),
    "norm": ("rms_norm", ((normal(2, 5, 8), normal(8, seed=1)), {"eps": 1e-6})),
    "norm, Gemma's": (
        "rms_norm",
        ((normal(5, 8), normal(8, seed=1)), {"eps": 1e-6, "offset": 1.0, "round_first": False}),
    ),
    "norm, backward": ("rms_norm_backward", ((normal(5, 8), normal(5, 8, seed=1), normal(8, seed=2)), {"eps": 1e-6})),
    "gated": ("gated_activation", (tuple(normal(5, 16).chunk(2, -1)), {})),
    "gated, GELU": ("gated_activation", (tuple(normal(5, 16).chunk(2, -1)), {"activation": "gelu_tanh"})),
    "gated, backward": ("gated_activation_backward", ((normal(5, 8), *normal(5, 16, seed=1).chunk(2, -1)), {})),
    "syrk": ("syrk_", ((TOTAL, normal(5, 8), torch.tensor([True, False, True, True, True])), {})),
}


def copied(x: Any) -> Any:
    return x.clone() if isinstance(x, Tensor) else x


@pytest.mark.parametrize(("name", "call"), CALLS.values(), ids=CALLS)
def test_torch_finds_no_fault_with_them(name: str, call: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
    """Check the arguments that are written, sizes and strides of the results, and the op in a graph."""
    args, options = call
    opcheck(getattr(torch.ops.fastedit, name).default, [copied(x) for x in args], options)


GRAPHS = ["adam, all options", "loss, soft-capped", "solves", "null space", "syrk", "norm", "gated"]


@pytest.mark.parametrize("call", GRAPHS)
def test_a_call_is_one_graph(call: str) -> None:
    """To the bit what an eager call gives, and writes."""
    name, (args, options) = CALLS[call]
    function = getattr(ops, name)

    def run(args: list[Any], options: dict[str, Any]) -> Any:
        return function(*args, **options)

    found = []
    for way in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        given, named = [copied(x) for x in args], {name: copied(x) for name, x in options.items()}
        found.append([way(given, named), given, named])
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_a_graph_has_the_errors_of_eager_calls() -> None:
    """By class and text, when it runs."""
    (keys, residuals, factor), _ = solve(3)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def update(residuals: Tensor) -> Any:
        return ops.rank_k_update(keys, residuals, factor, ridge=1.0)

    with pytest.raises(TensorError, match=r"residuals is \[2, 6\], expected a row for each of keys \[3, 8\]"):
        update(residuals[:2])
    residuals[1, 2] = torch.nan
    with pytest.raises(TensorError, match=r"residuals\[1\] holds NaN"):
        update(residuals)


def test_steps_of_a_compiled_loop_are_numbered() -> None:
    """The number is an int, which a graph must not keep."""
    weights, grads, inputs = [], normal(5, 9), normal(5, 7, seed=1)

    def step(weight: Tensor, m: Tensor, v: Tensor, number: int) -> None:
        ops.localized_adam_(weight, grads, inputs, m, v, number, lr=0.1)

    for compiled in (False, True):
        run = torch.compile(step, fullgraph=True, backend="aot_eager") if compiled else step
        weight, m, v = torch.zeros(9, 7), torch.zeros(9, 7), torch.zeros(9, 7)
        for number in range(1, 5):
            run(weight, m, v, number)
        weights.append(weight)
    torch.testing.assert_close(*weights, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("dtype", "per_row", "compiled"),
    [(torch.float32, False, False), (torch.bfloat16, True, False), (torch.bfloat16, True, True)],
)
def test_the_loss_is_differentiated(dtype: torch.dtype, per_row: bool, compiled: bool, seed: int) -> None:
    """As a term of a larger loss: what reaches the parameters below is autograd's of the plain formula."""
    inputs = problem(seed, 37, 52, 123)
    inputs |= {name: inputs[name].to(dtype) for name in ("hidden", "head_weight", "bias")}
    scale = torch.rand(37, generator=torch.Generator().manual_seed(seed)) if per_row else torch.tensor(0.3)

    def total(hidden: Tensor) -> Tensor:
        found, _ = ops.target_cross_entropy(**inputs | {"hidden": 2 * hidden}, softcap=3.0, per_row=per_row)
        return (scale * found).sum() + hidden.float().square().sum()

    run = torch.compile(total, fullgraph=True, backend="aot_eager") if compiled else total
    hidden = inputs["hidden"].clone().requires_grad_()
    (found,) = torch.autograd.grad(run(hidden), hidden)
    rows = {name: x.double() if x is not None and x.is_floating_point() else x for name, x in inputs.items()}
    rows |= {"hidden": 2 * rows["hidden"], "sample_weight": rows["sample_weight"] * scale}
    wanted = 2 * plain(**rows, softcap=3.0)[1] + 2 * inputs["hidden"].double()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert found.dtype == dtype
    assert (found - wanted).norm() <= tolerance * wanted.norm()


@pytest.mark.parametrize("compiled", [False, True])
def test_frozen_blocks_are_differentiated(compiled: bool, seed: int) -> None:
    """A norm and a gated activation in one graph, with their gradients."""
    x, grad, weight = normal(5, 16, seed=seed), normal(5, 8, seed=seed + 1), normal(16, seed=seed + 2)

    def plain(x: Tensor) -> Tensor:
        gate, up = torch.nn.functional.rms_norm(x, (16,), weight.to(x.dtype), 1e-6).chunk(2, -1)
        return torch.nn.functional.silu(gate) * up

    def fused(x: Tensor) -> Tensor:
        return ops.gated_activation(*ops.rms_norm(x, weight, eps=1e-6).chunk(2, -1))

    run = torch.compile(fused, fullgraph=True, backend="aot_eager") if compiled else fused
    found, wanted = (y.requires_grad_() for y in (x.clone(), x.double()))
    run(found).backward(grad)
    plain(wanted).backward(grad.double())
    torch.testing.assert_close(found.grad.double(), wanted.grad, rtol=1e-5, atol=1e-5)


def test_only_hidden_gets_a_gradient() -> None:
    inputs = problem(0, 7, 8, 5)
    loss, grad = ops.target_cross_entropy(**inputs)
    assert not loss.requires_grad
    inputs["hidden"].requires_grad_()
    with torch.no_grad():
        assert not ops.target_cross_entropy(**inputs)[0].requires_grad
    loss, same = ops.target_cross_entropy(**inputs)
    assert torch.equal(grad, same)
    assert not same.requires_grad
    for name in ("head_weight", "bias"):
        inputs[name].requires_grad_()
    loss, same = ops.target_cross_entropy(**inputs)
    assert torch.equal(grad, same)  # who goes on from grad_hidden need not freeze the head
    with pytest.raises(TensorError, match=r"hidden alone, and these require one: head_weight, bias; freeze"):
        loss.backward()


@pytest.mark.parametrize("name", ["localized_adam_", "syrk_"])
def test_autocast_lets_their_products_be(name: str) -> None:
    """They are called in hooks of passes that run under it."""
    args, options = adam() if name == "localized_adam_" else ((TOTAL, normal(5, 8)), {"backend": "torch"})
    found = []
    for enabled in (False, True):
        given = [copied(x) for x in args]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            getattr(ops, name)(*given, **options)
        found.append(given)
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("call", ["adam", "adam, all options", "sgd", "loss", "loss, soft-capped", "norm", "gated"])
def test_nothing_waits_for_the_device(call: str, backend: str) -> None:
    """Such calls may be captured in a CUDA graph."""
    if backend == "triton":
        pytest.importorskip("triton")
    name, (args, options) = CALLS[call]
    function: Callable[..., Any] = getattr(ops, name)
    with NoWait():
        function(*[copied(x) for x in args], **{k: copied(x) for k, x in options.items()}, backend=backend)


def test_a_second_derivative_of_the_loss_is_refused() -> None:
    """Its gradient is kept from the forward pass as it is; the derivative of that would be 0."""
    inputs = problem(0, 7, 8, 5)
    hidden = inputs["hidden"].requires_grad_()
    found, _ = ops.target_cross_entropy(**inputs)
    (slope,) = torch.autograd.grad(found.square(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.square().sum().backward()
