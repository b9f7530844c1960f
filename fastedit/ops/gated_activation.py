"""The inside of a gated MLP, act(gate)·up (SwiGLU, GeGLU): one pass forward, and one backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from fastedit.errors import ConfigError, TensorError
from fastedit.ops.library import define
from fastedit.ops.registry import Backend, Call, Option, choose, no_triton, only_interpreted, register

Activation = Literal["silu", "gelu_tanh"]
# each with the function of (gradient, x) that gives its gradient in x
_ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "silu": (silu, torch.ops.aten.silu_backward),
    "gelu_tanh": (partial(gelu, approximate="tanh"), partial(torch.ops.aten.gelu_backward, approximate="tanh")),
}


def gated_activation(gate: Tensor, up: Tensor, *, activation: Activation = "silu", backend: Backend = "auto") -> Tensor:
    """Compute act(gate)·up, which enters the last projection of a gated MLP; differentiable in both.

    It is computed in fp32 (fp64 for fp64), and act(gate) is rounded to its dtype before the product, as by torch.

    Args:
        gate: [..., N], fp32, bf16, fp16 or fp64; rows may be parts of longer ones, such as halves from `chunk`.
        up: [..., N], same shape and dtype.
        activation: SiLU (SwiGLU), or GELU in its approximation by tanh (GeGLU).
        backend: see `fastedit.ops.registry`; ConfigError if it cannot serve.

    Returns:
        [..., N], contiguous, in the dtype of gate, on its device.

    Raises:
        ConfigError: there is no such activation.
        TensorError: shapes, dtypes or devices do not fit.
    """
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        y: Tensor = _GatedActivation.apply(gate, up, activation, backend)  # type: ignore[no-untyped-call]
        return y
    return _forward(gate, up, activation, backend)


class _GatedActivation(torch.autograd.Function):
    """The product as an autograd function that keeps gate and up alone."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: Activation, backend: Backend) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.how = activation, backend
        return _forward(gate, up, activation, backend)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        activation, backend = ctx.how
        serve = _backward_operator if torch.compiler.is_compiling() else _serve_backward
        d_gate, d_up = serve(grad, *ctx.saved_tensors, activation=activation, backend=backend)
        return d_gate, d_up, None, None


def _forward(gate: Tensor, up: Tensor, activation: Activation, backend: Backend) -> Tensor:
    serve = _operator if torch.compiler.is_compiling() else _serve
    y: Tensor = serve(gate, up, activation=activation, backend=backend)
    return y


def _serve(gate: Tensor, up: Tensor, *, activation: Activation = "silu", backend: Backend = "auto") -> Tensor:
    _check(gate, up, activation)
    if choose("gated_activation", backend, device=gate.device, dtype=gate.dtype) == "triton":
        from fastedit.kernels.gated_activation import gated_activation as kernel

        y: Tensor = kernel(_rows(gate), _rows(up), activation != "silu").view(gate.shape)
        return y
    return (_ACTIVATIONS[activation][0](gate) * up).contiguous()


def _serve_backward(
    grad: Tensor, gate: Tensor, up: Tensor, *, activation: Activation = "silu", backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:  # the gradients in gate and up
    if choose("gated_activation", backend, device=gate.device, dtype=gate.dtype) == "triton":
        from fastedit.kernels.gated_activation import gated_activation_backward as kernel

        args = _rows(grad).contiguous(), _rows(gate), _rows(up), activation != "silu"
        d_gate, d_up = kernel(*args)
        return d_gate.view(gate.shape), d_up.view(up.shape)
    act, slope = _ACTIVATIONS[activation]
    return slope(grad * up, gate).contiguous(), (grad * act(gate)).contiguous()


def _rows(x: Tensor) -> Tensor:
    """[T, N] with contiguous columns; a view if it can be one."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def _check(gate: Tensor, up: Tensor, activation: Activation) -> None:
    if activation not in _ACTIVATIONS:
        raise ConfigError(f"gated_activation has no activation={activation!r}; choose one of {', '.join(_ACTIVATIONS)}")
    if not gate.ndim or gate.shape != up.shape:
        raise TensorError(f"gate and up are {list(gate.shape)} and {list(up.shape)}, expected [..., N] for both")
    if not gate.is_floating_point() or gate.dtype != up.dtype:
        raise TensorError(f"gate and up are {gate.dtype} and {up.dtype}, expected one floating-point dtype")
    if gate.device != up.device:
        raise TensorError(f"up is on {up.device}, gate on {gate.device}; bring them to one device")


def _cannot(call: Call) -> str | None:
    served = call.dtype in (torch.bfloat16, torch.float16, torch.float32)
    return no_triton(call) or (None if served else f"gate is {call.dtype}, not bfloat16, float16 or float32")


register("gated_activation", Option("triton", _cannot, only_interpreted))


def _like(gate: Tensor, *_: Any, **__: Any) -> Tensor:
    return gate.new_empty(gate.shape)


def _like_both(_: Tensor, gate: Tensor, up: Tensor, **__: Any) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


_operator = define(
    'gated_activation(Tensor gate, Tensor up, *, str activation="silu", str backend="auto") -> Tensor', _serve, _like
)
_backward_operator = define(
    'gated_activation_backward(Tensor grad, Tensor gate, Tensor up, *, str activation="silu", str backend="auto") '
    "-> (Tensor, Tensor)",
    _serve_backward,
    _like_both,
)
