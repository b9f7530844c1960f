"""The factor of a covariance, and covariances that have none."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from rank_k import D, problem
from torch import Tensor

from fastedit import ops
from fastedit.errors import ModelError

pytestmark = pytest.mark.usefixtures("poisoned")


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
    for value in (torch.nan, torch.inf):
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
