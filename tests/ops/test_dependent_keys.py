"""Keys that depend on one another: which are named, and what is written for them."""

from __future__ import annotations

import pytest
import torch
from rank_k import D, error, least_squares, problem
from torch import Tensor

from fastedit import ops

pytestmark = pytest.mark.usefixtures("poisoned")

# rows that are combinations {row: weight} of others, and the groups that they make
DEPENDENT: dict[str, tuple[dict[int, dict[int, float]], list[list[int]]]] = {
    "twice": ({5: {1: 1}}, [[1, 5]]),
    "scaled": ({5: {1: -2.5}}, [[1, 5]]),
    "three times, and a pair": ({3: {0: 1}, 8: {0: 1}, 6: {2: 1}}, [[0, 3, 8], [2, 6]]),
    "a combination": ({7: {1: 1, 4: -0.3}}, [[1, 4, 7]]),
    "a combination and a pair": ({7: {1: 1, 4: 1}, 9: {0: 1}}, [[0, 9], [1, 4, 7]]),
    "a combination twice": ({7: {1: 1, 4: 1}, 0: {1: 1, 4: 1}}, [[0, 1, 4, 7]]),
    "zero": ({5: {}}, [[5]]),
}


def spoil(keys: Tensor, rows: dict[int, dict[int, float]]) -> None:
    for row, made_of in rows.items():
        keys[row] = sum((weight * keys[i] for i, weight in made_of.items()), torch.zeros(D))


@pytest.mark.parametrize("name", DEPENDENT)
def test_dependent_keys_are_named(name: str, seed: int) -> None:
    rows, groups = DEPENDENT[name]
    C, keys, residuals = problem(seed, 10)
    L = ops.factor_covariance(C)
    assert ops.find_dependent(keys, L) == []
    spoil(keys, rows)
    assert ops.find_dependent(keys, L) == groups
    with pytest.raises(ops.DependentKeysError) as caught:
        ops.rank_k_update(keys, residuals, L, ridge=0, constraint="equality")
    assert caught.value.groups == groups
    assert caught.value.problem is None
    assert " | ".join(", ".join(map(str, group)) for group in groups) in str(caught.value)


def test_dependent_keys_of_a_batch_are_named(seed: int) -> None:
    C, keys, residuals = problem(seed, (3, 10))
    spoil(keys[1], {5: {1: 1}})
    with pytest.raises(ops.DependentKeysError, match=r"problem 1 .* rows 1, 5\.") as caught:
        ops.rank_k_update(keys, residuals, ops.factor_covariance(C), ridge=0, constraint="equality")
    assert caught.value.problem == 1


def test_more_keys_than_their_width_are_dependent(seed: int) -> None:
    C, keys, residuals = problem(seed, D + 3)
    with pytest.raises(ops.DependentKeysError) as caught:
        ops.rank_k_update(keys, residuals, ops.factor_covariance(C), ridge=0, constraint="equality")
    assert sum(map(len, caught.value.groups)) > D


@pytest.mark.parametrize("noise", [0, 1e-7])
def test_duplicates_of_fp32_are_found(noise: float, seed: int) -> None:
    """One subject met in two batches of another shape; whitening by cond(L) = 100 makes the noise larger."""
    C, keys, _ = problem(seed, 10, cond=1e4)
    keys[5] = keys[1] + noise * keys[1].norm() * keys[2] / keys[2].norm()
    keys[8] = keys[6] + 0.1 * keys[8]  # close, and yet another key
    assert ops.find_dependent(keys.float(), ops.factor_covariance(C)) == [[1, 5]]
    assert ops.find_dependent(keys, ops.factor_covariance(C), duplicate=0.5) == [[1, 5], [6, 8]]


def test_duplicates_share_a_least_squares_update(seed: int) -> None:
    C, keys, residuals = problem(seed, 7)
    keys[5] = keys[1]
    for ridge in (1e-3, 1.0):
        left, right = ops.rank_k_update(keys, residuals, ops.factor_covariance(C), ridge=ridge)
        assert error(left, right, least_squares(C, keys, residuals, ridge)) <= 1e-8


def test_ridge_below_fp64_is_an_error(seed: int) -> None:
    C, keys, residuals = problem(seed, 7)
    keys[5] = keys[1]
    with pytest.raises(ops.DependentKeysError, match=r"rows 1, 5\."):
        ops.rank_k_update(keys, residuals, ops.factor_covariance(C), ridge=1e-300)
