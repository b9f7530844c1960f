"""The solves of ROME, MEMIT, EMMET and AlphaEdit: rank-N updates against one factor of the second moment.

With C = L Lᵀ and whitened keys Y = L⁻¹K, the push-through identity turns both R Kᵀ (λC + K Kᵀ)⁻¹ and
R (KᵀC⁻¹K + αI)⁻¹ KᵀC⁻¹ into R (ridge·I + YᵀY)⁻¹ Yᵀ L⁻¹, an N×N system. It takes O(d²N + N³) operations, and its error
grows with cond(L) = √cond(C). In the code keys are rows: Kᵀ and Yᵀ [N, d].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.linalg import cholesky_ex, solve_triangular
from torch.nn.functional import normalize

from fastedit.errors import ConfigError, TensorError
from fastedit.ops.cholesky import (
    DEPENDENT,
    check_ridge,
    check_tensor,
    checked,
    cholesky,
    delicate,
    inverse,
    orthogonal,
    plus_diagonal,
    whiten,
)
from fastedit.ops.library import define
from fastedit.ops.registry import Backend, Call, Option, choose, no_triton, only_interpreted, register

Constraint = Literal["least-squares", "equality"]


@torch.no_grad()
def rank_k_update(
    keys: Tensor,
    residuals: Tensor,
    cov_factor: Tensor,
    *,
    ridge: float,
    constraint: Constraint = "least-squares",
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """The update ΔW = left @ right that writes residuals at keys and preserves outputs on C's distribution.

    least-squares (MEMIT): ΔW = R Kᵀ (ridge·C + K Kᵀ)⁻¹. equality (EMMET; ROME for N = 1 and ridge 0):
    ΔW = R (Kᵀ C⁻¹ K + ridge·I)⁻¹ Kᵀ C⁻¹ (arXiv 2403.14236). By push-through both are the same formula, but only
    equality is defined for ridge 0, where ΔW K = R.

    Args:
        keys: [N, d], or [B, N, d] for B independent problems with one factor. With ridge > 0, smaller problems may be
            padded by rows of zeros with residuals of zeros.
        residuals: [N, h] or [B, N, h], wanted minus current outputs.
        cov_factor: L [d, d], lower (the rest is not read), from `factor_covariance`; keep it in fp64.
        ridge: λ of MEMIT, α of EMMET; > 0, or ≥ 0 for equality.
        constraint: how the new pairs are met.
        backend: see `fastedit.ops.registry`; ConfigError if it cannot serve.

    Returns:
        (left [h, k], right [k, d]) with k = min(N, d), in the dtype of residuals; [B, …] for a batch. The computation
        is in fp64. Rounding the two to fp32 loses accuracy by the root of the system's condition number, because they
        share its inverse.

    Raises:
        ConfigError: ridge or constraint has a value that it cannot take.
        TensorError: keys or residuals hold NaN or infinity (names the row), or do not fit one another; cov_factor is
            not a factor, or has another width than the keys.
        DependentKeysError: equality at ridge 0 with keys that are linearly dependent, by `DEPENDENT`.
    """
    if torch.compiler.is_compiling():
        left, right = _update(keys, residuals, cov_factor, ridge=ridge, constraint=constraint, backend=backend)
        return left, right
    if constraint not in ("least-squares", "equality"):
        raise ConfigError(f'constraint is {constraint!r}; take "least-squares" or "equality"')
    check_ridge(ridge, "ridge", zero=constraint == "equality")
    rows, values, factor = checked(keys, residuals, cov_factor)
    taken = _choose(backend, rows, rows.shape[-1], ridge)
    white = whiten(rows, factor)
    if ridge == 0:  # a factorization shifted by the limit fails if an eigenvalue is below it
        unit = normalize(white, dim=-1)
        cholesky(plus_diagonal(unit @ unit.mT, -DEPENDENT), white)
    left, right = update_of_white(white, values, factor, ridge, taken)
    if ridge == 0:  # solve for left with the rounded right, so that ΔW K = R to the last digits
        left = torch.linalg.solve(rows @ right.mT, values).mT
    return left.to(residuals.dtype), right.to(residuals.dtype)


@torch.no_grad()
def null_space_update(
    keys: Tensor,
    residuals: Tensor,
    basis: Tensor,
    previous: Tensor | None = None,
    *,
    l2: float,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """AlphaEdit's update, in the null space of C, where there is nothing to preserve.

    ΔW = R Kᵀ U (Uᵀ(K Kᵀ + Cp)U + l2·I)⁻¹ Uᵀ is the published R Kᵀ P ((K Kᵀ + Cp)P + l2·I)⁻¹ with P = U Uᵀ, as an r×r
    symmetric system. It is a least-squares update in the coordinates of U, with l2·I + UᵀCpU in place of C.

    Args:
        keys: [N, d] or [B, N, d].
        residuals: [N, h] or [B, N, h], wanted minus current outputs.
        basis: U [d, r], orthonormal eigenvectors of C whose eigenvalues count as zero.
        previous: UᵀCpU [r, r], the sum of (Uᵀk)(Uᵀk)ᵀ over keys written before. None for no keys; then no r×r matrix
            is factored. For a stream, `SequentialSolver(torch.eye(r), l2)` on keys @ U keeps this sum.
        l2: weight of ‖ΔW‖², > 0.
        backend: as in `rank_k_update`.

    Returns:
        (left [h, k], right [k, d]) with k = min(N, r), in the dtype of residuals; [B, …] for a batch.

    Raises:
        ConfigError, TensorError: as for `rank_k_update`; basis or previous does not fit the keys, or previous is not a
            sum of squares.
    """
    if torch.compiler.is_compiling():
        left, right = _null_space_update(keys, residuals, basis, previous, l2=l2, backend=backend)
        return left, right
    check_ridge(l2, "l2")
    for name, tensor in (("keys", keys), ("basis", basis), ("previous", basis if previous is None else previous)):
        check_tensor(tensor, name)
    if basis.ndim != 2 or basis.shape[0] != keys.shape[-1]:
        raise TensorError(f"basis is {list(basis.shape)}, expected [{keys.shape[-1]}, r], the width of the keys")
    U, r, factor = basis.double(), basis.shape[1], None
    if previous is not None:
        if previous.shape != (r, r):
            raise TensorError(f"previous is {list(previous.shape)}, expected [{r}, {r}], in coordinates of basis")
        factor, info = cholesky_ex(plus_diagonal(previous.double().clone(), l2))
        if info:
            raise TensorError("previous is not a sum of squares of keys: l2·I + previous is not positive definite")
    rows, values, _ = checked(keys, residuals)
    taken = _choose(backend, rows, r, l2)
    left, right = update_of_white(whiten(rows @ U, factor), values, factor, l2 if factor is None else 1.0, taken)
    return left.to(residuals.dtype), (right @ U.T).to(residuals.dtype)


def update_of_white(
    rows: Tensor, values: Tensor, factor: Tensor | None, ridge: float, taken: str = "torch"
) -> tuple[Tensor, Tensor]:
    """left = R G⁻ᵀ [h, k] and right = G⁻¹ Yᵀ L⁻¹ [k, d] for whitened keys Yᵀ [N, d], with G Gᵀ = YᵀY + ridge·I."""
    n, d = rows.shape[-2:]
    if taken == "triton" and (solved := _fused(rows, values, ridge)):
        return solved[0].mT, whiten(solved[1], factor, back=True)
    if n <= d:
        root, Q = orthogonal(rows, ridge, rows)
        return solve_triangular(root, values, upper=False).mT, whiten(Q, factor, back=True)
    root, Q = orthogonal(rows.mT, ridge, rows)  # the d×d form R Y (Y Yᵀ + ridge·I)⁻¹ L⁻¹
    return (Q @ values).mT, whiten(inverse(root), factor, back=True)


def _fused(rows: Tensor, values: Tensor, ridge: float) -> tuple[Tensor, Tensor] | None:
    """G⁻¹ Rᵀ [N, h] and G⁻¹ Yᵀ [N, d] by the kernel; None if it finds no factor, so that torch names the keys.

    It is in fp64: after whitening the system's condition number is up to 1 + ‖Y‖²/ridge, and fp32 would lose as much of
    its seven digits. Delicate systems are solved twice, as in `orthogonal`: (Yᵀ | √ridge·I) is orthonormalized again.
    """
    from fastedit.kernels.rank_k_solve import rank_k_solve

    d = rows.shape[-1]
    if not delicate(rows, ridge):
        left, right, failed = rank_k_solve(rows, values, ridge)
        return None if failed.any() else (left, right)
    tail = plus_diagonal(rows.new_zeros(*rows.shape[:-1], rows.shape[-2]), math.sqrt(ridge))
    left, right, failed = rank_k_solve(torch.cat((rows, tail), -1), values, 0.0)
    left, right, again = rank_k_solve(right, left, 0.0)
    return None if (failed + again).any() else (left, right[..., :d])


def _choose(backend: Backend, rows: Tensor, width: int, ridge: float) -> str:
    (N, _), B = rows.shape[-2:], rows.shape[:-2].numel()
    device, zero = rows.device, int(ridge == 0)
    return choose("rank_k_update", backend, device=device, dtype=rows.dtype, B=B, N=N, d=width, zero=zero)


def _cannot(call: Call) -> str | None:
    N, d = call.sizes.get("N", 1), call.sizes.get("d", 1)
    if reason := no_triton(call):
        return reason
    if call.sizes.get("zero"):
        return "ridge is 0, where left is solved for anew"
    if not 1 <= N <= 128:
        return f"N = {N} is not from 1 to 128"
    return None if d >= N else f"N = {N} is above d = {d}, where the system is d×d"


def _slower(call: Call) -> str | None:
    if reason := only_interpreted(call):
        return reason
    # estimates, not measured: cuSOLVER is faster for few groups, and as N grows
    B, N = call.sizes.get("B", 64), call.sizes.get("N", 64)
    return None if B >= 64 and N <= 64 else f"B = {B} groups of N = {N}: it is for 64 groups or more, and N up to 64"


register("rank_k_update", Option("triton", _cannot, _slower))


def _laid_out(solve: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """The solve for torch's graphs, which must know the strides of its results."""

    def serve(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        left, right = solve(*args, **options)
        return left.contiguous(), right.contiguous()

    return serve


def _fake(keys: Tensor, residuals: Tensor, space: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    *groups, n, d = keys.shape
    k = torch.sym_min(n, space.shape[1])
    return residuals.new_empty(*groups, residuals.shape[-1], k), residuals.new_empty(*groups, k, d)


_update = define(
    "rank_k_update(Tensor keys, Tensor residuals, Tensor cov_factor, *, float ridge, "
    'str constraint="least-squares", str backend="auto") -> (Tensor, Tensor)',
    _laid_out(rank_k_update),
    _fake,
)
_null_space_update = define(
    "null_space_update(Tensor keys, Tensor residuals, Tensor basis, Tensor? previous=None, *, float l2, "
    'str backend="auto") -> (Tensor, Tensor)',
    _laid_out(null_space_update),
    _fake,
)
