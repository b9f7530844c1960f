"""Ridge solves of many small groups at once: N rows each, N at most 128, much wider than high.

    S = ridge·I + Y Yᵀ = G Gᵀ        left = G⁻¹ R,  right = G⁻¹ Y,  so that  leftᵀ right = Rᵀ (ridge·I + Y Yᵀ)⁻¹ Y

`_gram` forms S in parts of some columns of Y each, so that even few groups fill a GPU. `_invert` adds the parts of a
group and turns them into G⁻¹ in registers: elimination without pivoting, which a positive definite S does not need,
turns S = M D Mᵀ into D and I into M⁻¹ in N steps. Columns of M⁻¹ replace those of S that vanish, so that one tile
[N, N] holds both; G⁻¹ = D^(−½) M⁻¹. `_apply` multiplies tiles of Y, then R, by it. No atomics: the same inputs give
the same bits. All is in fp64, on tensor cores if there are any: S has the condition number 1 + ‖Y‖²/ridge.

    Y  [N, d]  ┌────────┬────────┬───┐  _gram: a program for each part   ┌───┐┌───┐┌───┐  N × N each
               └────────┴────────┴───┘  of `span` columns                └───┘└───┘└───┘
                                        _invert: a program for a group     ridge·I + Σ  →  G⁻¹
    Y, R       ┌──┬──┬──┬──┬──┬──┬──┬┐  _apply: a program for            ┌──┬──┬──┬──┬──┬──┬──┬┐
               └──┴──┴──┴──┴──┴──┴──┴┘  BLOCK_C columns; times G⁻¹       └──┴──┴──┴──┴──┴──┴──┴┘  right, left

    a group      bytes               flops             registers of the sum or tile in a thread, N = 16, 32, 64, 128
    _gram        8·N·(d + N·parts)   2·N²·d                  4, 16, 64, 128
    _invert      8·N²·(parts + 1)    2·N³, in N steps        4, 16, 16, 32 (by halves from 64 on)
    _apply       16·N·(d + h)        2·N²·(d + h)           16, 32, 64, 64

The elimination of S = (4 2; 2 5): step 0 takes 2/4 of row 0 from row 1, which leaves (0, 4); M⁻¹ starts as I, and the
same step makes its row 1 (−½, 1). The zero is not kept, −½ takes its place: (4 2; −½ 4). D is the diagonal, 4 and 4;
M⁻¹ is below it, with ones on it; and G⁻¹ = (1/√4 0; −½/√4 1/√4) = (½ 0; −¼ ½).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget

MOST = 128
"""Largest N: S [N, N] has to stay in registers."""
_SPAN = 512  # fewest columns of Y for a part of S


class Config(NamedTuple):
    """Tiles and launch options for one N, chosen by `config_for`."""

    BLOCK_N: int
    SIZE: int  # rows that are eliminated at once: BLOCK_N or its half
    BLOCK_K: int  # columns of Y that `_gram` takes at once
    BLOCK_C: int  # columns of Y or R that a program of `_apply` owns
    num_warps: int
    num_stages: int
    maxnreg: int | None  # of `_gram` and `_apply`

    def launches(self) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Keyword arguments of `_gram`, `_invert` and `_apply`."""
        how: dict[str, Any] = {"BLOCK_N": self.BLOCK_N, "num_warps": self.num_warps}
        streams = how | ({"maxnreg": self.maxnreg} if self.maxnreg else {})
        step = 16 if self.BLOCK_N > 32 else self.BLOCK_N
        stages = self.num_stages if step < self.BLOCK_N else 1  # one step has nothing to overlap with
        return (
            streams | {"BLOCK_K": self.BLOCK_K, "num_stages": self.num_stages},
            how | {"EPS": torch.finfo(torch.float64).eps, "SIZE": self.SIZE, "BLOCK_K": 32, "num_stages": 1},
            streams | {"BLOCK_K": step, "BLOCK_C": self.BLOCK_C, "num_stages": stages},
        )


@triton.jit(do_not_specialize=["N"])
def _gram(
    white, system,
    N, d, span, group, row, col,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Y Yᵀ over the `span` columns of one program of a group."""
    b, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i, k = tl.arange(0, BLOCK_N), part * span + tl.arange(0, BLOCK_K)
    at = white + b * group + i.to(tl.int64)[:, None] * row + k.to(tl.int64)[None, :] * col
    sum = tl.zeros((BLOCK_N, BLOCK_N), white.dtype.element_ty)
    for first in range(0, tl.minimum(span, d - part * span), BLOCK_K):
        y = tl.load(at, mask=(i < N)[:, None] & (k < d - first)[None, :], other=0.0)  # [BLOCK_N, BLOCK_K]
        sum = tl.dot(y, tl.trans(y), sum, input_precision="ieee", out_dtype=white.dtype.element_ty)
        at += BLOCK_K * tl.cast(col, tl.int64)
    tile = (b * tl.num_programs(1) + part) * BLOCK_N * BLOCK_N
    tl.store(system + tile + i[:, None] * BLOCK_N + i[None, :], sum)


@triton.jit
def _block(system, ridge, N, parts, r, c, BLOCK_N: tl.constexpr, SIZE: tl.constexpr):
    """Rows from r on and columns from c on of one S; past N it is I."""
    i, j = r + tl.arange(0, SIZE), c + tl.arange(0, SIZE)
    a = tl.where(i[:, None] == j[None, :], tl.where(i < N, ridge, 1.0)[:, None], 0.0)
    for part in range(parts):
        a += tl.load(system + part * BLOCK_N * BLOCK_N + i[:, None] * BLOCK_N + j[None, :])
    return a


@triton.jit
def _eliminate(a, diagonal, steps, eps):
    """G⁻¹ of a = G Gᵀ [n, n] that is I past `steps`, and the number of pivots below eps times the diagonal."""
    i = tl.arange(0, a.shape[0])
    on_diagonal = i[:, None] == i[None, :]
    for j in range(steps):
        above = tl.sum(tl.where((i == j)[:, None], a, 0.0), 0)  # row j
        column = tl.sum(tl.where((i == j)[None, :], a, 0.0), 1)
        factor = tl.where(i > j, column / tl.sum(tl.where(i == j, above, 0.0), 0), 0.0)
        # below the pivot column j of S has vanished, and is now that of M⁻¹, which starts with row j of I
        a = tl.where((i > j)[:, None] & (i == j)[None, :], 0.0, a)
        a -= factor[:, None] * tl.where(i == j, 1.0, above)[None, :]
    pivots = _diagonal(a)
    a = tl.where(on_diagonal, 1.0, tl.where(i[:, None] > i[None, :], a, 0.0)) / tl.sqrt(pivots)[:, None]
    return a, tl.sum(tl.where(pivots > eps * diagonal, 0, 1), 0)


@triton.jit
def _diagonal(a):
    i = tl.arange(0, a.shape[0])
    return tl.sum(tl.where(i[:, None] == i[None, :], a, 0.0), 1)


@triton.jit
def _product(a_at, b_at, b_row: tl.constexpr, SIZE: tl.constexpr, BLOCK_K: tl.constexpr):
    """The product of two tiles [SIZE, SIZE] in memory, BLOCK_K columns of a and rows of b at a time."""
    sum = tl.zeros((SIZE, SIZE), a_at.dtype.element_ty)
    for k in range(0, SIZE, BLOCK_K):
        sum = tl.dot(tl.load(a_at + k), tl.load(b_at + k * b_row), sum, input_precision="ieee", out_dtype=sum.dtype)
    return sum


@triton.jit(do_not_specialize=["N", "parts"])
def _invert(
    system, ridge, inverse, failed,
    N, parts,
    EPS: tl.constexpr, BLOCK_N: tl.constexpr, SIZE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """inverse = G⁻¹ of one group; failed = the number of pivots that only rounding has left.

    By halves, S = (A, ·; C, D) has G⁻¹ = (G_A⁻¹, 0; −G_D⁻¹ W G_A⁻¹, G_D⁻¹) with W = C G_A⁻ᵀ, G_D G_Dᵀ = D − W Wᵀ.
    """
    b = tl.program_id(0).to(tl.int64)
    system, ridge = system + b * parts * BLOCK_N * BLOCK_N, tl.load(ridge + b)
    a = _block(system, ridge, N, parts, 0, 0, BLOCK_N, SIZE)
    a, bad = _eliminate(a, _diagonal(a), tl.minimum(N, SIZE), N * EPS)
    i, k = tl.arange(0, SIZE), tl.arange(0, BLOCK_K)
    inverse += b * BLOCK_N * BLOCK_N
    at = inverse + i[:, None] * BLOCK_N + i[None, :]
    tl.store(at, a)
    if SIZE < BLOCK_N:
        # operands pass through `inverse`, whose upper right is free for C and W G_A⁻¹: chained in registers, the
        # products would give every warp all of an operand
        below: tl.constexpr = SIZE * BLOCK_N
        x_at, y_at = inverse + i[:, None] * BLOCK_N + k[None, :], inverse + k[:, None] * BLOCK_N + i[None, :]
        turned = inverse + i[None, :] * BLOCK_N + k[:, None]
        tl.store(at + SIZE, _block(system, ridge, N, parts, SIZE, 0, BLOCK_N, SIZE))
        tl.debug_barrier()
        tl.store(at + below, _product(x_at + SIZE, turned, 1, SIZE, BLOCK_K))
        tl.debug_barrier()
        tl.store(at + SIZE, _product(x_at + below, y_at, BLOCK_N, SIZE, BLOCK_K))
        d = _block(system, ridge, N, parts, SIZE, SIZE, BLOCK_N, SIZE)
        schur = d - _product(x_at + below, turned + below, 1, SIZE, BLOCK_K)
        d, worse = _eliminate(schur, _diagonal(d), N - SIZE, N * EPS)
        bad += worse
        tl.store(at + below + SIZE, d)
        tl.debug_barrier()
        tl.store(at + below, -_product(x_at + below + SIZE, y_at + SIZE, BLOCK_N, SIZE, BLOCK_K))
        tl.debug_barrier()
        tl.store(at + SIZE, tl.zeros_like(d))
    tl.store(failed + b, bad)


@triton.jit(do_not_specialize=["N"])
def _apply(
    inverse, source, target,
    N, width, group, row, col,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """BLOCK_C columns of target = G⁻¹ source, of one group."""
    b = tl.program_id(0).to(tl.int64)
    i, k, c = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    g_at = inverse + b * BLOCK_N * BLOCK_N + i[:, None] * BLOCK_N + k[None, :]
    at = source + b * group + k.to(tl.int64)[:, None] * row + c.to(tl.int64)[None, :] * col
    sum = tl.zeros((BLOCK_N, BLOCK_C), source.dtype.element_ty)
    for first in range(0, N, BLOCK_K):
        y = tl.load(at, mask=(k < N - first)[:, None] & (c < width)[None, :], other=0.0)  # [BLOCK_K, BLOCK_C]
        sum = tl.dot(tl.load(g_at), y, sum, input_precision="ieee", out_dtype=source.dtype.element_ty)
        g_at += BLOCK_K
        at += BLOCK_K * tl.cast(row, tl.int64)
    at = target + (b * N + i)[:, None] * width + c[None, :]
    tl.store(at, sum, mask=(i < N)[:, None] & (c < width)[None, :])


def rank_k_solve(white: Tensor, residuals: Tensor, ridge: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute left = G⁻¹ R and right = G⁻¹ Y for each group; G is the lower Cholesky factor of ridge·I + Y Yᵀ.

    An error of ε in S becomes one of ε·κ in leftᵀ right, with κ ≤ 1 + ‖Y‖²/ridge.

    Args:
        white: Y [..., N, d] fp64, any strides, 1 ≤ N ≤ 128. Smaller groups may be padded by rows of zeros.
        residuals: R [..., N, h], same dtype.
        ridge: a number, or one for each group [...]; ≥ 0.

    Returns:
        (left [..., N, h], right [..., N, d], failed [...] int32): failed counts the pivots that are only
        rounding, those not above N·eps of their diagonal; if it is not 0, left and right are meaningless. They are on
        the device of white, without a synchronization.

    Raises:
        ValueError: another shape or dtype.
    """
    *groups, N, d = white.shape
    h, dtype, device = residuals.shape[-1], white.dtype, white.device
    if not dtype == residuals.dtype == torch.float64:
        raise ValueError(f"white is {dtype}, residuals {residuals.dtype}; expected both float64")
    if not 1 <= N <= MOST or residuals.shape[:-1] != white.shape[:-1]:
        raise ValueError(
            f"white is {list(white.shape)}, residuals {list(residuals.shape)}; expected [..., N, d] and [..., N, h] "
            f"with 1 ≤ N ≤ {MOST}"
        )
    B = math.prod(groups)
    Y, R = white.reshape(B, N, d), residuals.reshape(B, N, h)
    if not isinstance(ridge, Tensor):
        ridge = torch.full((), ridge, dtype=dtype, device=device)  # a tensor: Triton would make a number fp32
    ridge = ridge.to(dtype).expand(groups).reshape(-1).contiguous()
    right, left = torch.empty_like(Y, memory_format=torch.contiguous_format), R.new_empty(B, N, h)
    failed = torch.empty(B, dtype=torch.int32, device=device)
    if B == 0:
        return left.view(*groups, N, h), right.view(*groups, N, d), failed.view(groups)
    interpreted = triton.knobs.runtime.interpret
    with torch.cuda.device_of(white):
        target = None if interpreted else triton.runtime.driver.active.get_current_target()
    config = config_for(N, target)
    processors = 132 if interpreted else torch.cuda.get_device_properties(device).multi_processor_count
    span = config.BLOCK_K * triton.cdiv(max(_SPAN, triton.cdiv(d * B, 4 * processors)), config.BLOCK_K)
    parts = max(1, triton.cdiv(d, span))
    system = Y.new_empty(B, parts, config.BLOCK_N, config.BLOCK_N)
    inverse = Y.new_empty(B, config.BLOCK_N, config.BLOCK_N)
    gram, invert, apply = (how | {"enable_fp_fusion": True} for how in config.launches())
    with torch.cuda.device_of(white):
        _gram[B, parts](Y, system, N, d, span, *Y.stride(), **gram)
        _invert[(B,)](system, ridge, inverse, failed, N, parts, **invert)
        for source, target, width in ((Y, right, d), (R, left, h)):
            if width:
                grid = B, triton.cdiv(width, config.BLOCK_C)
                _apply[grid](inverse, source, target, N, width, *source.stride(), **apply)
    return left.view(*groups, N, h), right.view(*groups, N, d), failed.view(groups)


def config_for(N: int, target: GPUTarget | None) -> Config:
    """The tiles for N rows on a target, None for the interpreter.

    Halves keep the elimination within the registers. If S takes at most 16 of them per thread, `maxnreg` allows as many
    as four programs per multiprocessor leave: ptxas by itself aims for more programs, and spills.
    """
    block = max(16, triton.next_power_of_2(N))
    cuda = target is not None and target.backend == "cuda"
    return Config(
        BLOCK_N=block,
        SIZE=block // 2 if block > 32 else block,
        BLOCK_K=max(16, 1024 // block) if target else 64,
        BLOCK_C=64 if target else 256,
        num_warps=8 if block == 128 else 4,
        num_stages=3 if target is None or cuda else 2,
        maxnreg=128 if cuda and block <= 32 else None,
    )
