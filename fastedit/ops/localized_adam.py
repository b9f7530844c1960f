"""Adam on one weight from the factors of its gradient, G and X: dW = GᵀX exists only tile by tile.

Formulas are in fp32, whatever is stored, and in torch's order: Adam adds weight decay to the gradient, AdamW
(`decoupled`) shrinks the weight. The reference forms all of dW. Torch's own fused step, which is used if everything is
fp32, forms some rows of it at a time.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastedit.errors import ConfigError, TensorError
from fastedit.ops.library import define, writes_in_place
from fastedit.ops.registry import Backend, Call, Option, choose, no_triton, only_interpreted, register

_GRAM_ROWS = 2048
_TILE = 1 << 22
"""Elements of dW (16 MiB) that torch's fused step takes at once: a CPU is then as fast as with all of dW."""
_WORD = 0xFFFFFFFF


@torch.no_grad()
def localized_adam_(
    weight: Tensor,
    grad_output: Tensor,
    input: Tensor,
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor | None,
    step: int | Tensor,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    max_norm: float | None = None,
    max_change: float | None = None,
    original: Tensor | None = None,
    copy: Tensor | None = None,
    seed: int | None = None,
    skip: Tensor | None = None,
    allow_tf32: bool = False,
    backend: Backend = "auto",
) -> None:
    """Take a step of Adam on the weight of y = x Wᵀ, from the rows of x and of the gradient of y; all in place.

    To accumulate micro-batches, concatenate their rows. For a Conv1D of transformers, whose weight is [in, out], give
    `weight.T`, and moments of that layout (`torch.zeros_like` keeps it).

    Args:
        weight: [out, in], fp32, or bf16 (then give a seed: rounding to nearest loses steps below half a unit).
        grad_output: G [T, out], fp32, bf16 or fp16, any strides.
        input: X [T, in].
        exp_avg: like weight, fp32 or bf16; None, with exp_avg_sq, for plain SGD.
        exp_avg_sq: like exp_avg.
        step: number of this step, from 1; or a scalar tensor on the device, which needs no synchronization.
        lr, betas, eps, weight_decay: as in `torch.optim.Adam`.
        decoupled: use the weight decay of AdamW.
        max_norm: scale dW to at most this norm, as `torch.nn.utils.clip_grad_norm_` does.
        max_change: keep every element within this distance of `original`, rounding to bf16 included.
        original: [out, in], the weight from which `max_change` is measured.
        copy: [out, in], also gets the new weight, rounded to nearest: the model's weight, if `weight` is its master.
        seed: round bf16 weight and moments stochastically, so that the mean is exact. The bits depend on
            (seed, step, element), not on backend or device.
        skip: scalar tensor on the device; if it is not 0, nothing changes.
        allow_tf32: multiply fp32 G and X in tf32 on tensor cores, which do not support fp32.
        backend: see `fastedit.ops.registry`.

    Raises:
        TensorError: a tensor has a wrong shape, dtype or device.
        ConfigError: options that do not go together; a backend that cannot serve.
    """
    if torch.compiler.is_compiling():
        at = step if isinstance(step, Tensor) else torch.full((), step, device=weight.device)
        _operator(
            weight, grad_output, input, exp_avg, exp_avg_sq, at, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay,
            decoupled=decoupled, max_norm=max_norm, max_change=max_change, original=original, copy=copy, seed=seed,
            skip=skip, allow_tf32=allow_tf32, backend=backend,
        )  # fmt: skip
        return
    matrices = {
        "weight": weight, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "original": original, "copy": copy
    }  # fmt: skip
    given = {name: x for name, x in matrices.items() if x is not None}
    _check(given, grad_output, input, step, max_change)
    dtype = torch.promote_types(grad_output.dtype, input.dtype)
    a, b = grad_output.to(dtype), input.to(dtype)
    strided = not all(x.stride(1) == 1 or x.shape[1] == 1 for x in given.values())
    if strided and all(x.stride(0) == 1 or x.shape[0] == 1 for x in given.values()):  # stored [in, out]
        a, b, weight, strided = b, a, weight.T, False
        exp_avg, exp_avg_sq, original, copy = (
            None if x is None else x.T for x in (exp_avg, exp_avg_sq, original, copy)
        )
    taken = choose(
        "localized_adam_", backend, device=weight.device, dtype=dtype, T=len(a), strided=strided, tf32=allow_tf32
    )
    serve = _fused if _plain(weight, exp_avg, exp_avg_sq, original, copy) else _reference
    if taken == "triton":
        from fastedit.kernels.localized_adam import localized_adam_ as launch

        serve = partial(launch, allow_tf32=allow_tf32)
    serve(
        weight,
        a,
        b,
        exp_avg,
        exp_avg_sq,
        step,
        lr=lr,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        decoupled=decoupled,
        clip=None if max_norm is None else (max_norm / (_gradient_norm(a, b) + 1e-6)).clamp(max=1).float(),
        max_change=max_change or 0.0,
        original=original,
        copy=copy,
        seed=seed,
        skip=skip,
    )


def _plain(weight: Tensor, exp_avg: Tensor | None, exp_avg_sq: Tensor | None, *others: Tensor | None) -> bool:
    """Whether torch's own fused step suffices: only weight and moments are given, in fp32."""
    known = (weight, exp_avg, exp_avg_sq)
    alone = all(x is None for x in others)
    return alone and all(x is not None and x.dtype == torch.float32 and x.is_contiguous() for x in known)


def _fused(
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
    clip: Tensor | None,
    skip: Tensor | None,
    **_: Any,  # excluded by `_plain`
) -> None:
    """Do as `_reference` if everything is fp32: for some rows of dW at a time, in one pass with weight and moments."""
    number = step.float() if isinstance(step, Tensor) else torch.full((), float(step), device=weight.device)
    found_inf = None if skip is None else (skip != 0).float()
    assert exp_avg is not None  # ensured by `_plain`
    assert exp_avg_sq is not None
    step_of = torch._fused_adamw_ if decoupled else torch._fused_adam_
    height = -(-len(weight) // -(-max(1, weight.numel()) // _TILE))  # of nearly equal tiles
    whole = (weight, a.T, exp_avg, exp_avg_sq)
    tiles = [whole] if height >= len(weight) else zip(*(x.split(height) for x in whole), strict=True)
    for tile, a_tile, first, second in tiles:
        g = _product(a_tile, b)
        if clip is not None:
            g *= clip
        step_of(
            [tile], [g], [first], [second], [], [number.view(())], lr=lr, beta1=betas[0], beta2=betas[1],
            weight_decay=weight_decay, eps=eps, amsgrad=False, maximize=False, found_inf=found_inf,
        )  # fmt: skip


def _reference(
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
    clip: Tensor | None,
    max_change: float,
    original: Tensor | None,
    copy: Tensor | None,
    seed: int | None,
    skip: Tensor | None,
) -> None:
    """Take the step in plain torch, for a weight [M, N], a [T, M] and b [T, N]."""
    g = _product(a.T, b)
    w = weight.float()
    if clip is not None:
        g *= clip
    if decoupled:
        w = w * (1 - lr * weight_decay)
    elif weight_decay:
        g += weight_decay * w
    new: list[tuple[Tensor, Tensor, int | None]] = []
    if exp_avg is None or exp_avg_sq is None:
        w = w - lr * g
    else:
        t = step.double() if isinstance(step, Tensor) else step
        m = betas[0] * exp_avg.float() + (1 - betas[0]) * g
        v = betas[1] * exp_avg_sq.float() + (1 - betas[1]) * g * g
        w = w - lr / (1 - betas[0] ** t) * m / (v.sqrt() / (1 - betas[1] ** t) ** 0.5 + eps)
        new = [(exp_avg, m, 1), (exp_avg_sq, v, 2)]
    if original is not None:
        low, high = original.float() - max_change, original.float() + max_change
        if weight.dtype == torch.bfloat16:  # rounding does not leave an interval that ends in bf16 numbers
            low, high = _bf16_toward(low, math.inf), _bf16_toward(high, -math.inf)
        w = w.maximum(low).minimum(high)
    new.append((weight, w, 0))
    if copy is not None:
        new.append((copy, w, None))
    for stored, value, number in new:
        if stored.dtype == torch.bfloat16 and seed is not None and number is not None:
            noise = _random_halves(stored.shape, seed, step, number, stored.device)
            value = torch.where(
                value.isnan(), value, ((value.view(torch.int32) + noise) & -0x10000).view(torch.float32)
            )
        stored.copy_(value if skip is None else torch.where(skip != 0, stored.float(), value))


def _bf16_toward(x: Tensor, limit: float) -> Tensor:
    """x, or if bf16 cannot hold it, the next value toward the limit that bf16 can hold; fp32."""
    near = x.bfloat16()
    beyond = near.float() < x if limit > 0 else near.float() > x
    return torch.where(beyond, torch.nextafter(near, torch.full_like(near, limit)), near).float()


def _random_halves(shape: torch.Size, seed: int, step: int | Tensor, number: int, device: torch.device) -> Tensor:
    """16-bit random numbers [M, N] int32: Philox-4x32-10, key `seed`, counter (row, column // 8, step, number)."""
    M, N = shape
    row, eighth = torch.arange(M, device=device)[:, None], torch.arange(-(-N // 8), device=device)[None, :]
    c0, c1 = torch.broadcast_tensors(row, eighth)
    c2 = torch.zeros_like(c0) + (step.long() if isinstance(step, Tensor) else step)
    c3 = torch.full_like(c0, number)
    k0, k1 = seed & _WORD, seed >> 32 & _WORD
    for _ in range(10):  # the upper half of a 64-bit product is right although it is signed
        even, odd = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = odd >> 32 & _WORD ^ c1 ^ k0, odd & _WORD, even >> 32 & _WORD ^ c3 ^ k1, even & _WORD
        k0, k1 = k0 + 0x9E3779B9 & _WORD, k1 + 0xBB67AE85 & _WORD
    words = torch.stack((c0, c1, c2, c3), -1)
    return torch.stack((words & 0xFFFF, words >> 16), -1).reshape(M, -1)[:, :N].int()


def _gradient_norm(a: Tensor, b: Tensor) -> Tensor:
    """‖AᵀB‖ [] fp64 without forming AᵀB: its square is Σ (AAᵀ ∘ BBᵀ), of T × T matrices, some rows at a time."""
    total = torch.zeros((), dtype=torch.float64, device=a.device)
    for some_a, some_b in zip(a.split(_GRAM_ROWS), b.split(_GRAM_ROWS), strict=True):
        total += _product(some_a, a.T).mul_(_product(some_b, b.T)).sum(dtype=torch.float64)
    return total.clamp_min_(0).sqrt_()


def _product(x: Tensor, y: Tensor) -> Tensor:
    """x @ y, accumulated and returned in fp32."""
    if x.is_cuda and x.dtype != torch.float32:
        return torch.mm(x, y, out_dtype=torch.float32)
    x, y = x.float(), y.float()
    if torch.is_autocast_enabled(x.device.type):  # autocast does not change products with `out`
        return torch.mm(x, y, out=x.new_empty(len(x), y.shape[1]))
    return x @ y


def _check(
    matrices: dict[str, Tensor], grad_output: Tensor, input: Tensor, step: int | Tensor, max_change: float | None
) -> None:
    weight = matrices["weight"]
    if weight.ndim != 2 or grad_output.ndim != 2 or input.ndim != 2:
        shapes = ", ".join(str(list(x.shape)) for x in (weight, grad_output, input))
        raise TensorError(f"weight, grad_output and input are {shapes}; expected [out, in], [T, out] and [T, in]")
    out_in, T = list(weight.shape), len(input)
    wanted = dict.fromkeys(matrices, out_in) | {"grad_output": [T, out_in[0]], "input": [T, out_in[1]]}
    for name, x in (matrices | {"grad_output": grad_output, "input": input}).items():
        if list(x.shape) != wanted[name] or x.device != weight.device:
            raise TensorError(
                f"{name} is {list(x.shape)} on {x.device}, expected {wanted[name]} on {weight.device} "
                f"for a weight {out_in} and {T} inputs"
            )
        stored = name in ("weight", "exp_avg", "exp_avg_sq")
        known = [torch.float32, torch.bfloat16] + [torch.float16] * (not stored)
        if x.dtype not in known:
            raise TensorError(f"{name} is {x.dtype}, expected {' or '.join(map(str, known))}")
    if ("exp_avg" in matrices) != ("exp_avg_sq" in matrices):
        raise ConfigError("one of exp_avg and exp_avg_sq is None; give both, or none for SGD")
    if ("original" in matrices) != (max_change is not None):
        raise ConfigError("max_change and original come together: the bound, and the weight that it is counted from")
    if isinstance(step, int) and step < 1:
        raise ConfigError(f"step is {step}; the first step is 1")
    if isinstance(step, Tensor) and step.numel() != 1:
        raise ConfigError(f"step has {step.numel()} elements; give the number of the step")


def _cannot(call: Call) -> str | None:
    strided = "neither the rows nor the columns of all of weight, moments, original and copy are contiguous"
    return no_triton(call) or (strided if call.sizes.get("strided") else None)


def _slower(call: Call) -> str | None:
    if reason := only_interpreted(call):
        return reason
    if call.dtype == torch.float32 and not call.sizes.get("tf32") and call.sizes.get("T", 0) > 256:
        # not measured: at the rates of an H200, multiplying then takes as long as moving w, m and v
        return f"T = {call.sizes['T']} is above 256, and fp32 products without tensor cores take longer than memory"
    return None


register("localized_adam_", Option("triton", _cannot, _slower))


_operator = define(
    "localized_adam_(Tensor(a!) weight, Tensor grad_output, Tensor input, Tensor(b!)? exp_avg, Tensor(c!)? exp_avg_sq, "
    "Tensor step, *, float lr, float[] betas=[0.9, 0.999], float eps=1e-8, float weight_decay=0.0, "
    "bool decoupled=False, float? max_norm=None, float? max_change=None, Tensor? original=None, Tensor(d!)? copy=None, "
    'SymInt? seed=None, Tensor? skip=None, bool allow_tf32=False, str backend="auto") -> ()',
    localized_adam_,
    writes_in_place,
)
