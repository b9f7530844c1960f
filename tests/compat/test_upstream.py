"""Our calls beside those that they replace, where there are checkouts of these (benchmarks/upstream.py)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks import rows, upstream
from fastedit.demo import World, checkpoint_path

VARIABLE = "FASTEDIT_UPSTREAM"


@pytest.fixture(scope="module")
def bench() -> upstream.Bench:
    if not os.environ.get(VARIABLE):
        pytest.skip(f"NOT COMPARED with published code: {VARIABLE} is not set; give the folder of its checkouts")
    return upstream.Bench(Path(checkpoint_path()), None, World().requests(2))


@pytest.mark.parametrize("case", upstream.CASES, ids=lambda case: f"{case.upstream}-{case.method}")
def test_the_update_is_that_of_the_published_code(
    case: upstream.Case, bench: upstream.Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout = Path(os.environ[VARIABLE]) / upstream.FLAGS[case.upstream]
    if not checkout.is_dir():
        pytest.skip(f"NOT COMPARED with published code: there is no {checkout}")
    monkeypatch.setenv(rows.VARIABLE, "")
    found = {(row.provider, row.unit): row.p50 for row in upstream.Run(case, bench, checkout, tmp_path).rows()}
    for unit in upstream.ACCURACY:
        assert found.get(("ours", unit), 0.0) <= case.limit(unit), unit
    assert found["ours", "efficacy"] == found["published", "efficacy"]
