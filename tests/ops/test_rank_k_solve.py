"""Rank-N solves against the papers' d×d formulas in 70 digits: fp64 formulas are off by 1e-8 at cond(C) = 1e8."""

from __future__ import annotations

import re
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from rank_k import FORMULAS, D, H, error, exact, identity, least_squares, problem, solved
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastedit import ops
from fastedit.errors import ConfigError, ModelError, TensorError


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nobody has written holds NaN."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, real=real, **kw: real(*a, **kw).fill_(torch.nan))


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


NAN = torch.nan
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"ridge": 0}, ConfigError, "ridge is 0, expected a finite number > 0"),
    ({"ridge": -1.0, "constraint": "equality"}, ConfigError, "ridge is -1.0, expected a finite number ≥ 0"),
    ({"ridge": NAN}, ConfigError, "ridge is nan"),
    ({"ridge": torch.inf}, ConfigError, "ridge is inf"),
    ({"ridge": "1.0"}, ConfigError, "ridge is '1.0', expected a finite number"),
    ({"keys": [[1.0]]}, TensorError, "keys is of type list, expected a torch.Tensor"),
    ({"residuals": np.ones((3, H))}, TensorError, "residuals is of type ndarray, expected a torch.Tensor"),
    ({"cov_factor": np.eye(D)}, TensorError, "cov_factor is of type ndarray, expected a torch.Tensor"),
    ({"constraint": "equal"}, ConfigError, "constraint is 'equal'"),
    ({"keys": torch.ones(D)}, TensorError, "keys is [24], expected [N, d] or [B, N, d]"),
    ({"residuals": torch.ones(4, H)}, TensorError, "residuals is [4, 5], expected a row for each of keys [3, 24]"),
    ({"keys": torch.ones(3, D).index_fill(0, torch.tensor(2), NAN)}, TensorError, "keys[2] holds NaN or infinity"),
    ({"residuals": torch.ones(3, H).index_fill(0, torch.tensor(1), torch.inf)}, TensorError, "residuals[1] holds"),
    ({"cov_factor": torch.eye(9)}, ModelError, "keys have width 24, cov_factor 9: statistics of another model"),
    ({"cov_factor": torch.ones(D, 9)}, ModelError, "cov_factor is [24, 9], expected a lower factor [d, d]"),
    ({"cov_factor": -torch.eye(D)}, ModelError, "cov_factor has a diagonal that is not positive"),
    ({"cov_factor": torch.eye(D) + torch.full((D, D), NAN).tril(-1)}, ModelError, "cov_factor holds NaN"),
]


@pytest.mark.parametrize(("change", "kind", "message"), BAD)
def test_bad_input(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    good: dict[str, Any] = {"keys": torch.ones(3, D), "residuals": torch.ones(3, H), "cov_factor": torch.eye(D)}
    with pytest.raises(kind, match=re.escape(message)):
        ops.rank_k_update(**good | {"ridge": 1.0} | change)


def test_the_row_of_a_batch_is_named() -> None:
    keys = torch.ones(3, 2, D)
    keys[2, 1, 7] = NAN
    with pytest.raises(TensorError, match=re.escape("keys[2, 1] holds NaN or infinity (1 rows do)")):
        ops.rank_k_update(keys, torch.ones(3, 2, H), torch.eye(D), ridge=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [None, D, 10**6])
def test_factor_of_a_sound_covariance(count: int | None, dtype: torch.dtype, seed: int) -> None:
    C = problem(seed, 1, cond=1e4)[0].to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        L = ops.factor_covariance(C, count=count, allow_few=True)
    assert L.dtype == torch.float64
    assert torch.equal(L, L.tril())
    assert (L @ L.T - C).abs().max() <= 1e-14


def few_tokens(seed: int) -> Tensor:
    """Of D - 4, whose first dimensions are orthogonal: of random ones, the last is now and then made of the others."""
    count = D - 4
    keys = torch.randn(count, D, generator=torch.Generator().manual_seed(seed)).double()
    keys[:, :count] = torch.linalg.qr(keys[:, :count]).Q * count**0.5
    return keys.T @ keys / count


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_singular_covariance_is_refused(dtype: torch.dtype, seed: int) -> None:
    """A Cholesky factorization of it passes about half of the time: by rounding, not by meaning."""
    for salt in range(20):
        C = few_tokens(seed + salt).to(dtype)
        with pytest.raises(ModelError, match=r"not positive definite: dimension 20 .*collect some 240"):
            ops.factor_covariance(C)
    with pytest.raises(ModelError, match=r"comes from 20 tokens, fewer than its width 24: it is singular"):
        ops.factor_covariance(C, count=20)


def test_covariance_kept_in_fp32_is_refused_where_rounding_decides(seed: int) -> None:
    C = problem(seed, 1, cond=1e8)[0]
    ops.factor_covariance(C)
    C[3] = C[:, 3] = 0
    with pytest.raises(ModelError, match=r"float64\) is not positive definite: dimension 3 is zero"):
        ops.factor_covariance(C)
    C = torch.diag(torch.tensor([1.0] * D))
    C[4, 9] = C[9, 4] = 1 - 2.0**-24  # fp32 rounds it to 1 or next to it
    with pytest.raises(ModelError, match=r"float32\) is not positive definite: dimension 9"):
        ops.factor_covariance(C)


@pytest.mark.parametrize("count", [None, D - 4])
def test_few_tokens_only_if_asked_and_told(count: int | None, seed: int) -> None:
    C = few_tokens(seed)
    with pytest.warns(RuntimeWarning, match=f"from {count or '.'} tokens.* was added") as told:
        L = ops.factor_covariance(C, count=count, allow_few=True)
    added = float(re.search(r"overwrite; (\S+) was added", str(told[0].message))[1])
    assert added == pytest.approx(1e-6 * float(C.diagonal().mean()), rel=1e-2)
    assert (L @ L.T - C - added * torch.eye(D)).abs().max() <= 1e-2 * added


def test_few_tokens_of_a_sound_covariance_are_told(seed: int) -> None:
    C = problem(seed, 1, cond=1e4)[0]
    with pytest.warns(RuntimeWarning, match=r"from 20 tokens.*; 0 was added"):
        L = ops.factor_covariance(C, count=20, allow_few=True)
    assert (L @ L.T - C).abs().max() <= 1e-14


def test_bad_covariance(seed: int) -> None:
    C = problem(seed, 1)[0]
    for value in (NAN, torch.inf):
        bad = C.clone()
        bad[4, 7] = value
        with pytest.raises(ModelError, match=re.escape("C[4] holds NaN or infinity (1 rows do)")):
            ops.factor_covariance(bad, allow_few=True)
    for bad in (C.triu(), C.tril()):
        with pytest.raises(ModelError, match=r"C is not symmetric: C\[\d+, \d+\] = .* give all of C"):
            ops.factor_covariance(bad)
    bad = C.clone()
    bad[2, 2] = -1
    with pytest.raises(ModelError, match=r"not (symmetric|positive definite)"):
        ops.factor_covariance(bad, allow_few=True)
    for shape in ((D,), (D, D - 1), (2, D, D)):
        with pytest.raises(ModelError, match=re.escape(f"C is {list(shape)}, expected [d, d]")):
            ops.factor_covariance(torch.ones(shape))


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
    for bad in (keys[7:14] * NAN, keys[7:14, :-1], keys[None]):
        with pytest.raises(ModelError):
            solvers[0].update(bad, residuals[7:14])
    one, other = (solver.update(keys[7:14].float(), residuals[7:14].float()) for solver in solvers)
    assert torch.equal(one[0], other[0])
    assert torch.equal(one[1], other[1])
    assert one[0].dtype == one[1].dtype == torch.float32


def test_bad_solver() -> None:
    for ridge in (0, -1.0, NAN):
        with pytest.raises(ConfigError, match="ridge is"):
            ops.SequentialSolver(torch.eye(D), ridge)
    with pytest.raises(ModelError, match="cov_factor is"):
        ops.SequentialSolver(torch.ones(D, 3), 1.0)


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
        ({"previous": NAN * torch.eye(9)}, TensorError, "previous is not a sum of squares"),
        ({"keys": NAN * torch.ones(3, D)}, TensorError, "keys[0] holds NaN"),
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
