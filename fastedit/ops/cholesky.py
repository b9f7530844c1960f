"""The factor of the second moment, C = L Lᵀ, and keys in its coordinates: the parts of every solve.

In the code keys K and whitened keys Y = L⁻¹K are rows: Kᵀ and Yᵀ [N, d].
"""

from __future__ import annotations

import math
import warnings
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.linalg import cholesky_ex, solve_triangular
from torch.nn.functional import normalize

from fastedit.errors import ConfigError, TensorError

DUPLICATE = 1e-6
"""Squared sine of the angle between two whitened keys below which they count as one: fp32 keys of one subject."""
DEPENDENT = 1e-11
"""Smallest eigenvalue of the Gram matrix of whitened unit keys for which equality is solved, to 1e-8."""
_ASYMMETRY = 1e-4
_SHRINKAGE = 1e-6


class FewTokensError(TensorError):
    """C is the mean over fewer tokens than its width, and therefore singular.

    Args:
        count: number of tokens.
        dim: width of C.
        remedy: name of the option that allows it.
    """

    def __init__(self, count: int, dim: int, remedy: str) -> None:
        self.count, self.dim = count, dim
        super().__init__(
            f"C comes from {count} tokens, fewer than its width {dim}: it is singular, and directions without a token "
            f"would count as free to overwrite. Collect some {10 * dim} tokens, or continue with {remedy}"
        )
        self.args = count, dim, remedy


class DependentKeysError(TensorError):
    """Keys are so nearly linearly dependent that no update gives each its own value.

    Attributes:
        groups: rows of the keys that depend on one another, as `find_dependent` returns them.
        problem: number of the problem in a batched call, None for a single one.
    """

    def __init__(self, groups: list[list[int]], problem: int | None) -> None:
        self.groups, self.problem = groups, problem
        where = "" if problem is None else f" of problem {problem}"
        shown = [", ".join(map(str, group[:9])) + (", …" if len(group) > 9 else "") for group in groups[:5]]
        shown += ["…"] if len(groups) > 5 else []
        super().__init__(
            f"keys{where} depend on one another, no update at this ridge is stable: rows {' | '.join(shown)}. Merge "
            "them, solve one after the other, or raise ridge"
        )
        self.args = groups, problem


@torch.no_grad()
def factor_covariance(covariance: Tensor, *, count: int | None = None, allow_few: bool = False) -> Tensor:
    """Compute the lower Cholesky factor L of C = L Lᵀ, [d, d] fp64, after checks of C.

    Args:
        covariance: C [d, d], the second moment of the keys, any floating dtype.
        count: tokens that C was averaged over, if known.
        allow_few: accept a singular C, as it must be for count < d: 1e-6 of its mean diagonal is added to the
            diagonal, with a RuntimeWarning. Otherwise C is never changed.

    Raises:
        TensorError: C is not square, not finite (names the row), not symmetric, made from fewer tokens than d, or not
            positive definite to the precision that it is stored in.
    """
    check_tensor(covariance, "C")
    if covariance.ndim != 2 or covariance.shape[0] != covariance.shape[1]:
        raise TensorError(f"C is {list(covariance.shape)}, expected [d, d], d the width of the keys")
    _require_finite(covariance, "C", "collect the statistics again")
    C, d = covariance.double(), len(covariance)
    size = C.diagonal().clamp_min(0).sqrt()
    excess = (C - C.T).abs_() - _ASYMMETRY * size * size[:, None]
    if excess.max() > 0:
        i, j = divmod(int(excess.argmax()), d)
        here, there = f"C[{i}, {j}] = {C[i, j]:.6g}", f"C[{j}, {i}] = {C[j, i]:.6g}"
        raise TensorError(f"C is not symmetric: {here}, {there}; give all of C")
    if (few := count is not None and count < d) and not allow_few:
        raise FewTokensError(int(count or 0), d, "allow_few")
    added, rounding = 0.0, torch.finfo(covariance.dtype).eps
    factor, sound = _root(C, rounding)
    if sound < d and allow_few:
        added = _SHRINKAGE * float(C.diagonal().mean())
        factor, sound = _root(plus_diagonal(C.clone(), added), rounding)
    if sound < d:
        raise TensorError(
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

    Duplicates are found by the angle of two keys, combinations by a pivoted Cholesky factorization of the whitened
    keys' cosines: it takes keys while one is left that is not a combination of those taken, and each of the rest forms
    a group with the keys that it is made of. Groups that share a key are joined; a key of zeros is its own group.

    Args:
        keys: [N, d].
        cov_factor: L [d, d], lower.
        duplicate: two keys are one if the squared sine of their angle is below this.
        dependent: a key is a combination if its squared length outside the span of others is below this.

    Returns:
        The rows of each group, ascending, in the order of their first rows; empty if all keys are independent.

    Raises:
        TensorError: as for `rank_k_update`.
    """
    rows, _, factor = checked(keys, keys, cov_factor, batched=False)
    return _groups(normalize(whiten(rows, factor), dim=-1), duplicate, dependent)


def orthogonal(rows: Tensor, ridge: float, keys: Tensor) -> tuple[Tensor, Tensor]:
    """G [n, n] and Q [n, m] with (rows [n, m] | √ridge·I) = G (Q | √ridge·G⁻¹); the last factor has orthonormal rows.

    The error of one Cholesky factorization of the Gram matrix grows with its condition number. If that matters, a
    second one, of the nearly orthonormal result of the first, reduces the error to that of a Householder QR.
    """
    root = cholesky(plus_diagonal(rows @ rows.mT, ridge), keys)
    Q = solve_triangular(root, rows, upper=False)
    if delicate(rows, ridge):
        tail = math.sqrt(ridge) * inverse(root)
        again = cholesky(Q @ Q.mT + tail @ tail.mT, keys)
        root, Q = root @ again, solve_triangular(again, Q, upper=False)
    return root, Q


def delicate(rows: Tensor, ridge: float) -> bool:
    """Whether the condition of rows·rowsᵀ + ridge·I, rows [..., n, m], may cost more than six of the sixteen digits."""
    return bool((rows.square().sum((-2, -1)) > 1e6 * ridge).any())


def inverse(root: Tensor) -> Tensor:
    """The inverse of a lower triangular matrix [..., n, n]."""
    inverted: Tensor = solve_triangular(root, plus_diagonal(torch.zeros_like(root), 1.0), upper=False)
    return inverted


def whiten(rows: Tensor, factor: Tensor | None, *, back: bool = False) -> Tensor:
    """Kᵀ L⁻ᵀ for Kᵀ [..., N, d] and L [d, d], or with `back` rows L⁻¹; one solve for all problems of a batch."""
    if factor is None:
        return rows
    # solve from the left: LAPACK takes two to three times as long from the right
    system, flat = factor.T if back else factor, rows.reshape(-1, len(factor))
    white: Tensor = solve_triangular(system, flat.T, upper=back).T
    if not _finite(white):
        raise TensorError("cov_factor holds NaN or infinity; make it with ops.factor_covariance")
    return white.reshape(rows.shape)


def cholesky(system: Tensor, rows: Tensor) -> Tensor:
    """The lower root of a system [..., N, N] made of rows [..., N, d]; DependentKeysError names the rows that fail."""
    root, sound = _root(system)
    failed = sound < system.shape[-1]
    if failed.any():
        problem = int(failed.nonzero()[0]) if failed.ndim else None
        unit = normalize(rows if problem is None else rows[problem], dim=-1)
        raise DependentKeysError(_groups(unit, DUPLICATE, DEPENDENT) or [list(range(len(unit)))], problem)
    return root


def _groups(unit: Tensor, duplicate: float, dependent: float) -> list[list[int]]:
    """`find_dependent` for whitened keys [N, d] of unit length."""
    gram = (unit @ unit.T).cpu()
    outside = gram.diagonal().clone()  # [N], squared length outside the span of the keys taken
    root = torch.zeros_like(gram)
    # usually a single factorization, shifted by the limit, shows that no pivot is below it
    taken = [] if cholesky_ex(plus_diagonal(gram.clone(), -dependent)).info else list(range(len(gram)))
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
    """The Cholesky factor [..., n, n]; how many dimensions [...] precede the first whose pivot is only rounding."""
    root, info = cholesky_ex(system)
    n = system.shape[-1]
    pivots, diagonal = (x.diagonal(dim1=-2, dim2=-1) for x in (root, system))
    sound = pivots.square() > (rounding + n * torch.finfo(system.dtype).eps) * diagonal
    sound &= (info[..., None] == 0) | (torch.arange(1, n + 1, device=info.device) < info[..., None])
    return root, sound.cumprod(-1).sum(-1)


def checked(
    keys: Tensor, residuals: Tensor, cov_factor: Tensor | None = None, *, batched: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Check keys [..., N, d], residuals [..., N, h] and factor [d, d] without a solve, and return them in fp64.

    Raises:
        TensorError: one of them is not a tensor, has another shape, or holds values that it cannot have.
    """
    check_tensor(keys, "keys")
    check_tensor(residuals, "residuals")
    factor = None if cov_factor is None else checked_factor(cov_factor)
    if keys.ndim not in (2, 2 + batched):
        raise TensorError(f"keys is {list(keys.shape)}, expected [N, d]{' or [B, N, d]' if batched else ''}")
    if residuals.shape[:-1] != keys.shape[:-1]:
        raise TensorError(f"residuals is {list(residuals.shape)}, expected a row for each of keys {list(keys.shape)}")
    if factor is not None and keys.shape[-1] != len(factor):
        raise TensorError(f"keys have width {keys.shape[-1]}, cov_factor {len(factor)}: statistics of another model")
    _require_finite(keys, "keys", "leave that row out")
    _require_finite(residuals, "residuals", "leave that row out")
    return keys.double(), residuals.double(), factor


def check_tensor(value: Any, name: str) -> None:
    """Raise TensorError if a value is not a tensor."""
    if not isinstance(value, Tensor):
        raise TensorError(f"{name} is of type {type(value).__name__}, expected a torch.Tensor")


def checked_factor(cov_factor: Tensor) -> Tensor:
    """Check a lower factor [d, d], and return it in fp64. Raises TensorError."""
    check_tensor(cov_factor, "cov_factor")
    if cov_factor.ndim != 2 or cov_factor.shape[0] != cov_factor.shape[1]:
        raise TensorError(f"cov_factor is {list(cov_factor.shape)}, expected a lower factor [d, d]")
    diagonal = cov_factor.diagonal()
    if not ((diagonal > 0) & diagonal.isfinite()).all():
        raise TensorError("cov_factor has a diagonal that is not positive; make it with ops.factor_covariance")
    return cov_factor.double()


def check_ridge(value: float, name: str, *, zero: bool = False) -> None:
    """Raise ConfigError if a ridge is not a positive number; with `zero`, 0 is allowed."""
    if not isinstance(value, Real) or not (0 < value < math.inf or (zero and value == 0)):
        raise ConfigError(f"{name} is {value!r}, expected a finite number {'≥' if zero else '>'} 0")


def _require_finite(x: Tensor, name: str, advice: str) -> None:
    if not _finite(x):
        bad = ~x.isfinite().all(-1)
        where = f"{name}{bad.nonzero()[0].tolist()}"
        raise TensorError(f"{where} holds NaN or infinity ({int(bad.sum())} rows do); {advice}")


def _finite(x: Tensor) -> bool:
    """Whether all of x is finite; usually a sum shows this, in one pass that writes nothing."""
    return bool(x.sum().isfinite()) or bool(x.isfinite().all())


def plus_diagonal(matrix: Tensor, value: float) -> Tensor:
    """Add to the diagonal of a matrix [..., n, n], in place."""
    matrix.diagonal(dim1=-2, dim2=-1).add_(value)
    return matrix
