"""The three objectives against their d×d formulas, one after the other and all at once; shares of layers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastedit import ConfigError, ModelError, ops
from fastedit.methods.locate_then_edit.distributions import shares_of
from fastedit.methods.locate_then_edit.objectives import Equality, LeastSquares, NullSpace, Objective, null_space

D, H = 20, 6
LAMBDA, ALPHA, L2, THRESHOLD = 3.0, 0.25, 0.7, 1e-3


def moment(seed: int, smallest: float = 1e-4) -> Tensor:
    """C [D, D] with eigenvalues from `smallest` to 1."""
    rng = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(D, D, generator=rng).double()).Q
    C = (basis * torch.logspace(torch.tensor(smallest).log10(), 0, D, dtype=torch.float64)) @ basis.T
    return (C + C.T) / 2


def pairs(seed: int, *shape: int) -> tuple[Tensor, Tensor]:
    """Keys [n, D], residuals [n, H]."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, D, generator=rng).double(), torch.randn(*shape, H, generator=rng).double()


def least_squares(C: Tensor, K: Tensor, R: Tensor, previous: Tensor) -> Tensor:
    """R Kᵀ (λC + Cp + K Kᵀ)⁻¹, K [D, n]."""
    return R @ K.T @ torch.linalg.inv(LAMBDA * C + previous + K @ K.T)


def equality(C: Tensor, K: Tensor, R: Tensor, _: Tensor) -> Tensor:
    """R (Kᵀ(λC)⁻¹K + αI)⁻¹ Kᵀ(λC)⁻¹."""
    inverse = torch.linalg.inv(LAMBDA * C)
    return R @ torch.linalg.inv(K.T @ inverse @ K + ALPHA * torch.eye(K.shape[1]).double()) @ K.T @ inverse


def in_null_space(C: Tensor, K: Tensor, R: Tensor, previous: Tensor) -> Tensor:
    """R Kᵀ P ((K Kᵀ + Cp) P + L2·I)⁻¹."""
    values, vectors = torch.linalg.eigh(C)
    U = vectors[:, values < THRESHOLD]
    P = U @ U.T
    return R @ K.T @ P @ torch.linalg.inv((K @ K.T + previous) @ P + L2 * torch.eye(D).double())


MAKE: dict[str, tuple[Callable[[Tensor], Objective], Callable[..., Tensor]]] = {
    "least-squares": (lambda C: LeastSquares(ops.factor_covariance(C), LAMBDA), least_squares),
    "equality": (lambda C: Equality(ops.factor_covariance(C), LAMBDA, ALPHA), equality),
    "null-space": (lambda C: NullSpace(null_space(*torch.linalg.eigh(C), THRESHOLD), L2), in_null_space),
}


def assert_equal(left: Tensor, right: Tensor, wanted: Tensor) -> None:
    assert float((left @ right - wanted).norm() / wanted.norm()) < 1e-9


@pytest.mark.parametrize("name", MAKE)
def test_a_stream_of_batches_equals_the_formula(name: str, seed: int) -> None:
    make, formula = MAKE[name]
    C = moment(seed)
    objective, previous = make(C), torch.zeros(D, D).double()
    for turn, n in enumerate((1, 5, 3, D + 4, 2)):
        keys, residuals = pairs(seed + turn, n)
        assert_equal(*objective.update(keys, residuals), formula(C, keys.T, residuals.T, previous))
        previous += keys.T @ keys


@pytest.mark.parametrize("name", MAKE)
def test_keys_to_preserve_are_like_keys_that_were_written(name: str, seed: int) -> None:
    make, formula = MAKE[name]
    C, (old, _), (keys, residuals) = moment(seed), pairs(seed + 1, 7), pairs(seed + 2, 4)
    objective = make(C)
    objective.preserve(old[:3].float().double())
    objective.preserve(old[3:])
    old[:3] = old[:3].float().double()
    assert_equal(*objective.update(keys, residuals), formula(C, keys.T, residuals.T, old.T @ old))


@pytest.mark.parametrize("name", MAKE)
def test_each_alone_equals_the_formula_of_one_pair(name: str, seed: int) -> None:
    make, formula = MAKE[name]
    C, (keys, residuals) = moment(seed), pairs(seed + 1, 6)
    objective = make(C)
    left, right = objective.update_each(keys, residuals)
    assert left.shape == (6, H, 1)
    assert right.shape == (6, 1, D)
    for i in range(6):
        wanted = formula(C, keys[i, :, None], residuals[i, :, None], torch.zeros(()))
        assert_equal(left[i], right[i], wanted)


@pytest.mark.parametrize("name", ["least-squares", "null-space"])
def test_batches_one_after_the_other_are_all_at_once(name: str, seed: int) -> None:
    """Given the same targets: each residual is measured on what the batches before have written."""
    C, (keys, wanted) = moment(seed), pairs(seed + 1, 9)
    objective, total = MAKE[name][0](C), torch.zeros(H, D).double()
    for part in torch.arange(9).split(4):
        left, right = objective.update(keys[part], wanted[part] - keys[part] @ total.T)
        total += left @ right
    left, right = MAKE[name][0](C).update(keys, wanted)
    assert_equal(left, right, total)


def test_the_methods_are_one_another(seed: int) -> None:
    factor, (keys, residuals) = ops.factor_covariance(moment(seed)), pairs(seed + 1, 6)
    memit = LeastSquares(factor, 5.0).update(keys, residuals)
    assert_equal(*Equality(factor, 2.0, 2.5).update(keys, residuals), memit[0] @ memit[1])
    one = keys[:1], residuals[:1]
    x = torch.cholesky_solve(one[0].T, factor)
    rome = one[1].T @ x.T / (one[0] @ x)  # arXiv 2202.05262, equation 2
    for weight in (1.0, 1e5):
        assert_equal(*Equality(factor, weight, 0.0).update(*one), rome)


@pytest.mark.parametrize("smallest", [1e-2, 1e-8])
def test_an_equality_gives_each_key_its_value(smallest: float, seed: int) -> None:
    factor, (keys, residuals) = ops.factor_covariance(moment(seed, smallest)), pairs(seed + 1, 9)
    left, right = Equality(factor, 1e4, 0.0).update(keys, residuals)
    assert float((keys @ (left @ right).T - residuals).norm() / residuals.norm()) < 1e-9


def test_a_subject_met_twice_is_found_though_its_keys_differ_in_the_last_digits(seed: int) -> None:
    C = moment(seed, 1e-8)
    factor, (noise, residuals) = ops.factor_covariance(C), pairs(seed + 1, 6)
    keys = noise @ factor.T  # keys like those that C comes from
    keys[4] = keys[1] * (1 + 1e-7 * noise[5])
    for ask in (Equality(factor, 1.0, 0.0).update, Equality(factor, 1e5, 0.0).update):
        with pytest.raises(ops.DependentKeysError) as caught:
            ask(keys, residuals)
        assert caught.value.groups == [[1, 4]]
    left, right = Equality(factor, 1.0, 0.1).update(keys, residuals)
    assert (left @ right).isfinite().all()


def test_without_a_null_space_the_threshold_is_named(seed: int) -> None:
    C = moment(seed)
    basis = null_space(*torch.linalg.eigh(C), THRESHOLD)
    values = torch.linalg.eigvalsh(C)
    assert basis.shape == (D, int((values < THRESHOLD).sum()))
    assert float((basis.T @ C @ basis).diagonal().max()) < THRESHOLD
    with pytest.raises(ModelError, match=r"no eigenvalue of C is below 1e-09, the least is .*raise null_threshold"):
        null_space(*torch.linalg.eigh(C), 1e-9)


def test_shares() -> None:
    assert shares_of("single", [3]) == [(3, 1.0)]
    assert shares_of("spread", [4, 5, 8]) == [(4, 1 / 3), (5, 1 / 2), (8, 1.0)]
    assert shares_of("endpoints", [4, 5, 8]) == [(4, 1 / 2), (8, 1.0)]
    assert shares_of("endpoints", [4]) == shares_of("spread", [4]) == [(4, 1.0)]
    for layers in ([], [5, 4], [4, 4]):
        with pytest.raises(ConfigError, match=r"layers is \(.*from the lowest to the highest"):
            shares_of("spread", layers)
    with pytest.raises(ConfigError, match=r"layers is \(4, 5\), but a single layer is written"):
        shares_of("single", [4, 5])
