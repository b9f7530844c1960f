"""Updates in the null space, against the published formula."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from rank_k import D, H, error, exact, identity, problem, solved

from fastedit import ops
from fastedit.errors import ConfigError, ModelError, TensorError

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("written", [0, 5, 40])
@pytest.mark.parametrize(("shape", "n"), [((), 1), ((), 7), ((), 30), ((2,), 7), ((2,), 30)])
def test_null_space_equals_the_published_formula(shape: tuple[int, ...], n: int, written: int, seed: int) -> None:
    rank = 15
    C, keys, residuals = problem(seed, (*shape, n), isotropic=True)
    before = 3 * problem(seed + 1, written, isotropic=True)[1]
    U = torch.linalg.eigh(C).eigenvectors[:, :rank]
    previous = (before @ U).T @ (before @ U) if written else None
    left, right = ops.null_space_update(keys, residuals, U, previous, l2=0.5)
    assert left.shape == (*shape, H, min(n, rank))
    P, Kp = exact(U) @ exact(U).T, exact(before)
    for b in np.ndindex(shape):
        K, R = exact(keys[b]), exact(residuals[b])
        system = (K.T @ K + Kp.T @ Kp) @ P + 0.5 * identity(D)
        assert error(left[b], right[b], solved(system.T, P @ K.T @ R).T) <= 1e-8
        assert (left[b] @ right[b] @ torch.linalg.eigh(C).eigenvectors[:, rank:]).abs().max() <= 1e-11


def test_null_space_stream(seed: int) -> None:
    """The sequential solver on coordinates of the null space is AlphaEdit with its growing sum."""
    C, keys, residuals = problem(seed, 30, isotropic=True)
    U = torch.linalg.eigh(C).eigenvectors[:, :15]
    solver = ops.SequentialSolver(torch.eye(15), 0.5)
    previous = torch.zeros(15, 15).double()
    for k, r in zip(keys.split(6), residuals.split(6), strict=True):
        left, right = solver.update(k @ U, r)
        wanted = ops.null_space_update(k, r, U, previous, l2=0.5)
        assert error(left, right @ U.T, wanted[0] @ wanted[1]) <= 1e-10
        previous += (k @ U).T @ (k @ U)


def test_null_space_bad_input() -> None:
    good: dict[str, Any] = {"keys": torch.ones(3, D), "residuals": torch.ones(3, H), "basis": torch.eye(D)[:, :9]}
    bad: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"l2": 0}, ConfigError, "l2 is 0"),
        ({"basis": torch.eye(9)}, ModelError, "basis is [9, 9], expected [24, r]"),
        ({"previous": torch.eye(D)}, ModelError, "previous is [24, 24], expected [9, 9]"),
        ({"previous": -2 * torch.eye(9)}, TensorError, "previous is not a sum of squares"),
        ({"previous": torch.nan * torch.eye(9)}, TensorError, "previous is not a sum of squares"),
        ({"keys": torch.nan * torch.ones(3, D)}, TensorError, "keys[0] holds NaN"),
        ({"residuals": torch.ones(2, H)}, TensorError, "residuals is [2, 5]"),
        ({"keys": np.ones((3, D))}, TensorError, "keys is of type ndarray, expected a torch.Tensor"),
        ({"basis": np.eye(D)}, TensorError, "basis is of type ndarray"),
        ({"previous": np.eye(9)}, TensorError, "previous is of type ndarray"),
    ]
    for change, kind, message in bad:
        with pytest.raises(kind, match=re.escape(message)):
            ops.null_space_update(**good | {"l2": 1.0} | change)


def test_null_space_of_nothing() -> None:
    left, right = ops.null_space_update(torch.ones(3, D), torch.ones(3, H), torch.eye(D)[:, :0], l2=1.0)
    assert not (left @ right).any()
