"""Cross-entropy at R target rows with a frozen head, loss and gradient in one pass over the vocabulary.

    z_rv = cap(x_r · head_v + bias_v)          loss_r = w_r · (log Σ_v exp z_rv − z_r,label)
    ∂loss_r/∂x_r = w_r · (Σ_v≠label p_rv s_rv head_v − (1 − p_r,label) s_r,label head_label),   s = cap'(·)

The sum over v is attention's softmax(x headᵀ) head, so the online softmax of attention works here, too: a chunk of the
vocabulary adds exp(z − top) head to an fp32 sum, which is scaled down when a larger logit raises `top`. That takes two
matrix products, as many as with all logits in memory. The label is left out: 1 − p_label is the sum of the others
instead of a difference, and exact if p_label is nearly 1. Scales are powers of two, so that they do not round.
No atomics: the same inputs give the same bits.

          head [V, h]                  one chunk: tiles · BLOCK_V columns of the vocabulary
    ┌───┬───┬───┬───┬───┐  _exponentials   p [R, chunk]: a program for each tile, with e and Σ exp2 of its rows
    │ 0 │ 1 │ 2 │ 3 │ … │  _settle         a program for each row: one exponent for the whole chunk
    └───┴───┴───┴───┴───┘  _accumulate     acc [parts, R, h] = shrink · acc + p @ head: a program for each
    then the next chunk;                   BLOCK_R × BLOCK_H of acc and part of the chunk (split-K)
    at the end             _finish         the parts and the label join: loss and gradient

    a call           bytes                                flops      registers of the sum in a thread on sm_90
    _exponentials    V·h·w · ⌈R/128⌉, mostly from L2      2·R·V·h    128 (128 × 256 on 8 warps)
    _accumulate      the same, and 8·R·h·parts a chunk    2·R·V·h    128
    _settle          R·tiles a chunk, and p where the largest logit rose

w is 2 for bf16 and fp16, 4 for fp32. Chunks of an 8B model's head are larger than L2, so the head is read twice.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_CHUNK = 4096  # fewest columns of the vocabulary between two passes over the sums
_WAVES = 2  # tiles of the first product for each multiprocessor between them, if those are more
_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
_NOTHING = tl.constexpr(-1e30)  # exponent of an empty sum; finite, because −inf − −inf is NaN


class Config(NamedTuple):
    """Tile of a product and launch options, chosen by `config_for`."""

    BLOCK_R: int  # rows
    BLOCK_N: int  # columns of the result: vocabulary in the first product, hidden in the second
    BLOCK_K: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None

    def meta(self, column: str) -> dict[str, int]:
        """Keyword arguments of a launch."""
        options = {name: value for name, value in self._asdict().items() if value is not None}
        return {f"BLOCK_{column}" if name == "BLOCK_N" else name: value for name, value in options.items()}


@triton.jit
def _tanh(x):
    small = x * x
    odd = small * (-1 / 3 + small * (2 / 15 + small * (-17 / 315 + small * (62 / 2835 - small * (1382 / 155925)))))
    t = tl.exp2(tl.abs(x) * (-2 * _LOG2E))
    large = (1 - t) / (1 + t)
    return tl.where(small < 0.1, x + x * odd, tl.where(x < 0, -large, large))


@triton.jit(do_not_specialize=["R", "start", "tiles"])
def _exponentials(
    hidden, head, bias, labels, p, exponent, mass, top, own,
    R, V, h, start, tiles, softcap, hidden_row, hidden_col, head_row, head_col,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of p = exp2(z·log₂e − e)·s, rows × vocabulary, 0 at the label; e and Σ exp2 of each of its rows."""
    tile = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    block = start + tile * BLOCK_V
    col = block + tl.arange(0, BLOCK_V)
    k = tl.arange(0, BLOCK_K)
    x_at = hidden + tl.minimum(row, R - 1).to(tl.int64)[:, None] * hidden_row + k[None, :] * hidden_col
    w_at = head + tl.minimum(col, V - 1).to(tl.int64)[None, :] * head_row + k[:, None] * head_col
    z = tl.zeros((BLOCK_R, BLOCK_V), tl.float32)
    if bias is not None:
        z += tl.load(bias + col, mask=col < V, other=0.0).to(tl.float32)[None, :]
    for first in range(0, h, BLOCK_K):
        x = tl.load(x_at, mask=k[None, :] < h - first, other=0.0)  # [BLOCK_R, BLOCK_K]
        w = tl.load(w_at, mask=k[:, None] < h - first, other=0.0)  # [BLOCK_K, BLOCK_V]
        if UPCAST:  # the interpreter's bf16 product is wrong
            x, w = x.to(tl.float32), w.to(tl.float32)
        z = tl.dot(x, w, z, input_precision=PRECISION)
        x_at += BLOCK_K * tl.cast(hidden_col, tl.int64)
        w_at += BLOCK_K * tl.cast(head_col, tl.int64)
    slope = 1.0
    if softcap is not None:
        t = _tanh(z / softcap)
        slope = 1 - t * t
        z = t * softcap
    z = z * _LOG2E + tl.where(col < V, 0.0, float("-inf"))[None, :]
    within = row < R
    label = tl.load(labels + row, mask=within, other=-1)
    inside = (label >= block) & (label < tl.minimum(block + BLOCK_V, V))
    mine = tl.where(inside, label - block, -1).to(tl.int32)[:, None] == tl.arange(0, BLOCK_V)[None, :]
    tl.store(own + row, tl.sum(tl.where(mine, z, 0.0), 1), mask=inside)
    z = tl.where(mine, float("-inf"), z)
    # not below the largest so far: most tiles then have the exponent of the whole chunk, and p is final
    e = tl.maximum(tl.ceil(tl.max(z, 1)), tl.load(top + row, mask=within, other=_NOTHING))
    z = tl.exp2(z - e[:, None])
    at = row.to(tl.int64) * tiles + tile
    tl.store(exponent + at, e, mask=within)
    tl.store(mass + at, tl.sum(z, 1), mask=within)
    p_at = p + at[:, None] * BLOCK_V + tl.arange(0, BLOCK_V)[None, :]
    tl.store(p_at, (z * slope).to(p.dtype.element_ty), mask=within[:, None])


@triton.jit(do_not_specialize=["tiles"])
def _settle(p, exponent, mass, top, total, shrink, tiles, BLOCK_V: tl.constexpr, BLOCK_T: tl.constexpr):
    """Brings one row of a chunk to one exponent, and the totals of the row with it."""
    row = tl.program_id(0).to(tl.int64)
    old = tl.load(top + row)
    new = old
    for first in range(0, tiles, BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        new = tl.maximum(new, tl.max(tl.load(exponent + row * tiles + t, mask=t < tiles, other=_NOTHING), 0))
    sum = tl.load(total + row) * tl.exp2(old - new)
    for first in range(0, tiles, BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        e = tl.load(exponent + row * tiles + t, mask=t < tiles, other=_NOTHING)
        factor = tl.exp2(e - new)
        sum += tl.sum(tl.load(mass + row * tiles + t, mask=t < tiles, other=0.0) * factor, 0)
        at = p + (row * tiles + t)[:, None] * BLOCK_V + tl.arange(0, BLOCK_V)[None, :]
        stale = ((t < tiles) & (e < new))[:, None]
        tl.store(at, (tl.load(at, mask=stale, other=0.0) * factor[:, None]).to(p.dtype.element_ty), mask=stale)
    tl.store(top + row, new)
    tl.store(total + row, sum)
    tl.store(shrink + row, tl.exp2(old - new))


@triton.jit
def _halves(x, M: tl.constexpr, N: tl.constexpr):
    """x [M, N] as its left and right half of the columns, in registers."""
    return tl.split(tl.permute(tl.reshape(x, (M, 2, N // 2)), (0, 2, 1)))


@triton.jit(do_not_specialize=["R", "start", "tiles"])
def _accumulate(
    p, head, shrink, acc,
    R, V, h, start, tiles, head_row, head_col,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc = shrink·acc + p @ head, a tile of rows × hidden over one part of a chunk; each part has its acc."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    col = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    width = tiles * BLOCK_V
    share = tl.cdiv(width // BLOCK_K, tl.num_programs(2)) * BLOCK_K
    begin = tl.program_id(2) * share
    k = begin + tl.arange(0, BLOCK_K)
    p_at = p + tl.minimum(row, R - 1).to(tl.int64)[:, None] * width + k[None, :]
    w_at = head + (start + k).to(tl.int64)[:, None] * head_row + col.to(tl.int64)[None, :] * head_col
    sum = tl.zeros((BLOCK_R, BLOCK_H), tl.float32)
    for first in range(0, tl.minimum(share, width - begin), BLOCK_K):
        a = tl.load(p_at)  # [BLOCK_R, BLOCK_K]
        w = tl.load(w_at, mask=(k[:, None] < V - start - first) & (col[None, :] < h), other=0.0)  # [BLOCK_K, BLOCK_H]
        if UPCAST:
            a, w = a.to(tl.float32), w.to(tl.float32)
        sum = tl.dot(a, w, sum, input_precision=PRECISION)
        p_at += BLOCK_K
        w_at += BLOCK_K * tl.cast(head_row, tl.int64)
    # the old sums only now, and a quarter of the columns at a time: beside the products there are no registers for them
    scale = tl.load(shrink + row, mask=row < R, other=0.0)[:, None]
    line = acc + (tl.program_id(2).to(tl.int64) * R + row[:, None]) * h
    left, right = _halves(sum, BLOCK_R, BLOCK_H)
    quarters = _halves(left, BLOCK_R, BLOCK_H // 2) + _halves(right, BLOCK_R, BLOCK_H // 2)
    for i in tl.static_range(4):
        quarter_col = tl.program_id(1) * BLOCK_H + i * (BLOCK_H // 4) + tl.arange(0, BLOCK_H // 4)
        within = (row < R)[:, None] & (quarter_col < h)[None, :]
        old = tl.load(line + quarter_col[None, :], mask=within, other=0.0)
        tl.store(line + quarter_col[None, :], old * scale + quarters[i], mask=within)


@triton.jit(do_not_specialize=["parts"])
def _finish(
    acc, top, total, own, head, labels, weight, losses, grad,
    parts, V, h, softcap, head_row, head_col, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """The parts and the label join: loss and gradient of one row, a block of hidden."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    e, mine = tl.load(top + row), tl.load(own + row)
    most = tl.maximum(e, mine)
    others, scale = tl.load(total + row), tl.exp2(e - most)
    partition = others * scale + tl.exp2(mine - most)
    w = tl.load(weight + row)
    if tl.program_id(1) == 0:
        tl.store(losses + row, w * (tl.log(partition) + (most - mine) * _LN2))
    back = others
    if softcap is not None:
        t = mine * _LN2 / softcap
        back *= 1 - t * t
    label = tl.minimum(tl.maximum(tl.load(labels + row), 0), V - 1)  # outside, `own` is NaN
    target = tl.load(head + label * head_row + col.to(tl.int64) * head_col, mask=col < h, other=0.0).to(tl.float32)
    sum = tl.zeros((BLOCK_H,), tl.float32)
    for part in range(parts):
        sum += tl.load(acc + (part * tl.num_programs(0) + row) * h + col, mask=col < h, other=0.0)
    value = w * scale / partition * (sum - back * target)
    tl.store(grad + row * h + col, value.to(grad.dtype.element_ty), mask=col < h)


def target_cross_entropy(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    sample_weight: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the weighted negative log-likelihood of each row's label, and the gradient of their sum in hidden.

    Beside the results it needs 4·R·h bytes for fp32 sums, times the number of parts into which a chunk is cut if the
    sums have fewer tiles than there are multiprocessors. It also needs R rows of probabilities in the dtype of hidden,
    of `_CHUNK` columns, or more if that gives every multiprocessor two tiles.

    Args:
        hidden: [R, h] bf16, fp16 or fp32, any strides.
        head_weight: [V, h], same dtype, any strides.
        labels: [R] int64 in [0, V); a row with another label gets NaN.
        sample_weight: [R], factor of each row's loss.
        bias: [V] or None.
        softcap: c of cap(z) = c·tanh(z/c); None for no cap.

    Returns:
        (losses [R] fp32, grad [R, h] in the dtype of hidden), on the device of hidden, without a synchronization.

    Raises:
        ValueError: another shape or dtype.
    """
    R, h, V = *hidden.shape, len(head_weight)
    if hidden.dtype not in DTYPES or head_weight.dtype != hidden.dtype:
        raise ValueError(
            f"hidden is {hidden.dtype}, head_weight {head_weight.dtype}; expected both to be one of {DTYPES}"
        )
    expected = {"head_weight": (V, h), "labels": (R,), "sample_weight": (R,), "bias": (V,)}
    tensors = {"head_weight": head_weight, "labels": labels, "sample_weight": sample_weight, "bias": bias}
    for name, shape in expected.items():
        if (tensor := tensors[name]) is not None and tensor.shape != shape:
            raise ValueError(f"{name} is {list(tensor.shape)}, expected {list(shape)} for hidden {[R, h]}")
    losses = torch.empty(R, dtype=torch.float32, device=hidden.device)
    interpreted = triton.knobs.runtime.interpret
    upcast = interpreted and hidden.dtype == torch.bfloat16  # the interpreter does not round to bf16 either
    grad = torch.empty(R, h, dtype=torch.float32 if upcast else hidden.dtype, device=hidden.device)
    if R == 0:
        return losses, grad.to(hidden.dtype)
    with torch.cuda.device_of(hidden):
        target = None if interpreted else triton.runtime.driver.active.get_current_target()
    first, second = config_for(hidden.dtype, R, softcap is not None, target)
    rows, columns, width = triton.cdiv(R, first.BLOCK_R), triton.cdiv(h, second.BLOCK_N), first.BLOCK_N
    # whole waves of either product on all multiprocessors, and so many columns that reading the sums is cheap
    processors = _processors(hidden.device)
    tiles = min(triton.cdiv(V, width), max(_CHUNK // width, _WAVES * processors // rows))
    parts = max(1, processors // (rows * columns))
    p = grad.new_empty(R, tiles * width)
    exponent, mass = losses.new_empty(2, R, tiles)
    top, total, own = (losses.new_full((R,), x) for x in (_NOTHING.value, 0.0, float("nan")))
    shrink, acc = losses.new_empty(R), losses.new_zeros(parts, R, h)
    labels, weight = labels.contiguous(), sample_weight.float().contiguous()
    bias = None if bias is None else bias.contiguous()
    cap, strides = None if softcap is None else float(softcap), head_weight.stride()
    precision = "tf32x3" if target is None or target.backend == "cuda" else "ieee"  # AMD multiplies fp32 natively
    how = {"PRECISION": precision, "UPCAST": upcast, "enable_fp_fusion": True}
    with torch.cuda.device_of(hidden):
        for start in range(0, V, tiles * width):
            here = min(tiles, triton.cdiv(V - start, width))
            _exponentials[rows, here](
                hidden, head_weight, bias, labels, p, exponent, mass, top, own,
                R, V, h, start, here, cap, *hidden.stride(), *strides, **how, **first.meta("V"),
            )  # fmt: skip
            _settle[(R,)](p, exponent, mass, top, total, shrink, here, BLOCK_V=width, BLOCK_T=32, enable_fp_fusion=True)
            _accumulate[rows, columns, parts](
                p, head_weight, shrink, acc, R, V, h, start, here, *strides, BLOCK_V=width, **how, **second.meta("H")
            )
        _finish[R, triton.cdiv(h, 1024)](
            acc, top, total, own, head_weight, labels, weight, losses, grad,
            parts, V, h, cap, *strides, BLOCK_H=1024, enable_fp_fusion=True,
        )  # fmt: skip
    return losses, grad.to(hidden.dtype)


def _processors(device: torch.device) -> int:
    return 1 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def config_for(dtype: torch.dtype, R: int, capped: bool, target: GPUTarget | None) -> tuple[Config, Config]:
    """Tiles of the two products on a target, None for the interpreter.

    With up to 64 rows, only reading the head counts; ptxas of Triton 3.6 would spill on Ampere to fit a third program
    in, if it were not told how many registers there are for two. With more, tiles of 128 × 128 wait for Hopper's shared
    memory: a step of 64 fills and reads 80 KiB in the time for 64 KiB, a step of 128 × 256 fills and reads 128 KiB in
    the time for 128 KiB. The first tile is that wide if z fits into the registers, which it does not with a soft-cap's
    slope; the second always is. Parts of a chunk make up for its fewer tiles.
    """
    stages = 4 if target is None or target.backend == "cuda" else 2  # AMD's shared memory is 64 KiB
    generation = target.arch // 10 if target is not None and target.backend == "cuda" else 0
    if dtype == torch.float32:
        return (Config(64, 64, 32, 8 if generation == 10 else 4, min(stages, 3)),) * 2  # four would spill on Blackwell
    if R <= 64:
        narrow = Config(64, 128, 64, 4, stages)
        return narrow, narrow._replace(maxnreg=224 if generation == 8 else None)
    square = Config(128, 128, 64, 8, stages)
    wide = square._replace(BLOCK_N=256) if generation == 9 else square
    return square if capped else wide, wide
