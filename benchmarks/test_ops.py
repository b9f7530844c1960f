"""Microbenchmarks of the operations on a CPU, where torch serves: `python -m pytest benchmarks/test_ops.py`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.harness import Case, copied, difference
from benchmarks.kernels import cases
from fastedit import ops

CASES = cases(torch.device("cpu"))
WAYS = [(case, name) for case in CASES for name in case.providers]


@pytest.mark.parametrize(("case", "name"), WAYS, ids=[f"{case.benchmark}, {name}" for case, name in WAYS])
def test_operation(benchmark: Any, case: Case, name: str) -> None:
    torch.manual_seed(0)
    benchmark.group = f"{case.benchmark} {case.shape}"
    inputs, provider = case.setup(), case.providers[name]
    assert difference(provider(*copied(inputs)), case.reference(*inputs)) <= case.tolerance
    benchmark(provider, *inputs)


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_syrk(benchmark: Any, backend: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    benchmark.group = f"syrk_ 2048 rows of 512, {dtype}"
    rows, total = torch.randn(2048, 512).to(dtype), torch.zeros(512, 512, dtype=torch.float64)
    ops.syrk_(total, rows, backend=backend)
    assert difference([total], [(rows.double().T @ rows.double()).tril()]) <= 1e-6
    benchmark(ops.syrk_, total, rows, backend=backend)
