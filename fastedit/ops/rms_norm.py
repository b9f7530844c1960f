"""Root-mean-square norm with a frozen weight: one pass forward, and one backward in the input alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastedit.errors import TensorError
from fastedit.ops.library import define
from fastedit.ops.registry import Backend, Call, Option, choose, no_triton, only_interpreted, register

_WIDEST = 16384  # columns that the kernel takes


def rms_norm(
    x: Tensor, weight: Tensor, *, eps: float, offset: float = 0.0, round_first: bool = True, backend: Backend = "auto"
) -> Tensor:
    """Divide each row by its root mean square and scale it: y = x / √(mean x² + eps) · (offset + weight).

    It is computed in fp32 (fp64 for fp64), and can be differentiated in x; the weight is frozen.

    Args:
        x: [..., D], fp32, bf16, fp16 or fp64.
        weight: [D], same dtype.
        eps: ε, added to the mean square.
        offset: 1 if the weight is kept as the difference from 1, as in Gemma.
        round_first: whether x / √… is rounded to the dtype of x before it is scaled, as in Llama, or only the product
            is, as in Gemma and OLMo 2. It makes no difference in fp32.
        backend: see `fastedit.ops.registry`; ConfigError if it cannot serve.

    Returns:
        y [..., D], contiguous, in the dtype of x, on its device.

    Raises:
        TensorError: shapes, dtypes or devices do not fit, or the weight requires a gradient.
    """
    if torch.is_grad_enabled() and weight.requires_grad:
        raise TensorError(
            "rms_norm gives a gradient to x alone, and weight requires one; freeze it by requires_grad_(False), or "
            "give it with .detach()"
        )
    if torch.is_grad_enabled() and x.requires_grad:
        y: Tensor = _RMSNorm.apply(x, weight, eps, offset, round_first, backend)  # type: ignore[no-untyped-call]
        return y
    return _forward(x, weight, eps, offset, round_first, backend)


class _RMSNorm(torch.autograd.Function):
    """The norm as an autograd function that keeps x alone."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float, round_first: bool, backend: Backend
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.how = eps, offset, backend
        return _forward(x, weight, eps, offset, round_first, backend)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        eps, offset, backend = ctx.how
        serve = _backward_operator if torch.compiler.is_compiling() else _serve_backward
        slope = serve(grad, *ctx.saved_tensors, eps=eps, offset=offset, backend=backend)
        return slope, None, None, None, None, None


def _forward(x: Tensor, weight: Tensor, eps: float, offset: float, round_first: bool, backend: Backend) -> Tensor:
    serve = _operator if torch.compiler.is_compiling() else _serve
    y: Tensor = serve(x, weight, eps=eps, offset=offset, round_first=round_first, backend=backend)
    return y


def _serve(
    x: Tensor, weight: Tensor, *, eps: float, offset: float = 0.0, round_first: bool = True, backend: Backend = "auto"
) -> Tensor:
    _check(x, weight)
    if choose("rms_norm", backend, device=x.device, dtype=x.dtype, D=len(weight)) == "triton":
        from fastedit.kernels.rms_norm import rms_norm as kernel

        y: Tensor = kernel(_rows(x), weight.contiguous(), eps, offset, round_first).view(x.shape)
        return y
    n, _ = _normalized(x, eps)
    if round_first:
        n = n.to(x.dtype).to(n.dtype)
    return (n * (weight.to(n.dtype) + offset)).to(x.dtype).contiguous()


def _serve_backward(
    grad: Tensor, x: Tensor, weight: Tensor, *, eps: float, offset: float = 0.0, backend: Backend = "auto"
) -> Tensor:  # [..., D], the gradient in x
    if choose("rms_norm", backend, device=x.device, dtype=x.dtype, D=len(weight)) == "triton":
        from fastedit.kernels.rms_norm import rms_norm_backward as kernel

        slope: Tensor = kernel(_rows(grad), _rows(x), weight.contiguous(), eps, offset)
        return slope.view(x.shape)
    n, r = _normalized(x, eps)
    g = grad.to(n.dtype) * (weight.to(n.dtype) + offset)
    along = (n * g).mean(-1, keepdim=True)
    return g.addcmul_(n, along, value=-1).mul_(r).to(x.dtype).contiguous()


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()


def _normalized(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x·r [..., D] and r [..., 1] = 1 / √(mean x² + eps), in fp32 at least."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    r = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return wide * r, r


def _check(x: Tensor, weight: Tensor) -> None:
    if weight.ndim != 1 or not len(weight) or x.shape[-1:] != weight.shape:
        raise TensorError(f"x and weight are {list(x.shape)} and {list(weight.shape)}, expected [..., D] and [D]")
    if not x.is_floating_point() or x.dtype != weight.dtype:
        raise TensorError(f"x and weight are {x.dtype} and {weight.dtype}, expected one floating-point dtype")
    if x.device != weight.device:
        raise TensorError(f"weight is on {weight.device}, x on {x.device}; bring them to one device")


def _cannot(call: Call) -> str | None:
    if reason := no_triton(call):
        return reason
    if call.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"x is {call.dtype}, not bfloat16, float16 or float32"
    return f"D = {D} is above {_WIDEST}" if (D := call.sizes.get("D", 1)) > _WIDEST else None


register("rms_norm", Option("triton", _cannot, only_interpreted))


def _like(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x.new_empty(x.shape)


_operator = define(
    "rms_norm(Tensor x, Tensor weight, *, float eps, float offset=0.0, bool round_first=True, "
    'str backend="auto") -> Tensor',
    _serve,
    _like,
)
_backward_operator = define(
    "rms_norm_backward(Tensor grad, Tensor x, Tensor weight, *, float eps, float offset=0.0, "
    'str backend="auto") -> Tensor',
    _serve_backward,
    _like,
)
