"""rms_norm and gated_activation, by torch and by their kernels, against autograd of the plain formulas in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastedit import TensorError, ops
from fastedit.errors import ConfigError

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp"),  # σ(−100) = 0, in the interpreter
]
SHAPES = [(1, 8), (7, 252), (3, 5, 123), (37, 33)]


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "triton":
        pytest.importorskip("triton")
    return str(request.param)


def norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, round_first: bool = True) -> Tensor:
    """The norm as models write it."""
    wide = x.to(torch.promote_types(x.dtype, F32))
    n = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return n.to(x.dtype) * (offset + weight) if round_first else (n * (offset + weight.to(n.dtype))).to(x.dtype)


ACTIVATIONS = {"silu": nn.SiLU(), "gelu_tanh": nn.GELU(approximate="tanh")}


def found(function: Any, inputs: list[Tensor], grad: Tensor, **options: Any) -> list[Tensor]:
    """The result of a function of some tensors, and its gradients in those that are given."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    y = function(*leaves, **options)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def assert_as_exact(ours: list[Tensor], theirs: list[Tensor], exact: list[Tensor], backend: str) -> None:
    """Errors are at most twice those of the plain formula in the same dtype, and a hair, or one rounding to it."""
    for x, y, wanted in zip(ours, theirs, exact, strict=True):
        assert x.dtype == y.dtype
        assert x.is_contiguous()
        scale = wanted.abs().max()
        our_error, their_error = ((z.double() - wanted) / scale for z in (x, y))
        # Triton's interpreter drops the bits that bf16 does not hold, instead of rounding
        roundings = 4 if x.dtype == BF16 and backend == "triton" and DEVICE == "cpu" else 0.5
        hair = 1e-6 if x.dtype == F32 else roundings * torch.finfo(x.dtype).eps
        assert our_error.abs().max() <= 2 * their_error.abs().max() + hair
        assert our_error.square().mean().sqrt() <= 1.5 * their_error.square().mean().sqrt() + hair


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("offset", "round_first"), [(0.0, True), (0.0, False), (1.0, False)])
def test_norm(
    shape: tuple[int, ...], offset: float, round_first: bool, dtype: torch.dtype, backend: str, rng: torch.Generator
) -> None:
    """Rows of all sizes: ε is most of the smallest one's mean square."""
    x = torch.randn(shape, generator=rng) * torch.logspace(-3, 1, shape[-2])[:, None]
    weight, grad = torch.randn(shape[-1], generator=rng), torch.randn(shape, generator=rng)
    x, weight, grad = (z.to(dtype).to(DEVICE) for z in (x, weight, grad))
    how = {"eps": 1e-5, "offset": offset, "round_first": round_first}
    theirs = found(norm, [x], grad, weight=weight, **how)
    exact = found(norm, [x.double()], grad.double(), weight=weight.double(), **how)
    ours = found(ops.rms_norm, [x], grad, weight=weight, **how, backend=backend)
    # a row's gradient grows as it shrinks
    rows = torch.ones_like(exact[1]) * exact[1].abs().amax(-1, keepdim=True)
    assert_as_exact(ours[:1], theirs[:1], exact[:1], backend)
    assert_as_exact(*([found[1] / rows.to(found[1].dtype)] for found in (ours, theirs, exact)), backend)


def test_norm_rounds_where_it_is_told_to(backend: str, rng: torch.Generator) -> None:
    """To the bit what models compute, but for a few elements in whose sum of squares the order of terms shows."""
    x, weight = (torch.randn(*shape, generator=rng).half().to(DEVICE) for shape in ((64, 100), (100,)))
    for round_first in (True, False):
        wanted = norm(x, weight, 1e-6, 0.0, round_first)
        unlike, other = (
            (ops.rms_norm(x, weight, eps=1e-6, round_first=way, backend=backend) != wanted).float().mean()
            for way in (round_first, not round_first)
        )
        assert unlike < 0.005 < 0.1 < other


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_activation(
    shape: tuple[int, ...], activation: str, dtype: torch.dtype, backend: str, rng: torch.Generator
) -> None:
    gate, up, grad = (3 * torch.randn(shape, generator=rng).to(dtype).to(DEVICE) for _ in range(3))
    act = ACTIVATIONS[activation]

    def plain(gate: Tensor, up: Tensor) -> Tensor:
        return act(gate) * up

    ours = found(ops.gated_activation, [gate, up], grad, activation=activation, backend=backend)
    exact = found(plain, [x.double() for x in (gate, up)], grad.double())
    assert_as_exact(ours, found(plain, [gate, up], grad), exact, backend)


def test_gate_far_from_zero(backend: str) -> None:
    gate = torch.tensor([[-1e4, -90.0, -20.0, 0.0, 20.0, 90.0, 1e4]], device=DEVICE)
    up, grad = torch.full_like(gate, 3.0), torch.full_like(gate, 0.5)
    for name, act in ACTIVATIONS.items():
        wanted = found(lambda gate, up, act=act: act(gate) * up, [gate.double(), up.double()], grad.double())
        ours = found(ops.gated_activation, [gate, up], grad, activation=name, backend=backend)
        for x, y in zip(ours, wanted, strict=True):
            torch.testing.assert_close(x.double(), y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["rms_norm", "gated_activation"])
@pytest.mark.parametrize("heads", [(1, 2), (0, 0)], ids=["transposed", "in order"])
def test_strides_do_not_matter(name: str, heads: tuple[int, int], backend: str, rng: torch.Generator) -> None:
    """Half of a row, as `chunk` gives it, beside a whole one; transposed heads; a gradient that is expanded."""
    both, weight = torch.randn(2, 6, 5, 26, generator=rng).to(DEVICE), torch.randn(13, generator=rng).to(DEVICE)
    halves = both.transpose(*heads)[..., :13], both.transpose(*heads)[..., 13:].contiguous()

    def run(x: Tensor, y: Tensor) -> Tensor:
        if name == "rms_norm":
            return ops.rms_norm(x, weight, eps=1e-6, backend=backend) + 0 * y
        return ops.gated_activation(x, y, backend=backend)

    grad = torch.ones((), device=DEVICE).expand(halves[0].shape)
    before = both.clone()
    ours = found(run, [*halves], grad)
    for x, wanted in zip(ours, found(run, [x.contiguous() for x in halves], grad.contiguous()), strict=True):
        tolerance = 1e-6 if backend == "torch" else 0  # torch computes the ends of short rows in another way
        torch.testing.assert_close(x, wanted, rtol=tolerance, atol=tolerance)
    assert torch.equal(both, before)


def test_many_columns_and_none(backend: str, rng: torch.Generator) -> None:
    """More than a program's columns; no rows at all."""
    gate, up = torch.randn(2, 2, 5000, generator=rng).to(DEVICE)
    torch.testing.assert_close(ops.gated_activation(gate, up, backend=backend), nn.functional.silu(gate) * up)
    assert ops.gated_activation(gate[:0], up[:0], backend=backend).shape == (0, 5000)
    weight = torch.randn(5000, generator=rng).to(DEVICE)
    torch.testing.assert_close(ops.rms_norm(gate, weight, eps=1e-6, backend=backend), norm(gate, weight, 1e-6))
    x = gate[:0].requires_grad_()
    y = ops.rms_norm(x, weight, eps=1e-6, backend=backend)
    assert torch.autograd.grad(y.sum(), x)[0].shape == y.shape == (0, 5000)


def test_one_argument_alone_gets_its_gradient(backend: str, rng: torch.Generator) -> None:
    gate, up = torch.randn(2, 3, 8, generator=rng).to(DEVICE)
    up.requires_grad_()
    y = ops.gated_activation(gate, up, backend=backend)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), up)[0], nn.functional.silu(gate))
    with torch.no_grad():
        assert not ops.gated_activation(gate, up, backend=backend).requires_grad


def test_no_gradient_of_a_gradient_and_none_of_the_weight(rng: torch.Generator) -> None:
    """An error, instead of a number that leaves a part out."""
    x, weight = torch.randn(3, 8, generator=rng).requires_grad_(), torch.ones(8, requires_grad=True)
    with pytest.raises(TensorError, match=r"gives a gradient to x alone, and weight requires one; freeze"):
        ops.rms_norm(x, weight, eps=1e-6)
    with torch.no_grad():
        ops.rms_norm(x, weight, eps=1e-6)
    for y in (ops.rms_norm(x, weight.detach(), eps=1e-6), ops.gated_activation(x, 2 * x)):
        (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            slope.sum().backward()


def test_what_does_not_fit_is_refused() -> None:
    x, weight = torch.ones(3, 8), torch.ones(8)
    for call, message in (
        (lambda: ops.rms_norm(x, weight[:7], eps=0.0), r"x and weight are \[3, 8\] and \[7\], expected \[\.\.\., D\]"),
        (lambda: ops.rms_norm(x, weight.half(), eps=0.0), r"float32 and torch\.float16, expected one floating-point"),
        (lambda: ops.rms_norm(x, weight.to("meta"), eps=0.0), r"weight is on meta, x on cpu"),
        (lambda: ops.gated_activation(x, x[:2]), r"gate and up are \[3, 8\] and \[2, 8\]"),
        (lambda: ops.gated_activation(x, x.half()), r"float32 and torch\.float16, expected one floating-point"),
        (lambda: ops.gated_activation(x, x.to("meta")), r"up is on meta, gate on cpu"),
    ):
        with pytest.raises(TensorError, match=message):
            call()
    with pytest.raises(ConfigError, match=r"no activation='relu'; choose one of silu, gelu_tanh"):
        ops.gated_activation(x, x, activation="relu")


def test_kernels_refuse_what_they_cannot_take() -> None:
    pytest.importorskip("triton")
    x = torch.ones(1, 16385, device=DEVICE)
    with pytest.raises(ConfigError, match=r"D = 16385 is above 16384"):
        ops.rms_norm(x, x[0], eps=0.0, backend="triton")
    with pytest.raises(ConfigError, match=r"x is torch\.float64"):
        ops.rms_norm(x.double(), x[0].double(), eps=0.0, backend="triton")
    with pytest.raises(ConfigError, match=r"gate is torch\.float64"):
        ops.gated_activation(x.double(), x.double(), backend="triton")
