"""The batched solves against fp64 and 70 digits; in Triton's interpreter where no GPU is."""

from __future__ import annotations

import math
import mmap
from typing import Any

import pytest
import torch
from rank_k import FORMULAS, error
from rank_k import problem as with_covariance
from torch import Tensor
from torch.linalg import cholesky, solve_triangular

from fastedit import ops
from fastedit.errors import ConfigError

kernel = pytest.importorskip("fastedit.kernels.rank_k_solve")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F64 = torch.float64
SHAPES = [(1, 1, 1, 1), (3, 7, 52, 33), (2, 16, 123, 252), (2, 33, 252, 1), (1, 64, 507, 123), (1, 101, 130, 7)]
"""groups, N, d, h"""


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nobody has written holds NaN, or the largest integer; a part of S has 64 columns."""

    def filled(real: Any) -> Any:
        def make(*args: Any, **options: Any) -> Tensor:
            x = real(*args, **options)
            return x.fill_(torch.nan if x.is_floating_point() else torch.iinfo(x.dtype).max)

        return make

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, filled(getattr(owner, name)))
    monkeypatch.setattr(kernel, "_SPAN", 64)


def problem(seed: int, B: int, N: int, d: int, h: int) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    white, residuals = (torch.randn(B, N, width, generator=rng, dtype=F64) for width in (d, h))
    return white.to(DEVICE), residuals.to(DEVICE)


def by_torch(white: Tensor, residuals: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    system = white @ white.mT + ridge * torch.eye(white.shape[-2], dtype=white.dtype, device=white.device)
    root = cholesky(system)
    return solve_triangular(root, residuals, upper=False), solve_triangular(root, white, upper=False)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_solves_the_system(shape: tuple[int, int, int, int], seed: int) -> None:
    """G is lower, G Gᵀ = S, to the precision of fp64 times the condition number of S."""
    white, residuals = problem(seed, *shape)
    left, right, failed = kernel.rank_k_solve(white, residuals, 0.7)
    assert not failed.any()
    for ours, wanted in zip((left, right), by_torch(white, residuals, 0.7), strict=True):
        system = white @ white.mT + 0.7 * torch.eye(shape[1], dtype=F64, device=DEVICE)
        bound = 1e-14 * float(torch.linalg.cond(system).max())
        assert (ours - wanted).norm() <= bound * wanted.norm()


def test_a_ridge_for_each_group_and_leading_dimensions(seed: int) -> None:
    white, residuals = problem(seed, 6, 5, 33, 4)
    ridge = torch.rand(2, 3, dtype=F64, device=DEVICE) + 0.1
    left, right, failed = kernel.rank_k_solve(white.view(2, 3, 5, 33), residuals.view(2, 3, 5, 4), ridge)
    assert (left.shape, right.shape, failed.shape) == ((2, 3, 5, 4), (2, 3, 5, 33), (2, 3))
    for i, value in enumerate(ridge.flatten().tolist()):
        for ours, wanted in zip((left, right), by_torch(white[i], residuals[i], value), strict=True):
            assert (ours.flatten(0, 1)[i] - wanted).norm() <= 1e-13 * wanted.norm()


def test_rows_of_zeros_and_strides_leave_every_bit(seed: int) -> None:
    white, residuals = problem(seed, 2, 9, 52, 33)
    wanted = kernel.rank_k_solve(white, residuals, 0.3)
    strided = white.mT.contiguous().mT, residuals.repeat(1, 1, 2)[..., :33]
    for x, y in zip(kernel.rank_k_solve(*strided, 0.3), wanted, strict=True):
        assert torch.equal(x, y)
    padded = [torch.nn.functional.pad(x, (0, 0, 0, 3)) for x in (white, residuals)]
    left, right, failed = kernel.rank_k_solve(*padded, 0.3)
    assert torch.equal(left, torch.nn.functional.pad(wanted[0], (0, 0, 0, 3)))
    assert torch.equal(right, torch.nn.functional.pad(wanted[1], (0, 0, 0, 3)))
    assert not failed.any()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, under the interpreter
@pytest.mark.parametrize("N", [5, 40])
def test_groups_without_a_factor_are_told(N: int, seed: int) -> None:
    white, residuals = problem(seed, 4, N, 52, 3)
    white[1, N - 1] = white[1, 0]
    white[2, 3] = 0
    white[3, 0, 0] = math.nan
    *_, failed = kernel.rank_k_solve(white, residuals, 0.0)
    assert (failed > 0).tolist() == [False, True, True, True]


def test_offsets_beyond_31_bits(seed: int) -> None:
    """Groups, then rows, 2³⁰ elements apart, in memory that is reserved and not taken."""
    size = 2 * 2**30 + 4096
    if DEVICE == "cpu":
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
        memory = torch.frombuffer(mmap.mmap(-1, size * 8, flags=flags), dtype=F64)
    else:
        memory = torch.zeros(size, dtype=F64, device=DEVICE)
    for B, N, strides in ((3, 2, (2**30, 33, 1)), (1, 3, (33, 2**30, 1))):
        white, residuals = problem(seed, B, N, 33, 5)
        wanted = kernel.rank_k_solve(white, residuals, 0.3)
        far = memory.as_strided((B, N, 33), strides).copy_(white)
        for x, y in zip(kernel.rank_k_solve(far, residuals, 0.3), wanted, strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize(
    ("constraint", "n", "ridge"),
    [("least-squares", 1, 0.1), ("least-squares", 13, 10.0), ("equality", 13, 0.1)],
)
def test_op_keeps_eight_digits(constraint: Any, n: int, ridge: float, seed: int) -> None:
    """At cond(C) = 1e8."""
    C, keys, residuals = with_covariance(seed, n)
    inputs = (x.to(DEVICE) for x in (keys, residuals, ops.factor_covariance(C)))
    left, right = ops.rank_k_update(*inputs, ridge=ridge, constraint=constraint, backend="triton")
    assert error(left.cpu(), right.cpu(), FORMULAS[constraint](C, keys, residuals, ridge)) <= 1e-8


def test_op_keeps_nine_digits_of_keys_that_are_nearly_one(seed: int) -> None:
    """The system's condition number is 1e12, of which one factorization would leave six digits."""
    _, keys, residuals = with_covariance(seed, 13, isotropic=True)
    keys[1] = keys[0] + 1e-5 * keys[1]
    identity = torch.eye(keys.shape[-1], dtype=F64)
    inputs = (x.to(DEVICE) for x in (keys, residuals, identity))
    left, right = ops.rank_k_update(*inputs, ridge=1e-10, constraint="equality", backend="triton")
    assert error(left.cpu(), right.cpu(), FORMULAS["equality"](identity, keys, residuals, 1e-10)) <= 1e-9


def test_op_serves_groups_and_null_spaces(seed: int) -> None:
    C, keys, residuals = with_covariance(seed, (3, 4))
    inputs = [x.to(DEVICE) for x in (keys, residuals, ops.factor_covariance(C))]
    basis = torch.linalg.qr(torch.randn(keys.shape[-1], 9, dtype=F64)).Q.to(DEVICE)
    for run in (
        lambda backend: ops.rank_k_update(*inputs, ridge=0.5, backend=backend),
        lambda backend: ops.null_space_update(*inputs[:2], basis, l2=0.5, backend=backend),
    ):
        (left, right), wanted = run("triton"), run("torch")
        product = wanted[0] @ wanted[1]
        assert (left @ right - product).norm() <= 1e-11 * product.norm()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_op_names_keys_that_depend_on_one_another(seed: int) -> None:
    C, keys, residuals = (x.to(DEVICE) for x in with_covariance(seed, (2, 4)))
    keys[1, 3] = keys[1, 1]
    with pytest.raises(ops.DependentKeysError, match=r"problem 1 .*rows 1, 3"):
        ops.rank_k_update(keys, residuals, ops.factor_covariance(C), ridge=1e-20, backend="triton")


@pytest.mark.parametrize(
    ("n", "options", "message"),
    [
        (3, {"ridge": 0.0, "constraint": "equality"}, "ridge is 0"),
        (129, {"ridge": 1.0}, "N = 129 is not from 1 to 128"),
        (65, {"ridge": 1.0}, "N = 65 is above d = 24"),
    ],
)
def test_op_says_what_it_cannot(n: int, options: dict[str, Any], message: str) -> None:
    C, keys, residuals = (x.to(DEVICE) for x in with_covariance(0, n))
    with pytest.raises(ConfigError, match=message):
        ops.rank_k_update(keys, residuals, ops.factor_covariance(C), **options, backend="triton")


def test_bad_input() -> None:
    white, residuals = problem(0, 2, 3, 8, 5)
    assert [len(x) for x in kernel.rank_k_solve(white[:0], residuals[:0], 1.0)] == [0, 0, 0]
    assert kernel.rank_k_solve(white, residuals[..., :0], 1.0)[0].shape == (2, 3, 0)
    with pytest.raises(ValueError, match="float16"):
        kernel.rank_k_solve(white.half(), residuals.half(), 1.0)
    with pytest.raises(ValueError, match=r"residuals \[2, 2, 5\]"):
        kernel.rank_k_solve(white, residuals[:, :2], 1.0)
    with pytest.raises(ValueError, match="≤ 128"):
        kernel.rank_k_solve(white.new_zeros(1, 129, 4), white.new_zeros(1, 129, 4), 1.0)
