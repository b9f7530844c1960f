"""Least-squares updates for a stream of batches."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.linalg import solve_triangular
from torch.nn.functional import pad

from fastedit.ops.cholesky import check_ridge, checked, checked_factor, delicate, inverse, orthogonal, whiten
from fastedit.ops.rank_k_solve import update_of_white


class SequentialSolver:
    """Least-squares updates for a stream of batches: each preserves C and all keys written before it.

    The update of batch t is R_t K_tᵀ (λC + Σ_{s≤t} K_s K_sᵀ)⁻¹ with R_t measured after batch t−1. Their sum is the
    update of all batches at once (recursive least squares).

    The second moment grows by Woodbury in whitened coordinates: (λI + Σ Y Yᵀ)⁻¹ = (I − W Wᵀ)/λ, and each batch adds
    the columns of W from its own N×N system. That takes two matrix products per batch; updating the d×d factor
    would take as many operations in d dependent steps, for which BLAS has no routine. (Wᵀ | √λ·G⁻¹) are the rows of a
    QR factorization of all batches at once, grown by block Gram-Schmidt, so the result is as exact as for all at once.
    Before there are more than d keys, they are folded into L: one d×d factorization for d keys, less than writing them
    costs.

    Args:
        cov_factor: L [d, d], lower, C = L Lᵀ; it is not changed. TensorError if it is not a factor.
        ridge: λ, the weight of C. ConfigError if it is not positive.
    """

    def __init__(self, cov_factor: Tensor, ridge: float) -> None:
        check_ridge(ridge, "ridge")
        self._factor, self._ridge, self._count = checked_factor(cov_factor), ridge, 0
        # of the n keys that are not folded yet: Yᵀ [n, d] and (Wᵀ | √λ·G⁻¹) [n, d + n]; rows beyond n are unused
        self._white = self._basis = self._factor.new_zeros(0, len(self._factor))

    @torch.no_grad()
    def update(self, keys: Tensor, residuals: Tensor) -> tuple[Tensor, Tensor]:
        """`rank_k_update` for the next keys [N, d]; residuals [N, h] are measured after earlier updates.

        An error leaves the solver as it was.
        """
        rows, values, _ = checked(keys, residuals, self._factor, batched=False)
        d = len(self._factor)
        if self._count + len(rows) > d:
            self._fold()
        n, rows = self._count, whiten(rows, self._factor)
        if len(rows) > d:
            left, right = update_of_white(rows, values, self._factor, self._ridge)
            self._white, self._count = rows, len(rows)
            self._fold()
        else:
            before, new = self._basis[:n, : d + n], pad(rows, (0, n))
            for _ in range(1 + delicate(self._white, self._ridge)):  # twice if one projection would lose digits
                new = new - (new @ before.T) @ before
            root, Q = orthogonal(new, self._ridge, rows)
            left = solve_triangular(root, values, upper=False).T
            right = whiten(Q[:, :d], self._factor, back=True)
            self._append(rows, torch.cat((Q, math.sqrt(self._ridge) * inverse(root)), 1))
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
        """Make λC + Σ K Kᵀ the new C, with weight 1."""
        if self._count:
            rows = self._white[: self._count]
            self._factor = self._factor.tril() @ orthogonal(rows.T, self._ridge, rows)[0]
            self._ridge, self._count = 1.0, 0
            self._white = self._basis = rows.new_zeros(0, rows.shape[1])
