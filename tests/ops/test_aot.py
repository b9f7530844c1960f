"""Kernels compiled ahead of time for the GPUs they are for: nothing spills, all fits, products use tensor cores.

What aot.json records is not compiled again; FASTEDIT_TEST_COMPILE=1 (`make test-fresh`, CI) compiles and compares.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
"""Bytes of shared memory that a program can have."""


def test_shipped_configurations_fit_their_targets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    program, fresh = Path(__file__).with_name("aot.py"), os.environ.get("FASTEDIT_TEST_COMPILE") == "1"
    command = [sys.executable, program, "--json", tmp_path / "usage.json", *["--all"] * fresh]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    with capsys.disabled():
        print(f"\n{done.stdout}")
    found = json.loads((tmp_path / "usage.json").read_text())
    recorded = json.loads(program.with_suffix(".json").read_text(encoding="utf-8"))
    assert found == found | {key: row for key, row in recorded.items() if key in found}
    rows = found.values()
    assert {row["target"] for row in rows} == set(SHARED)
    for row in rows:
        assert row["shared"] <= SHARED[row["target"]], row
        if row["target"].startswith("sm"):  # a cap on registers can grant more than there are to launch
            assert -(-row["registers"] // 8) * 8 * 32 * row["num_warps"] <= 1 << 16, row
    poor = [row for row in rows if row["spilled"] or (row["instruction"] and not row["instructions"])]
    if poor and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6):
        pytest.skip(f"Triton {triton.__version__} spills or takes no tensor cores in {len(poor)} of {len(rows)}")
    assert not poor  # the tiles are for Triton 3.6 and later
