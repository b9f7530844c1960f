"""One pass over a weight: its gradient is formed tile by tile and used by the optimizer at once, never stored.

    D = AᵀB                                       A [T, M], B [T, N]: the gradient of W [M, N]
    g = clip · D + decay · w                      or w ← (1 − lr·decay) w first, and no decay in g (AdamW)
    m ← β₁ m + (1 − β₁) g,  v ← β₂ v + (1 − β₂) g²
    w ← w − lr / (1 − β₁ᵗ) · m / (√v / √(1 − β₂ᵗ) + ε)   or w − lr·g without moments (SGD)
    w ← min(max(w, origin − bound), origin + bound)

For a weight stored [out, in], A is the gradient of the outputs and B the inputs; for one stored [in, out], the reverse.
A program owns a tile [BLOCK_M, BLOCK_N]: it sums D over T on tensor cores, and then updates the tile in eight parts of
its columns, so that only an eighth or two of w, m and v are in registers with D at a time. Tiles are visited in columns
of GROUP tiles, so that their A and B stay in L2; w, m and v are read once and marked to be evicted first.

        B [T, N]                 BLOCK_N = 128          an eighth: 16 columns
        ┌───┬───┬───┐                      ┌──┬──┬──┬──┬──┬──┬──┬──┐
        │   │▒▒▒│   │ BLOCK_T              │D0│D1│D2│D3│D4│D5│D6│D7│ BLOCK_M = 128
        └───┴───┴───┘                      └──┴──┴──┴──┴──┴──┴──┴──┘
    Aᵀ  ┌───┬───┬───┐             load   w0 w1 w2 w3 ...             before AHEAD: one after the other,
    [M, │ 0 │ 2 │ 4 │             update    w0 w1 w2 ...             as D fills the registers
    T]  ├───┼───┼───┤             load         w3 w4 w5 w6 w7        from AHEAD on: the next is on its way
    ▒▒▒ │ 1 │ 3 │ 5 │ GROUP = 2   update       w2 w3 w4 w5 w6 w7     while one is updated
        └───┴───┴───┘
        W: order of programs

For bf16 W and fp32 m and v, a program moves 20 bytes an element, 320 KiB in all, and reads T · 512 bytes of A and B,
mostly from L2; it computes 32,768 · T flops. On sm_90 a thread has 128 registers, 64 of them for D.

bf16 is rounded by bit arithmetic: half a unit (to nearest) or random bits (stochastic) are added to the 16 bits that
are dropped. Philox makes eight of these at once, with the seed as key and (row, column // 8, t, tensor) as counter.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget


class Config(NamedTuple):
    """Tile sizes and launch options, chosen by `config_for`."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_T: int
    GROUP: int  # tiles that are visited in a column before the next column
    AHEAD: int  # the eighth from which on the next is loaded before the present one is updated
    num_warps: int
    num_stages: int
    maxnreg: int | None = None


@triton.jit
def _halves(x, M: tl.constexpr, N: tl.constexpr):
    """x [M, N] as its left and right half of the columns, in registers."""
    return tl.split(tl.permute(tl.reshape(x, (M, 2, N // 2)), (0, 2, 1)))


@triton.jit
def _store(pointers, x, mask, seed, step, row, eighth, TENSOR: tl.constexpr, STOCHASTIC: tl.constexpr):
    """Store x [M, N] (fp32) in the pointers' type; its elements are counted by row [M, 1] and eighth [1, N // 8]."""
    if pointers.dtype.element_ty == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        if STOCHASTIC:
            r0, r1, r2, r3 = tl.philox(seed, row, eighth, step, TENSOR)  # 4 × [M, N // 8] uint32
            words = tl.join(tl.join(r0, r2), tl.join(r1, r3))  # [M, N // 8, 2, 2]: r0, r1, r2, r3
            noise = tl.reshape(tl.join(words & 0xFFFF, words >> 16), x.shape).to(tl.int32)
        else:
            noise = 0x7FFF + ((bits >> 16) & 1)  # ties to even
        # a NaN whose bits all are ones would overflow into a zero
        x = tl.where(x == x, ((bits + noise) & -0x10000).to(tl.float32, bitcast=True), x)
    tl.store(pointers, x.to(pointers.dtype.element_ty), mask=mask, eviction_policy="evict_first")


@triton.jit
def _bf16_toward(x, UP: tl.constexpr):
    """x, or if bf16 cannot hold it, the next value above (UP) or below that bf16 can hold."""
    bits = x.to(tl.int32, bitcast=True)
    short = bits & -0x10000
    away = (bits != short) & ((bits < 0) != UP)  # else dropping bits, which is toward zero, is that direction
    return tl.where(away, short + 0x10000, short).to(tl.float32, bitcast=True)


@triton.jit
def _place(row, first, M, N, BY_FOURS: tl.constexpr, WIDTH: tl.constexpr):
    """The WIDTH columns from `first` on, and which elements of them and `row` are inside."""
    column = first + tl.arange(0, WIDTH)
    if BY_FOURS:
        column = tl.max_contiguous(column, 4)
    return column, (row < M)[:, None] & (column < N)[None, :]


@triton.jit
def _fetch(pointer, row, column, stride, mask):
    """Elements in the dtype they are stored in; None if they are not given."""
    if pointer is not None:
        at = pointer + row[:, None] * stride + column[None, :]
        pointer = tl.load(at, mask=mask, other=0.0, eviction_policy="evict_first")
    return pointer


@triton.jit
def _load(
    row, first, M, N, pointers, strides, BY_FOURS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """w, m and v of `row` and the WIDTH columns from `first` on."""
    w_ptr, m_ptr, v_ptr, _, _ = pointers
    w_row, m_row, v_row, _, _ = strides
    column, mask = _place(row, first, M, N, BY_FOURS, WIDTH)
    return (
        _fetch(w_ptr, row, column, w_row, mask),
        _fetch(m_ptr, row, column, m_row, mask),
        _fetch(v_ptr, row, column, v_row, mask),
    )


@triton.jit
def _update(
    d, loaded, row, first, M, N, pointers, strides, hyper, clip, step, step_size, root, seed,
    DECOUPLED: tl.constexpr, STOCHASTIC: tl.constexpr, BY_FOURS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Update what `_load` gave by its gradient d, and store it."""
    w_ptr, m_ptr, v_ptr, copy_ptr, origin_ptr = pointers
    w_row, m_row, v_row, copy_row, origin_row = strides
    lr, beta1, rest1, beta2, rest2, eps, decay, bound = hyper
    w, m, v = loaded
    column, mask = _place(row, first, M, N, BY_FOURS, WIDTH)
    line, eighth = row.to(tl.int32)[:, None], (first // 8 + tl.arange(0, WIDTH // 8))[None, :]
    w = w.to(tl.float32)
    g = d * clip
    if DECOUPLED:
        w *= 1 - lr * decay
    else:
        g += decay * w
    if m_ptr is None:
        w -= lr * g
    else:
        m = beta1 * m.to(tl.float32) + rest1 * g
        v = beta2 * v.to(tl.float32) + rest2 * g * g
        m_at = m_ptr + row[:, None] * m_row + column[None, :]
        v_at = v_ptr + row[:, None] * v_row + column[None, :]
        _store(m_at, m, mask, seed, step, line, eighth, 1, STOCHASTIC)
        _store(v_at, v, mask, seed, step, line, eighth, 2, STOCHASTIC)
        w -= step_size * m / (tl.sqrt(v) * root + eps)
    if origin_ptr is not None:  # only here: it would not fit into the registers beside the others
        origin = _fetch(origin_ptr, row, column, origin_row, mask).to(tl.float32)
        low, high = origin - bound, origin + bound
        if w_ptr.dtype.element_ty == tl.bfloat16:  # rounding does not leave an interval that ends in bf16 numbers
            low, high = _bf16_toward(low, True), _bf16_toward(high, False)
        w = tl.minimum(tl.maximum(w, low, tl.PropagateNan.ALL), high, tl.PropagateNan.ALL)
    _store(w_ptr + row[:, None] * w_row + column[None, :], w, mask, seed, step, line, eighth, 0, STOCHASTIC)
    if copy_ptr is not None:
        _store(copy_ptr + row[:, None] * copy_row + column[None, :], w, mask, seed, step, line, eighth, 0, False)


@triton.jit(do_not_specialize=["T", "step", "seed"])
def localized_adam_kernel(
    a_ptr, b_ptr, w_ptr, m_ptr, v_ptr, copy_ptr, origin_ptr, clip_ptr, skip_ptr,
    T, M, N, a_row, a_col, b_row, b_col, w_row, m_row, v_row, copy_row, origin_row, step, seed,
    lr, beta1, rest1, beta2, rest2, log_beta1, log_beta2, eps, decay, bound,
    DECOUPLED: tl.constexpr, STOCHASTIC: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, GROUP: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """The module's formula on the tile of this program; `step` is t, a number or a pointer to one."""
    if skip_ptr is not None:  # noqa: SIM102  # decided when compiling
        if tl.load(skip_ptr) != 0:
            return
    # before the products, which hide them
    t = tl.load(step).to(tl.int32) if step.dtype.is_ptr() else step
    # fp64, as 1 − 0.999ᵗ loses four digits of fp32 at t = 1
    step_size = (lr / (1 - tl.exp(t * tl.cast(log_beta1, tl.float64)))).to(tl.float32)
    root = (1 / tl.sqrt(1 - tl.exp(t * tl.cast(log_beta2, tl.float64)))).to(tl.float32)
    clip = 1.0 if clip_ptr is None else tl.load(clip_ptr)

    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    program = tl.program_id(0)
    group, in_group = program // (GROUP * tiles_n), program % (GROUP * tiles_n)
    height = min(tiles_m - group * GROUP, GROUP)
    row = ((group * GROUP + in_group % height) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    first = in_group // height * BLOCK_N
    column = (first + tl.arange(0, BLOCK_N)).to(tl.int64)

    time = tl.arange(0, BLOCK_T)
    a_at = a_ptr + time.to(tl.int64)[None, :] * a_row + row[:, None] * a_col
    b_at = b_ptr + time.to(tl.int64)[:, None] * b_row + column[None, :] * b_col
    d = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, T, BLOCK_T):
        alive = time < T - start
        a = tl.load(a_at, mask=(row < M)[:, None] & alive[None, :], other=0.0)  # [BLOCK_M, BLOCK_T], Aᵀ
        b = tl.load(b_at, mask=alive[:, None] & (column < N)[None, :], other=0.0)  # [BLOCK_T, BLOCK_N]
        if UPCAST:  # the interpreter's bf16 product is wrong
            a, b = a.to(tl.float32), b.to(tl.float32)
        d = tl.dot(a, b, d, input_precision=PRECISION)
        a_at += BLOCK_T * tl.cast(a_row, tl.int64)
        b_at += BLOCK_T * tl.cast(b_row, tl.int64)

    left, right = _halves(d, BLOCK_M, BLOCK_N)
    first_quarter, second_quarter = _halves(left, BLOCK_M, BLOCK_N // 2)
    third_quarter, last_quarter = _halves(right, BLOCK_M, BLOCK_N // 2)
    parts = _halves(first_quarter, BLOCK_M, BLOCK_N // 4) + _halves(second_quarter, BLOCK_M, BLOCK_N // 4)
    parts += _halves(third_quarter, BLOCK_M, BLOCK_N // 4) + _halves(last_quarter, BLOCK_M, BLOCK_N // 4)
    # if a thread takes eight of bf16, fp32 moves between threads to be stored by fours; Philox makes eight, though, and
    # beside products of fp32 there are no registers to spare
    fours: tl.constexpr = not STOCHASTIC and a_ptr.dtype.element_ty != tl.float32
    pointers, strides = (w_ptr, m_ptr, v_ptr, copy_ptr, origin_ptr), (w_row, m_row, v_row, copy_row, origin_row)
    hyper = lr, beta1, rest1, beta2, rest2, eps, decay, bound
    width: tl.constexpr = BLOCK_N // 8
    loaded = _load(row, first, M, N, pointers, strides, fours, width)
    for i in tl.static_range(8):
        following = loaded
        if (i >= AHEAD) & (i < 7):
            following = _load(row, first + (i + 1) * width, M, N, pointers, strides, fours, width)
        _update(
            parts[i], loaded, row, first + i * width, M, N, pointers, strides, hyper, clip, t, step_size, root, seed,
            DECOUPLED, STOCHASTIC, fours, width,
        )  # fmt: skip
        if i < AHEAD:
            following = _load(row, first + (i + 1) * width, M, N, pointers, strides, fours, width)
        loaded = following


def config_for(dtype: torch.dtype, allow_tf32: bool, whole: bool, spare: bool, target: GPUTarget | None) -> Config:
    """The tiles for products of this dtype on a target; None is the interpreter.

    128 × 128 on eight warps: D takes 64 registers per thread, and with an eighth of w, m and v it fits into 128. So two
    programs share a Hopper multiprocessor, and one loads while the other multiplies. This needs `whole`: M, N, row
    strides and all addresses are multiples of 16, and columns are contiguous; otherwise it would spill. A second eighth
    fits when three of D are done; with bf16 moments or an original, which are not `spare`, when five are.
    NVIDIA has no tensor cores for fp32: half the tile on four warps, 8 × 8 products per thread; three programs fit.
    """
    if target is None:
        return Config(128, 128, 64, 16, 0, 4, 1)
    cuda = target.backend == "cuda"
    stages = 3 if cuda else 2
    if dtype == torch.float32:
        return Config(128, 128, 32, 16, 0, 8, stages) if allow_tf32 else Config(64, 128, 16, 16, 1, 4, stages)
    hopper = cuda and target.arch // 10 == 9
    block_t = 64 if cuda and target.arch >= 90 else 32
    tight = hopper and whole
    return Config(128, 128, block_t, 16, (3 if spare else 5) if tight else 0, 8, stages, 128 if tight else None)


def localized_adam_(
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor | None,
    step: int | Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decoupled: bool,
    clip: Tensor | None = None,
    max_change: float = 0.0,
    original: Tensor | None = None,
    copy: Tensor | None = None,
    seed: int | None = None,
    skip: Tensor | None = None,
    allow_tf32: bool = False,
    config: Config | None = None,
) -> None:
    """Launch the kernel: weight [M, N] fp32 or bf16 is updated by AᵀB, a [T, M] and b [T, N] of one dtype.

    weight, moments, original and copy are [M, N] with contiguous rows; clip (fp32) and skip are scalars on the device,
    and step may be one. Without moments it is SGD. Shapes and dtypes are not checked here.
    """
    (T, M), N = a.shape, b.shape[1]
    interpreted = triton.knobs.runtime.interpret
    if config is None:
        with torch.cuda.device_of(weight):
            target = None if interpreted else triton.runtime.driver.active.get_current_target()
        tensors = [x for x in (a, b, weight, exp_avg, exp_avg_sq, copy, original) if x is not None]
        laid = all(x.stride(1) == 1 and x.stride(0) % 16 == x.data_ptr() % 16 == 0 for x in tensors)
        spare = original is None and (exp_avg is None or exp_avg.dtype == torch.float32)
        config = config_for(a.dtype, allow_tf32, laid and M % 16 == N % 16 == 0, spare, target)
    meta = {name: value for name, value in config._asdict().items() if value is not None}
    rows = [0 if x is None else x.stride(0) for x in (weight, exp_avg, exp_avg_sq, copy, original)]
    logs = [math.log(beta) if beta else -math.inf for beta in betas]
    with torch.cuda.device_of(weight):
        localized_adam_kernel[(triton.cdiv(M, config.BLOCK_M) * triton.cdiv(N, config.BLOCK_N),)](
            a, b, weight, exp_avg, exp_avg_sq, copy, original, clip, skip,
            T, M, N, *a.stride(), *b.stride(), *rows, step, seed or 0,
            lr, betas[0], 1 - betas[0], betas[1], 1 - betas[1], *logs, eps, weight_decay, max_change,
            DECOUPLED=decoupled, STOCHASTIC=seed is not None, PRECISION="tf32" if allow_tf32 else "ieee",
            UPCAST=interpreted, enable_fp_fusion=True, **meta,
        )  # fmt: skip
