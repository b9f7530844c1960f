"""Inputs of rank-N solves, and the papers' d×d formulas in 70 digits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

D, H = 24, 5
_ONE = 2**256


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


def _units(value: float) -> int:
    above, below = value.as_integer_ratio()
    return above * _ONE // below


@dataclass(frozen=True)
class Exact:
    """A matrix in fixed point: how many times 2⁻²⁵⁶ each number is. Python's integers are quicker than mpmath."""

    units: np.ndarray

    def __getitem__(self, at: object) -> Exact:
        return Exact(self.units[at])

    def __add__(self, other: Exact) -> Exact:
        return Exact(self.units + other.units)

    def __sub__(self, other: Exact) -> Exact:
        return Exact(self.units - other.units)

    def __matmul__(self, other: Exact) -> Exact:
        return Exact(self.units @ other.units // _ONE)

    def __rmul__(self, factor: float) -> Exact:
        return Exact(self.units * _units(factor) // _ONE)

    @property
    def T(self) -> Exact:  # noqa: N802
        return Exact(self.units.T)

    def double(self) -> Tensor:
        return torch.tensor(np.asarray(self.units / _ONE, dtype=float))


def exact(x: Tensor) -> Exact:
    return Exact(np.array([_units(v) for v in x.double().flatten().tolist()], dtype=object).reshape(x.shape))


def identity(n: int) -> Exact:
    return exact(torch.eye(n))


def solved(A: Exact, B: Exact) -> Exact:
    """A⁻¹B, by exact residuals and corrections in fp64."""
    lu = torch.linalg.lu_factor(A.double())
    X = exact(torch.zeros(B.units.shape))
    for _ in range(5):
        X = X + exact(torch.linalg.lu_solve(*lu, (B - A @ X).double()))
    return X


def least_squares(C: Tensor, keys: Tensor, residuals: Tensor, ridge: float) -> Exact:
    """R Kᵀ (λC + K Kᵀ)⁻¹, keys as rows."""
    K, R = exact(keys), exact(residuals)
    return solved(ridge * exact(C) + K.T @ K, K.T @ R).T


def equality(C: Tensor, keys: Tensor, residuals: Tensor, ridge: float) -> Exact:
    """R (Kᵀ C⁻¹ K + αI)⁻¹ Kᵀ C⁻¹, keys as rows."""
    K, R = exact(keys), exact(residuals)
    CK = solved(exact(C), K.T)
    return solved(K @ CK + ridge * identity(len(keys)), R).T @ CK.T


FORMULAS: dict[str, Callable[..., Exact]] = {"least-squares": least_squares, "equality": equality}


def error(left: Tensor, right: Tensor, wanted: Exact | Tensor) -> float:
    wanted = wanted.double()
    return float((left.double() @ right.double() - wanted).norm() / wanted.norm())
