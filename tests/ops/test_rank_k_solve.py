"""Rank-N solves against the papers' d×d formulas in 70 digits: fp64 formulas are off by 1e-8 at cond(C) = 1e8."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from rank_k import FORMULAS, D, H, error, exact, least_squares, problem, solved
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastedit import ops
from fastedit.errors import ConfigError, ModelError, TensorError

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("isotropic", [False, True])
@pytest.mark.parametrize("ridge", [1e-2, 1.5e4])
@pytest.mark.parametrize("n", [1, 7, D - 1, D, D + 3])
@pytest.mark.parametrize("constraint", FORMULAS)
def test_equals_the_direct_formula(constraint: str, n: int, ridge: float, isotropic: bool, seed: int) -> None:
    C, keys, residuals = problem(seed, n, isotropic=isotropic)
    left, right = ops.rank_k_update(keys, residuals, ops.factor_covariance(C), ridge=ridge, constraint=constraint)
    assert left.shape == (H, min(n, D))
    assert right.shape == (min(n, D), D)
    assert error(left, right, FORMULAS[constraint](C, keys, residuals, ridge)) <= 1e-8


@pytest.mark.parametrize("n", [1, 7, D + 9])
def test_errs_with_the_root_of_the_condition_number(n: int, seed: int) -> None:
    """With C = L Lᵀ in all digits, what is left is the error of the solve: cond(L) = 1e4."""
    C, keys, residuals = problem(seed, n)
    L = ops.factor_covariance(C)
    left, right = ops.rank_k_update(keys, residuals, L, ridge=1.0)
    K, R = exact(keys), exact(residuals)
    assert error(left, right, solved(exact(L) @ exact(L).T + K.T @ K, K.T @ R).T) <= 1e-11


@pytest.mark.parametrize("cond", [1.0, 1e4, 1e8])
@pytest.mark.parametrize("isotropic", [False, True])
@pytest.mark.parametrize("n", [1, 7, D // 2])
def test_equality_memorizes(n: int, isotropic: bool, cond: float, seed: int) -> None:
    C, keys, residuals = problem(seed, n, cond=cond, isotropic=isotropic)
    left, right = ops.rank_k_update(keys, residuals, ops.factor_covariance(C), ridge=0, constraint="equality")
    assert (keys @ right.T @ left.T - residuals).norm() <= 1e-8 * residuals.norm()


@pytest.mark.parametrize("sine", [1e-2, 1e-3, 1e-4, 1e-5])
def test_equality_memorizes_keys_that_are_nearly_one(sine: float, seed: int) -> None:
    C, keys, residuals = problem(seed, 7)
    L = ops.factor_covariance(C)
    white = torch.nn.functional.normalize(torch.linalg.solve_triangular(L, keys.T, upper=False).T)
    white[4] = white[2] + sine * white[4]
    keys = white @ L.T
    left, right = ops.rank_k_update(keys, residuals, L, ridge=0, constraint="equality")
    assert (keys @ right.T @ left.T - residuals).norm() <= 1e-8 * residuals.norm()


def test_rome_is_equality_of_one(seed: int) -> None:
    C, keys, residuals = problem(seed, 1)
    left, right = ops.rank_k_update(keys, residuals, ops.factor_covariance(C), ridge=0, constraint="equality")
    k = exact(keys)[0]
    u = solved(exact(C), k[:, None])[:, 0]
    assert error(left, right, torch.outer(residuals[0], u.double()) / (u @ k).double()) <= 1e-8


def test_memit_is_emmet_with_its_weight(seed: int) -> None:
    C, keys, residuals = problem(seed, 7)
    L = ops.factor_covariance(C)
    memit = ops.rank_k_update(keys, residuals, L, ridge=20.0)
    emmet = ops.rank_k_update(keys, residuals, L, ridge=20.0, constraint="equality")
    assert error(*emmet, memit[0] @ memit[1]) <= 1e-11
    assert error(*emmet, least_squares(C, keys, residuals, 20.0)) <= 1e-8


@pytest.mark.parametrize("n", [1, 7, D + 9])
def test_groups_are_each_alone(n: int, seed: int) -> None:
    C, keys, residuals = problem(seed, (4, n))
    L = ops.factor_covariance(C)
    left, right = ops.rank_k_update(keys, residuals, L, ridge=2.0)
    assert left.shape == (4, H, min(n, D))
    for b in range(4):
        one = ops.rank_k_update(keys[b], residuals[b], L, ridge=2.0)
        assert error(left[b], right[b], one[0] @ one[1]) <= 1e-11


def test_rows_of_zeros_pad_a_group(seed: int) -> None:
    C, keys, residuals = problem(seed, (2, 7))
    L = ops.factor_covariance(C)
    keys[1, 4:], residuals[1, 4:] = 0, 0
    left, right = ops.rank_k_update(keys, residuals, L, ridge=2.0)
    short = ops.rank_k_update(keys[1, :4], residuals[1, :4], L, ridge=2.0)
    assert error(left[1], right[1], short[0] @ short[1]) <= 1e-11


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0)])
def test_nothing_to_write(shape: tuple[int, ...]) -> None:
    for constraint, ridge in (("least-squares", 1.0), ("equality", 0)):
        left, right = ops.rank_k_update(
            torch.ones(*shape, D), torch.ones(*shape, H), torch.eye(D), ridge=ridge, constraint=constraint
        )
        assert (left @ right).shape == (*shape[:-1], H, D)
        assert not (left @ right).any()


def test_dtypes(seed: int) -> None:
    """fp32 in, fp64 inside, fp32 out: the only error is that of rounding the factors."""
    C, keys, residuals = (x.float() for x in problem(seed, 7, cond=1e4))
    L = ops.factor_covariance(C)
    assert L.dtype == torch.float64
    wanted = least_squares(C, keys, residuals, 3.0)
    left, right = ops.rank_k_update(keys, residuals, L, ridge=3.0)
    assert left.dtype == right.dtype == torch.float32
    assert error(left, right, wanted) <= 5e-7
    left, right = ops.rank_k_update(keys, residuals.double(), L, ridge=3.0)
    assert left.dtype == right.dtype == torch.float64
    assert error(left, right, wanted) <= 1e-11


def test_fp32_factors_share_the_condition_number(seed: int) -> None:
    """Two keys almost one: an inverse of 1e8 on one side would leave nothing of an fp32 result."""
    C, keys, residuals = problem(seed, 7)
    keys[4] = keys[2] + 1e-4 * keys[4]
    L = ops.factor_covariance(C)
    wanted = ops.rank_k_update(keys, residuals, L, ridge=0, constraint="equality")
    left, right = ops.rank_k_update(keys, residuals.float(), L, ridge=0, constraint="equality")
    assert error(left, right, wanted[0] @ wanted[1]) <= 1e-5


class Sizes(TorchDispatchMode):
    """The number of elements of each tensor that an operation made, other than views of `known`."""

    def __init__(self, known: Tensor) -> None:
        super().__init__()
        self.known, self.seen = known.untyped_storage().data_ptr(), [0]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() != self.known:
                self.seen.append(x.numel())
        return result


@pytest.mark.parametrize("ridge", [0, 1.0])
def test_few_keys_make_nothing_of_d_by_d(ridge: float, seed: int) -> None:
    C, keys, residuals = problem(seed, 3)
    L = ops.factor_covariance(C)
    with Sizes(L) as sizes:
        ops.rank_k_update(keys, residuals, L, ridge=ridge, constraint="equality")
    assert max(sizes.seen) == 3 * D


def test_inputs_stay_as_they_are(seed: int) -> None:
    C, keys, residuals = problem(seed, 7)
    L = ops.factor_covariance(C)
    inputs = [C, keys, residuals, L, torch.eye(D).double()]
    copies = [x.clone() for x in inputs]
    ops.rank_k_update(keys, residuals, L, ridge=0, constraint="equality")
    ops.null_space_update(keys, residuals, inputs[4], inputs[4], l2=1.0)
    ops.factor_covariance(C)
    solver = ops.SequentialSolver(L, 1.0)
    for _ in range(5):
        solver.update(keys, residuals)
    assert all(torch.equal(x, copy) for x, copy in zip(inputs, copies, strict=True))


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"ridge": 0}, ConfigError, "ridge is 0, expected a finite number > 0"),
    ({"ridge": -1.0, "constraint": "equality"}, ConfigError, "ridge is -1.0, expected a finite number ≥ 0"),
    ({"ridge": torch.nan}, ConfigError, "ridge is nan"),
    ({"ridge": torch.inf}, ConfigError, "ridge is inf"),
    ({"constraint": "equal"}, ConfigError, "constraint is 'equal'"),
    ({"ridge": "1.0"}, ConfigError, "ridge is '1.0', expected a finite number"),
    ({"keys": [[1.0]]}, TensorError, "keys is of type list, expected a torch.Tensor"),
    ({"residuals": np.ones((3, H))}, TensorError, "residuals is of type ndarray, expected a torch.Tensor"),
    ({"cov_factor": np.eye(D)}, TensorError, "cov_factor is of type ndarray, expected a torch.Tensor"),
    ({"keys": torch.ones(D)}, TensorError, "keys is [24], expected [N, d] or [B, N, d]"),
    ({"residuals": torch.ones(4, H)}, TensorError, "residuals is [4, 5], expected a row for each of keys [3, 24]"),
    (
        {"keys": torch.ones(3, D).index_fill(0, torch.tensor(2), torch.nan)},
        TensorError,
        "keys[2] holds NaN or infinity",
    ),
    ({"residuals": torch.ones(3, H).index_fill(0, torch.tensor(1), torch.inf)}, TensorError, "residuals[1] holds"),
    ({"cov_factor": torch.eye(9)}, ModelError, "keys have width 24, cov_factor 9: statistics of another model"),
    ({"cov_factor": torch.ones(D, 9)}, ModelError, "cov_factor is [24, 9], expected a lower factor [d, d]"),
    ({"cov_factor": -torch.eye(D)}, ModelError, "cov_factor has a diagonal that is not positive"),
    ({"cov_factor": torch.eye(D) + torch.full((D, D), torch.nan).tril(-1)}, ModelError, "cov_factor holds NaN"),
]


@pytest.mark.parametrize(("change", "kind", "message"), BAD)
def test_bad_input(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    good: dict[str, Any] = {"keys": torch.ones(3, D), "residuals": torch.ones(3, H), "cov_factor": torch.eye(D)}
    with pytest.raises(kind, match=re.escape(message)):
        ops.rank_k_update(**good | {"ridge": 1.0} | change)


def test_the_row_of_a_batch_is_named() -> None:
    keys = torch.ones(3, 2, D)
    keys[2, 1, 7] = torch.nan
    with pytest.raises(TensorError, match=re.escape("keys[2, 1] holds NaN or infinity (1 rows do)")):
        ops.rank_k_update(keys, torch.ones(3, 2, H), torch.eye(D), ridge=1.0)
