"""Check the result of each way of each operation, then time it: `make micro`; see CONTRIBUTING.md."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.harness import Case, copied, difference
from benchmarks.micro.cases import all_cases, weights

WAYS = [
    pytest.param(
        f"{op} {case.shape} {case.dtype}", case, way, id=f"{op} {case.shape} {case.dtype}, {way}".replace("×", "x")
    )
    for op, cases in all_cases().items()
    for case in cases
    for way in case.providers
]


@pytest.mark.parametrize(("group", "case", "way"), WAYS)
def test_operation(benchmark: Any, group: str, case: Case, way: str) -> None:
    torch.manual_seed(0)
    benchmark.group = group
    inputs, provider = case.setup(), case.providers[way]
    assert difference(weights(provider(*copied(inputs))), case.reference(*inputs)) <= case.tolerance
    benchmark(provider, *inputs)
