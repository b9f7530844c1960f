"""Cases for every operation against plain torch code, on a CPU, where torch serves most of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.linalg import cholesky, solve, solve_triangular

from benchmarks import kernels
from benchmarks.harness import Case, Inputs
from fastedit import ops
from fastedit.ops.registry import Backend

_NAMES = {"localized_adam": "localized_adam_", "rank_k_solve": "rank_k_update"}
N, D, H = 64, 512, 512  # number of keys, their width, width of the outputs


def weights(outputs: Sequence[Any]) -> list[Tensor]:
    """The outputs to compare; updates in two factors are multiplied out."""
    return [x[0] @ x[1] if isinstance(x, tuple) else x for x in outputs]


def syrk_case(name: str) -> Case:
    dtype = getattr(torch, name)

    def setup() -> Inputs:
        rows = torch.randn(2048, D).to(dtype)
        return rows, torch.zeros(D, D, dtype=torch.float64), torch.zeros(D, D)

    def ours(backend: Backend, rows: Tensor, total: Tensor, _: Tensor) -> Sequence[Tensor]:
        ops.syrk_(total, rows, backend=backend)
        return [total]  # nothing is written above the diagonal: it stays 0

    def plain(rows: Tensor, _: Tensor, total: Tensor) -> Sequence[Tensor]:
        rows = rows.float()
        return [total.addmm_(rows.T, rows).tril()]

    return Case(
        "syrk_",
        setup,
        lambda rows, *_: [(rows.double().T @ rows.double()).tril()],
        {"ours": partial(ours, "auto"), "ours, torch": partial(ours, "torch"), "torch": plain},
        tolerance=1e-6,
        shape=f"2048×{D}",
        dtype=name,
    )


def factor() -> Tensor:
    rows = torch.randn(4 * D, D, dtype=torch.float64)
    return cholesky(rows.T @ rows / len(rows))


def factor_case() -> Case:
    def plain(C: Tensor) -> Sequence[Tensor]:
        return [cholesky(C)]

    return Case(
        "factor_covariance",
        lambda: ((L := factor()) @ L.T,),
        plain,
        {"ours": lambda C: [ops.factor_covariance(C)], "torch": plain},
        tolerance=1e-12,
        shape=f"d={D}",
        dtype="float64",
    )


def null_space_case() -> Case:
    """AlphaEdit's update; "torch" is the published R Kᵀ P (K Kᵀ P + l2·I)⁻¹, a d×d solve."""
    rank, l2 = D // 2, 10.0

    def setup() -> Inputs:
        basis = torch.linalg.qr(torch.randn(D, rank, dtype=torch.float64))[0]
        return torch.randn(N, D, dtype=torch.float64), torch.randn(N, H, dtype=torch.float64), basis

    def published(keys: Tensor, residuals: Tensor, basis: Tensor) -> Sequence[Tensor]:
        projected = keys @ basis @ basis.T
        system = keys.T @ projected + l2 * torch.eye(D, dtype=torch.float64)
        return [solve(system, residuals.T @ projected, left=False)]

    def ours(keys: Tensor, residuals: Tensor, basis: Tensor) -> Sequence[Any]:
        return [ops.null_space_update(keys, residuals, basis, l2=l2)]

    return Case(
        "null_space_update",
        setup,
        published,
        {"ours": ours, "torch": published},
        tolerance=1e-10,
        shape=f"N={N}, d={D}, r={rank}, h={H}",
        dtype="float64",
    )


def localized_case(out: int, width: int, rows: int, steps: int = 8) -> Case:
    """A training loop of one layer: forward, backward and step; "torch" is its fused Adam with the layer's gradient."""

    def setup() -> Inputs:
        return torch.randn(out, width) / width**0.5, torch.randn(steps, rows, width), torch.randn(steps, rows, out)

    def loop(
        weight: Tensor, xs: Tensor, ys: Tensor, make: Callable[[nn.Linear], torch.optim.Optimizer]
    ) -> list[Tensor]:
        layer = nn.Linear(width, out, bias=False, dtype=weight.dtype)
        layer.weight = nn.Parameter(weight)
        optimizer = make(layer)
        for x, y in zip(xs.to(weight.dtype), ys.to(weight.dtype), strict=True):
            layer(x).backward(y)
            optimizer.step()
            optimizer.zero_grad()
        if isinstance(optimizer, ops.LocalizedAdam):
            optimizer.remove()
        return [layer.weight.detach()]

    def theirs(layer: nn.Linear) -> torch.optim.Optimizer:
        return torch.optim.Adam([layer.weight], lr=1e-3, fused=True)

    def ours(layer: nn.Linear) -> torch.optim.Optimizer:
        return ops.localized(layer, lr=1e-3)

    return Case(
        "localized",
        setup,
        lambda weight, *rest: loop(weight.double(), *rest, theirs),
        {"ours": partial(loop, make=ours), "torch": partial(loop, make=theirs)},
        tolerance=1e-4,
        shape=f"{out}×{width}, T={rows}",
    )


def stream_case(batches: int = 8) -> Case:
    """A stream of batches; "torch" is a d×d solve for each batch."""

    def setup() -> Inputs:
        keys, residuals = (torch.randn(batches, N, n, dtype=torch.float64) for n in (D, H))
        return keys, residuals, factor()

    def plain(keys: Tensor, residuals: Tensor, L: Tensor) -> Sequence[Tensor]:
        system, found = L @ L.T * D, []
        for K, R in zip(keys, residuals, strict=True):
            system = system + K.T @ K
            found.append(solve(system, R.T @ K, left=False))
        return found

    def ours(keys: Tensor, residuals: Tensor, L: Tensor) -> Sequence[Any]:
        solver = ops.SequentialSolver(L, D)
        return [solver.update(K, R) for K, R in zip(keys, residuals, strict=True)]

    return Case(
        "SequentialSolver",
        setup,
        plain,
        {"ours": ours, "torch": plain},
        tolerance=1e-10,
        shape=f"{batches} batches, N={N}, d={D}, h={H}",
        dtype="float64",
    )


def dependent_case(*, some: bool) -> Case:
    """Dependent keys; "torch" only tells whether there are any, not which."""
    groups = [[1, 7], [2, 3, 9]] if some else []

    def setup() -> Inputs:
        keys = torch.randn(N, D, dtype=torch.float64)
        if some:
            keys[7], keys[9] = 2 * keys[1], keys[2] - keys[3]
        return keys, factor()

    def numbered(found: list[list[int]]) -> Sequence[Tensor]:
        label = torch.zeros(N)
        for i, group in enumerate(found, 1):
            label[group] = i
        return [label]

    def rank(keys: Tensor, L: Tensor) -> Sequence[Tensor]:
        white = solve_triangular(L.T, keys, upper=True, left=False)
        assert (torch.linalg.matrix_rank(white) < N) == some
        return numbered(groups)

    return Case(
        "find_dependent",
        setup,
        lambda *_: numbered(groups),
        {"ours": lambda keys, L: numbered(ops.find_dependent(keys, L)), "torch": rank},
        tolerance=0.0,
        shape=f"N={N}, d={D}, {'some' if some else 'none'} dependent",
        dtype="float64",
    )


def all_cases() -> dict[str, list[Case]]:
    """Name of an operation -> its cases."""
    found = defaultdict(list)
    for case in (
        *kernels.cases(torch.device("cpu")),
        *(syrk_case(name) for name in ("float32", "bfloat16")),
        factor_case(),
        null_space_case(),
        localized_case(576, 1536, 64),
        localized_case(2048, 2048, 256),
        stream_case(),
        *(dependent_case(some=some) for some in (False, True)),
    ):
        found[_NAMES.get(case.benchmark, case.benchmark)].append(case)
    return found
