"""Inputs of rank-N solves, and the papers' d×d formulas in all digits that mpmath is set to."""

from __future__ import annotations

from collections.abc import Callable

import mpmath
import numpy as np
import torch
from torch import Tensor

D, H = 24, 5


def problem(seed: int, n: int | tuple[int, ...], *, cond: float = 1e8, isotropic: bool = False) -> tuple[Tensor, ...]:
    """C [D, D] of that condition number, keys [n, D] drawn from it or in all directions alike, residuals [n, H]."""
    rng = torch.Generator().manual_seed(seed)
    shape = (n,) if isinstance(n, int) else n
    basis = torch.linalg.qr(torch.randn(D, D, generator=rng).double()).Q
    values = torch.logspace(0, -np.log10(cond), D, dtype=torch.float64)
    keys = torch.randn(*shape, D, generator=rng).double()
    if not isotropic:
        keys = keys @ (basis * values.sqrt()).T
    C = (basis * values) @ basis.T
    return (C + C.T) / 2, keys, torch.randn(*shape, H, generator=rng).double()


def exact(x: Tensor) -> np.ndarray:
    return np.array([mpmath.mpf(v) for v in x.double().flatten().tolist()], dtype=object).reshape(x.shape)


def solved(A: np.ndarray, B: np.ndarray) -> np.ndarray:
    """A⁻¹B, by residuals in 40 digits and corrections in fp64."""
    lu = torch.linalg.lu_factor(torch.tensor(A.astype(float)))
    X = 0 * B
    for _ in range(5):
        X = X + exact(torch.linalg.lu_solve(*lu, torch.tensor((B - A @ X).astype(float))))
    return X


def least_squares(C: Tensor, keys: Tensor, residuals: Tensor, ridge: float) -> np.ndarray:
    """R Kᵀ (λC + K Kᵀ)⁻¹, keys as rows."""
    K, R = exact(keys), exact(residuals)
    return solved(mpmath.mpf(ridge) * exact(C) + K.T @ K, K.T @ R).T


def equality(C: Tensor, keys: Tensor, residuals: Tensor, ridge: float) -> np.ndarray:
    """R (Kᵀ C⁻¹ K + αI)⁻¹ Kᵀ C⁻¹, keys as rows."""
    K, R = exact(keys), exact(residuals)
    CK = solved(exact(C), K.T)
    return solved(K @ CK + mpmath.mpf(ridge) * np.eye(len(K), dtype=int), R).T @ CK.T


FORMULAS: dict[str, Callable[..., np.ndarray]] = {"least-squares": least_squares, "equality": equality}


def error(left: Tensor, right: Tensor, wanted: np.ndarray | Tensor) -> float:
    wanted = torch.tensor(wanted.astype(float)) if isinstance(wanted, np.ndarray) else wanted
    return float((left.double() @ right.double() - wanted).norm() / wanted.norm())
