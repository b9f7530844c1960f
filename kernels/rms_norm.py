"""Root-mean-square norm with a frozen weight: forward, and backward in the input alone, each in one pass.

    r = 1 / √(mean x² + ε),  n = x·r,  s = offset + weight,  y = n·s
    ∂x = r·(g·s − n·mean(n·g·s))                                       g [T, D]: the gradient in y [T, D]

A program holds BLOCK_R whole rows in registers: the forward reads x and writes y; the backward reads x and g, computes
r again, and writes ∂x. In bf16 that is 4 and 6 bytes an element, about a tenth of what separate operations move.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Config(NamedTuple):
    """Tile of a program and launch options, chosen by `config_for`."""

    BLOCK_R: int
    BLOCK_D: int
    num_warps: int


@triton.jit
def _tile(T, D, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """Places of the rows of this program in a contiguous [T, D], and which of them there are."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    col = tl.arange(0, BLOCK_D)
    return row.to(tl.int64)[:, None] * D + col[None, :], (row < T)[:, None] & (col < D)[None, :]


@triton.jit
def _scale(weight, offset, D, BLOCK_D: tl.constexpr):
    col = tl.arange(0, BLOCK_D)
    return (tl.load(weight + col, mask=col < D, other=0.0).to(tl.float32) + offset)[None, :]


@triton.jit(do_not_specialize=["T"])
def rms_norm_kernel(
    x, weight, y, T, D, eps, offset, ROUND: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """y = n·s; n is rounded to the dtype of x before that if ROUND."""
    at, mask = _tile(T, D, BLOCK_R, BLOCK_D)
    n = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    n *= tl.rsqrt(tl.sum(n * n, 1) / D + eps)[:, None]
    if ROUND:
        n = n.to(x.dtype.element_ty).to(tl.float32)
    tl.store(y + at, (n * _scale(weight, offset, D, BLOCK_D)).to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T"])
def rms_norm_backward_kernel(
    grad, x, weight, slope, T, D, eps, offset, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """slope = ∂x."""
    at, mask = _tile(T, D, BLOCK_R, BLOCK_D)
    n = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    r = tl.rsqrt(tl.sum(n * n, 1) / D + eps)[:, None]
    n *= r
    g = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32) * _scale(weight, offset, D, BLOCK_D)
    g = r * (g - n * (tl.sum(n * g, 1) / D)[:, None])
    tl.store(slope + at, g.to(slope.dtype.element_ty), mask=mask)


def config_for(D: int) -> Config:
    """Whole rows, 2,048 elements or more; of 16,384 a thread holds 32, which is as many as fit into its registers."""
    block = triton.next_power_of_2(D)
    rows = max(1, 2048 // block)
    return Config(rows, block, min(16, max(4, rows * block // 512)))


def _launch(kernel: Any, x: Tensor, *args: Any, **options: Any) -> None:
    T, D = x.shape
    config = config_for(D)
    if T:
        with torch.cuda.device_of(x):
            kernel[(triton.cdiv(T, config.BLOCK_R),)](*args, **options, enable_fp_fusion=True, **config._asdict())


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float, round_first: bool) -> Tensor:
    """y [T, D] for contiguous x [T, D] and weight [D] in bf16, fp16 or fp32; they are not checked here."""
    y = torch.empty_like(x)
    _launch(rms_norm_kernel, x, x, weight, y, *x.shape, eps, offset, ROUND=round_first)
    return y


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """The gradient [T, D] in x for a contiguous gradient [T, D] in y."""
    slope = torch.empty_like(x)
    _launch(rms_norm_backward_kernel, x, grad, x, weight, slope, *x.shape, eps, offset)
    return slope
