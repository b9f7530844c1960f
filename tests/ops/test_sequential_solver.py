"""Batches one after the other, and all at once."""

from __future__ import annotations

import pytest
import torch
from rank_k import D, H, error, least_squares, problem

from fastedit import ops
from fastedit.errors import ConfigError, ModelError

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("isotropic", [False, True])
@pytest.mark.parametrize("ridge", [1e-2, 1.5e4])
@pytest.mark.parametrize("sizes", [(7,), (1, 3, 0, 5), (1,) * 9, (10, 9, 8, 7, 6), (3, D, 3), (5, D + 6, 4), (9,) * 12])
def test_batches_are_all_at_once(sizes: tuple[int, ...], ridge: float, isotropic: bool, seed: int) -> None:
    """Below, at and above the width of the keys, with residuals measured after each batch."""
    C, keys, wanted = problem(seed, sum(sizes), isotropic=isotropic)
    solver = ops.SequentialSolver(ops.factor_covariance(C), ridge)
    weight = torch.zeros(H, D).double()
    for k, v in zip(keys.split(sizes), wanted.split(sizes), strict=True):
        left, right = solver.update(k, v - k @ weight.T)
        assert left.shape[1] == min(len(k), D)
        weight += left @ right
    at_once = least_squares(C, keys, wanted, ridge)
    assert error(weight, torch.eye(D).double(), at_once) <= 1e-8


def test_the_same_keys_again_and_again(seed: int) -> None:
    C, keys, wanted = problem(seed, 3)
    solver = ops.SequentialSolver(ops.factor_covariance(C), 1.0)
    weight = torch.zeros(H, D).double()
    for _ in range(40):
        left, right = solver.update(keys, wanted - keys @ weight.T)
        weight += left @ right
    at_once = least_squares(C, keys.repeat(40, 1), wanted.repeat(40, 1), 1.0)
    assert error(weight, torch.eye(D).double(), at_once) <= 1e-8


def test_a_failed_batch_leaves_no_trace(seed: int) -> None:
    C, keys, residuals = problem(seed, 21)
    L = ops.factor_covariance(C)
    solvers = ops.SequentialSolver(L, 2.0), ops.SequentialSolver(L, 2.0)
    for solver in solvers:
        solver.update(keys[:7], residuals[:7])
    for bad in (keys[7:14] * torch.nan, keys[7:14, :-1], keys[None]):
        with pytest.raises(ModelError):
            solvers[0].update(bad, residuals[7:14])
    one, other = (solver.update(keys[7:14].float(), residuals[7:14].float()) for solver in solvers)
    assert torch.equal(one[0], other[0])
    assert torch.equal(one[1], other[1])
    assert one[0].dtype == one[1].dtype == torch.float32


def test_bad_solver() -> None:
    for ridge in (0, -1.0, torch.nan):
        with pytest.raises(ConfigError, match="ridge is"):
            ops.SequentialSolver(torch.eye(D), ridge)
    with pytest.raises(ModelError, match="cov_factor is"):
        ops.SequentialSolver(torch.ones(D, 3), 1.0)
