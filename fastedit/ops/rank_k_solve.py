"""The solves of ROME, MEMIT, EMMET and AlphaEdit: rank-N updates against one factor of the second moment.

With C = L Lᵀ and whitened keys Y = L⁻¹K, push-through turns both R Kᵀ (λC + K Kᵀ)⁻¹ and R (KᵀC⁻¹K + αI)⁻¹ KᵀC⁻¹
into R (ridge·I + YᵀY)⁻¹ Yᵀ L⁻¹, an N×N system. It costs O(d²N + N³), and errs with cond(L) = √cond(C). Keys are rows
in the code: Kᵀ and Yᵀ [N, d].
"""

from __future__ import annotations

import math
import warnings
from typing import Literal

import torch
from torch import Tensor
from torch.linalg import cholesky_ex, solve_triangular
from torch.nn.functional import normalize, pad

from fastedit.errors import ConfigError, EditError, ModelError
from fastedit.ops.registry import Backend, Call, Option, choose, no_triton, only_interpreted, register

Constraint = Literal["least-squares", "equality"]
DUPLICATE = 1e-6
"""Squared sine of the angle between two whitened keys below which they are one: a subject met twice, in fp32."""
DEPENDENT = 1e-11
"""Least eigenvalue of the Gram matrix of whitened unit keys down to which equality is solved, to 1e-8."""
_ASYMMETRY = 1e-4
_SHRINKAGE = 1e-6


class DependentKeysError(EditError):
    """Keys are so nearly combinations of one another that no update gives each its own value.

    Attributes:
        groups: rows of the keys that depend on one another, as `find_dependent` returns them.
        problem: which problem of a batched call, None for a single one.
    """

    def __init__(self, groups: list[list[int]], problem: int | None) -> None:
        self.groups, self.problem = groups, problem
        where = f" of problem {problem}" * (problem is not None)
        shown = [", ".join(map(str, g[:9])) + ", …" * (len(g) > 9) for g in groups[:5]] + ["…"] * (len(groups) > 5)
        super().__init__(
            f"keys{where} depend on one another, no update at this ridge is stable: rows {' | '.join(shown)}. Are they "
            "edits of one subject? Merge them, solve one after the other, or raise ridge"
        )


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
    ΔW = R (Kᵀ C⁻¹ K + ridge·I)⁻¹ Kᵀ C⁻¹ (arXiv 2403.14236). By push-through they are one formula, but only equality
    has a meaning at ridge 0, where ΔW K = R.

    Args:
        keys: [N, d], or [B, N, d] for B independent problems against one factor. With ridge > 0, rows of zeros with
            residuals of zeros pad smaller problems.
        residuals: [N, h] or [B, N, h], wanted minus current outputs.
        cov_factor: L [d, d], lower (the rest is not read), from `factor_covariance`; keep it in fp64.
        ridge: λ of MEMIT, α of EMMET; > 0, or ≥ 0 for equality.
        constraint: what is asked of the new pairs.
        backend: see `fastedit.ops.registry`; ConfigError if it cannot serve.

    Returns:
        (left [h, k], right [k, d]) with k = min(N, d), in the dtype of residuals; [B, …] for a batch. Inside, all is
        fp64; rounding the two to fp32 costs the root of the system's condition number, as they share its inverse.

    Raises:
        ConfigError: ridge or constraint has a value it cannot take.
        ModelError: cov_factor is no factor, or of another width than the keys.
        EditError: keys or residuals hold NaN or infinity (the row is named), or do not fit one another.
        DependentKeysError: equality at ridge 0 with keys that depend on one another, by `DEPENDENT`.
    """
    if constraint not in ("least-squares", "equality"):
        raise ConfigError(f'constraint is {constraint!r}; take "least-squares" or "equality"')
    _check_ridge(ridge, "ridge", zero=constraint == "equality")
    rows, values, factor = _checked(keys, residuals, cov_factor)
    taken = _choose(backend, rows, rows.shape[-1], ridge)
    white = _whiten(rows, factor)
    if ridge == 0:  # a factorization shifted by the limit tells whether any eigenvalue is below it
        unit = normalize(white, dim=-1)
        _cholesky(_plus_diagonal(unit @ unit.mT, -DEPENDENT), white)
    left, right = _update(white, values, factor, ridge, taken)
    if ridge == 0:  # ΔW K = R to the last digits: left from what right is at the keys, rounding included
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
    """AlphaEdit's update, in the null space of C, where nothing is that must be preserved.

    ΔW = R Kᵀ U (Uᵀ(K Kᵀ + Cp)U + l2·I)⁻¹ Uᵀ: the published R Kᵀ P ((K Kᵀ + Cp)P + l2·I)⁻¹ with P = U Uᵀ, made r×r
    and symmetric. It is a least-squares update in coordinates of U, with l2·I + UᵀCpU for C.

    Args:
        keys: [N, d] or [B, N, d].
        residuals: [N, h] or [B, N, h], wanted minus current outputs.
        basis: U [d, r], orthonormal eigenvectors of C whose eigenvalues count as zero.
        previous: UᵀCpU [r, r], the sum of (Uᵀk)(Uᵀk)ᵀ over keys written before; None for none, then nothing r×r is
            factored. `SequentialSolver(torch.eye(r), l2)` on keys @ U keeps that sum for a stream.
        l2: weight of ‖ΔW‖², > 0.
        backend: as in `rank_k_update`.

    Returns:
        (left [h, k], right [k, d]) with k = min(N, r), in the dtype of residuals; [B, …] for a batch.

    Raises:
        ConfigError, EditError: as in `rank_k_update`, or previous is no sum of squares.
        ModelError: basis or previous does not fit the keys.
    """
    _check_ridge(l2, "l2")
    if basis.ndim != 2 or basis.shape[0] != keys.shape[-1]:
        raise ModelError(f"basis is {list(basis.shape)}, expected [{keys.shape[-1]}, r], the width of the keys")
    U, r, factor = basis.double(), basis.shape[1], None
    if previous is not None:
        if previous.shape != (r, r):
            raise ModelError(f"previous is {list(previous.shape)}, expected [{r}, {r}], in coordinates of basis")
        factor, info = cholesky_ex(_plus_diagonal(previous.double().clone(), l2))
        if info:
            raise EditError("previous is no sum of squares of keys: l2·I + previous is not positive definite")
    rows, values, _ = _checked(keys, residuals)
    taken = _choose(backend, rows, r, l2)
    left, right = _update(_whiten(rows @ U, factor), values, factor, l2 if factor is None else 1.0, taken)
    return left.to(residuals.dtype), (right @ U.T).to(residuals.dtype)


class SequentialSolver:
    """Least-squares updates for a stream of batches: each preserves C and all keys written before it.

    Batch t is R_t K_tᵀ (λC + Σ_{s≤t} K_s K_sᵀ)⁻¹ with R_t measured after batch t−1. Together they are the update of
    all batches at once (recursive least squares).

    The second moment grows by Woodbury in whitened coordinates: (λI + Σ Y Yᵀ)⁻¹ = (I − W Wᵀ)/λ, and each batch adds
    the columns of W that its own N×N system yields. That is two matrix products a batch; updating the d×d factor
    takes as many operations in d dependent steps, for which no BLAS has a routine. (Wᵀ | √λ·G⁻¹) are the rows of a
    QR factorization of all batches at once, grown by block Gram-Schmidt, so it is as exact as taking them at once.
    Keys that would outnumber d are folded into L: one d×d factorization for d keys, less than writing them cost.

    Args:
        cov_factor: L [d, d], lower, C = L Lᵀ; it stays as it is. ModelError if it is no factor.
        ridge: λ, the weight of C. ConfigError if it is not positive.
    """

    def __init__(self, cov_factor: Tensor, ridge: float) -> None:
        _check_ridge(ridge, "ridge")
        self._factor, self._ridge, self._count = _checked_factor(cov_factor), ridge, 0
        # of the n keys not folded yet: Yᵀ [n, d] and (Wᵀ | √λ·G⁻¹) [n, d + n], rows beyond n unused
        self._white = self._basis = self._factor.new_zeros(0, len(self._factor))

    @torch.no_grad()
    def update(self, keys: Tensor, residuals: Tensor) -> tuple[Tensor, Tensor]:
        """`rank_k_update` of the next keys [N, d], residuals [N, h] measured after those before; errors do no harm."""
        rows, values, _ = _checked(keys, residuals, self._factor, batched=False)
        d = len(self._factor)
        if self._count + len(rows) > d:
            self._fold()
        n, rows = self._count, _whiten(rows, self._factor)
        if len(rows) > d:
            left, right = _update(rows, values, self._factor, self._ridge)
            self._white, self._count = rows, len(rows)
            self._fold()
        else:
            before, rest = self._basis[:n, : d + n], pad(rows, (0, n))
            for _ in range(1 + _delicate(self._white, self._ridge)):  # twice where one projection loses digits
                rest = rest - (rest @ before.T) @ before
            root, part = _orthogonal(rest, self._ridge, rows)
            left = solve_triangular(root, values, upper=False).T
            right = _whiten(part[:, :d], self._factor, back=True)
            self._append(rows, torch.cat((part, math.sqrt(self._ridge) * _inverse(root)), 1))
        return left.to(residuals.dtype), right.to(residuals.dtype)

    def _append(self, white: Tensor, basis: Tensor) -> None:
        n, total, d = self._count, self._count + len(white), len(self._factor)
        if total > len(self._white):
            size = min(d, 2 * total)
            grown = white.new_zeros(size, d), white.new_zeros(size, d + size)
            grown[0][:n], grown[1][:n, : d + n] = self._white[:n], self._basis[:n, : d + n]
            self._white, self._basis = grown
        self._white[n:total], self._basis[n:total, : d + total] = white, basis
        self._count = total

    def _fold(self) -> None:
        """Makes λC + Σ K Kᵀ the new C, of weight 1."""
        if self._count:
            rows = self._white[: self._count]
            self._factor = self._factor.tril() @ _orthogonal(rows.T, self._ridge, rows)[0]
            self._ridge, self._count = 1.0, 0
            self._white = self._basis = rows.new_zeros(0, rows.shape[1])


@torch.no_grad()
def factor_covariance(covariance: Tensor, *, count: int | None = None, allow_few: bool = False) -> Tensor:
    """The lower Cholesky factor L of C = L Lᵀ, [d, d] fp64, or an error that says what is wrong with C.

    Args:
        covariance: C [d, d], the second moment of the keys, any floating dtype.
        count: tokens that C was averaged over, if known.
        allow_few: go on with a C that is singular, as it must be for count < d: 1e-6 of its mean diagonal is added to
            the diagonal, and a RuntimeWarning says so. Otherwise C is never changed.

    Raises:
        ModelError: C is not square, not finite (the row is named), not symmetric, made of fewer tokens than d, or not
            positive definite to the precision it is stored in.
    """
    if covariance.ndim != 2 or covariance.shape[0] != covariance.shape[1]:
        raise ModelError(f"C is {list(covariance.shape)}, expected [d, d], d the width of the keys")
    _require_finite(covariance, "C", "collect the statistics again", ModelError)
    C, d = covariance.double(), len(covariance)
    size = C.diagonal().clamp_min(0).sqrt()
    excess = (C - C.T).abs_() - _ASYMMETRY * size * size[:, None]
    if excess.max() > 0:
        i, j = divmod(int(excess.argmax()), d)
        raise ModelError(f"C is not symmetric: C[{i}, {j}] = {C[i, j]:.6g}, C[{j}, {i}] = {C[j, i]:.6g}; give all of C")
    if (few := count is not None and count < d) and not allow_few:
        raise ModelError(
            f"C comes from {count} tokens, fewer than its width {d}: it is singular, and directions without a token "
            f"would count as free to overwrite. Collect some {10 * d} tokens, or go on with allow_few"
        )
    added, rounding = 0.0, torch.finfo(covariance.dtype).eps
    factor, sound = _root(C, rounding)
    if sound < d and allow_few:
        added = _SHRINKAGE * float(C.diagonal().mean())
        factor, sound = _root(_plus_diagonal(C.clone(), added), rounding)
    if sound < d:
        raise ModelError(
            f"C ({covariance.dtype}) is not positive definite: dimension {int(sound)} is zero or made of those before "
            f"it, to its precision. Too few tokens (collect some {10 * d}), sums in fp32 or less, or no second moment?"
        )
    if few or added:
        warnings.warn(
            f"C (from {'?' if count is None else count} tokens) is singular or nearly so: directions that it has "
            f"not seen count as free to overwrite; {added:.3g} was added to its diagonal",
            RuntimeWarning,
            stacklevel=2,
        )
    return factor


@torch.no_grad()
def find_dependent(
    keys: Tensor, cov_factor: Tensor, *, duplicate: float = DUPLICATE, dependent: float = DEPENDENT
) -> list[list[int]]:
    """Groups of keys that make KᵀC⁻¹K near-singular: duplicates, and combinations of other keys.

    Pairs by their angle, combinations by a pivoted Cholesky factorization of the whitened keys' cosines: it takes keys
    while one is left that is no combination of those taken, and each of the rest forms a group with the keys it is
    made of. Groups that share a key are one; a key of zeros is a group by itself.

    Args:
        keys: [N, d].
        cov_factor: L [d, d], lower.
        duplicate: squared sine of the angle below which two keys are one.
        dependent: squared length of what is outside the span of others below which a key is a combination.

    Returns:
        Rows of each group, ascending, groups by their first row; empty when all keys are independent.

    Raises:
        ModelError, EditError: as in `rank_k_update`.
    """
    rows, _, factor = _checked(keys, keys, cov_factor, batched=False)
    return _groups(normalize(_whiten(rows, factor), dim=-1), duplicate, dependent)


def _update(
    rows: Tensor, values: Tensor, factor: Tensor | None, ridge: float, taken: str = "torch"
) -> tuple[Tensor, Tensor]:
    """left = R G⁻ᵀ [h, k] and right = G⁻¹ Yᵀ L⁻¹ [k, d] of whitened keys Yᵀ [N, d], G Gᵀ = YᵀY + ridge·I."""
    n, d = rows.shape[-2:]
    if taken == "triton" and (solved := _fused(rows, values, ridge)):
        return solved[0].mT, _whiten(solved[1], factor, back=True)
    if n <= d:
        root, part = _orthogonal(rows, ridge, rows)
        return solve_triangular(root, values, upper=False).mT, _whiten(part, factor, back=True)
    root, part = _orthogonal(rows.mT, ridge, rows)  # the d×d form R Y (Y Yᵀ + ridge·I)⁻¹ L⁻¹
    return (part @ values).mT, _whiten(_inverse(root), factor, back=True)


def _fused(rows: Tensor, values: Tensor, ridge: float) -> tuple[Tensor, Tensor] | None:
    """G⁻¹ Rᵀ [N, h] and G⁻¹ Yᵀ [N, d] by the kernel; None where it finds no factor, for torch to name the keys.

    In fp64: after whitening the system's condition number is up to 1 + ‖Y‖²/ridge, and fp32 would lose as much of its
    seven digits. What is delicate is solved twice, as in `_orthogonal`: (Yᵀ | √ridge·I) is made orthonormal again.
    """
    from fastedit.kernels.rank_k_solve import rank_k_solve

    d = rows.shape[-1]
    if not _delicate(rows, ridge):
        left, part, failed = rank_k_solve(rows, values, ridge)
        return None if failed.any() else (left, part)
    tail = _plus_diagonal(rows.new_zeros(*rows.shape[:-1], rows.shape[-2]), math.sqrt(ridge))
    left, part, failed = rank_k_solve(torch.cat((rows, tail), -1), values, 0.0)
    left, part, again = rank_k_solve(part, left, 0.0)
    return None if (failed + again).any() else (left, part[..., :d])


def _orthogonal(rows: Tensor, ridge: float, keys: Tensor) -> tuple[Tensor, Tensor]:
    """G [n, n] and Q [n, m] with (rows [n, m] | √ridge·I) = G (Q | √ridge·G⁻¹), whose last factor has orthonormal rows.

    One Cholesky factorization of the Gram matrix errs with its condition number; where that counts, a second one, of
    what the first has made nearly orthonormal, leaves the error of a Householder QR.
    """
    root = _cholesky(_plus_diagonal(rows @ rows.mT, ridge), keys)
    part = solve_triangular(root, rows, upper=False)
    if _delicate(rows, ridge):
        tail = math.sqrt(ridge) * _inverse(root)
        again = _cholesky(part @ part.mT + tail @ tail.mT, keys)
        root, part = root @ again, solve_triangular(again, part, upper=False)
    return root, part


def _delicate(rows: Tensor, ridge: float) -> bool:
    """Whether the condition number of rows·rowsᵀ + ridge·I may cost more than six of the sixteen digits."""
    return bool((rows.square().sum((-2, -1)) > 1e6 * ridge).any())


def _inverse(root: Tensor) -> Tensor:
    inverse: Tensor = solve_triangular(root, _plus_diagonal(torch.zeros_like(root), 1.0), upper=False)
    return inverse


def _whiten(rows: Tensor, factor: Tensor | None, *, back: bool = False) -> Tensor:
    """Kᵀ L⁻ᵀ of Kᵀ [N, d], or back: rows L⁻¹; one solve for all problems of a batch."""
    if factor is None:
        return rows
    # from the left: LAPACK's solves from the right take two to three times as long
    system, flat = factor.T if back else factor, rows.reshape(-1, len(factor))
    white: Tensor = solve_triangular(system, flat.T, upper=back).T
    if not _finite(white):
        raise ModelError("cov_factor holds NaN or infinity; make it with ops.factor_covariance")
    return white.reshape(rows.shape)


def _cholesky(system: Tensor, rows: Tensor) -> Tensor:
    """The root of a system made of rows [N, d], or the error that names those it fails on."""
    root, sound = _root(system)
    failed = sound < system.shape[-1]
    if failed.any():
        problem = int(failed.nonzero()[0]) if failed.ndim else None
        unit = normalize(rows if problem is None else rows[problem], dim=-1)
        raise DependentKeysError(_groups(unit, DUPLICATE, DEPENDENT) or [list(range(len(unit)))], problem)
    return root


def _groups(unit: Tensor, duplicate: float, dependent: float) -> list[list[int]]:
    """`find_dependent` of whitened keys [N, d] of unit length."""
    gram = (unit @ unit.T).cpu()
    outside = gram.diagonal().clone()  # [N], squared length outside the span of the keys taken
    root = torch.zeros_like(gram)
    # most often one factorization, shifted by the limit, shows that no pivot is below it
    taken = [] if cholesky_ex(_plus_diagonal(gram.clone(), -dependent)).info else list(range(len(gram)))
    while len(taken) < len(gram) and outside.max() > dependent:
        k, pivot = len(taken), int(outside.argmax())
        root[k] = (gram[pivot] - root[:k, pivot] @ root[:k]) / outside[pivot].sqrt()
        outside -= root[k].square()
        outside[pivot] = -math.inf
        taken.append(pivot)
    k, combined = len(taken), sorted({*range(len(gram))} - {*taken})
    weights = solve_triangular(root[:k, taken], root[:k, combined], upper=True)  # [taken, combined]
    linked = (1 - gram.square() < duplicate).fill_diagonal_(True)
    for i, j in (weights.abs() > math.sqrt(duplicate)).nonzero().tolist():  # less is within what duplicates differ
        linked[taken[i], combined[j]] = linked[combined[j], taken[i]] = True
    label, before = torch.arange(len(gram)), None
    while before is None or not torch.equal(label, before):
        before, label = label, torch.where(linked, label, len(gram)).amin(1)
    groups = [(label == first).nonzero()[:, 0].tolist() for first in label.unique()]
    return [group for group in groups if len(group) > 1 or group[0] in combined]


def _root(system: Tensor, rounding: float = 0.0) -> tuple[Tensor, Tensor]:
    """The Cholesky factor, and how many leading dimensions [...] precede the first that only rounding has left."""
    root, info = cholesky_ex(system)
    n = system.shape[-1]
    pivots, diagonal = (x.diagonal(dim1=-2, dim2=-1) for x in (root, system))
    sound = pivots.square() > (rounding + n * torch.finfo(system.dtype).eps) * diagonal
    sound &= (info[..., None] == 0) | (torch.arange(1, n + 1, device=info.device) < info[..., None])
    return root, sound.cumprod(-1).sum(-1)


def _checked(
    keys: Tensor, residuals: Tensor, cov_factor: Tensor | None = None, *, batched: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys, residuals and factor in fp64, or what can be told to be wrong with them before a solve."""
    factor = None if cov_factor is None else _checked_factor(cov_factor)
    if keys.ndim not in (2, 2 + batched):
        raise EditError(f"keys is {list(keys.shape)}, expected [N, d]{' or [B, N, d]' * batched}")
    if residuals.shape[:-1] != keys.shape[:-1]:
        raise EditError(f"residuals is {list(residuals.shape)}, expected a row for each of keys {list(keys.shape)}")
    if factor is not None and keys.shape[-1] != len(factor):
        raise ModelError(f"keys have width {keys.shape[-1]}, cov_factor {len(factor)}: statistics of another model")
    _require_finite(keys, "keys", "leave that edit out")
    _require_finite(residuals, "residuals", "leave that edit out")
    return keys.double(), residuals.double(), factor


def _checked_factor(cov_factor: Tensor) -> Tensor:
    if cov_factor.ndim != 2 or cov_factor.shape[0] != cov_factor.shape[1]:
        raise ModelError(f"cov_factor is {list(cov_factor.shape)}, expected a lower factor [d, d]")
    diagonal = cov_factor.diagonal()
    if not ((diagonal > 0) & diagonal.isfinite()).all():
        raise ModelError("cov_factor has a diagonal that is not positive; make it with ops.factor_covariance")
    return cov_factor.double()


def _check_ridge(value: float, name: str, *, zero: bool = False) -> None:
    if not (0 < value < math.inf or (zero and value == 0)):
        raise ConfigError(f"{name} is {value}, expected a finite number {'≥' if zero else '>'} 0")


def _require_finite(x: Tensor, name: str, advice: str, error: type[ModelError] | type[EditError] = EditError) -> None:
    if not _finite(x):
        bad = ~x.isfinite().all(-1)
        raise error(f"{name}{bad.nonzero()[0].tolist()} holds NaN or infinity ({int(bad.sum())} rows do); {advice}")


def _finite(x: Tensor) -> bool:
    """Whether all of x is; most often a sum shows it, in one pass that writes nothing."""
    return bool(x.sum().isfinite()) or bool(x.isfinite().all())


def _plus_diagonal(matrix: Tensor, value: float) -> Tensor:
    """Adds to the diagonal, in place."""
    matrix.diagonal(dim1=-2, dim2=-1).add_(value)
    return matrix


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
    # estimates, not measured: cuSOLVER has no batch to share below some tens of groups, and wins as N grows
    B, N = call.sizes.get("B", 64), call.sizes.get("N", 64)
    return None if B >= 64 and N <= 64 else f"B = {B} groups of N = {N}: it is for 64 groups or more, and N up to 64"


register("rank_k_update", Option("triton", _cannot, _slower))
