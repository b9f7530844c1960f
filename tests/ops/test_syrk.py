"""syrk_ against rowsᵀ rows in fp64: every backend that this machine has, every dtype, ragged sizes, bad input."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from sums import DTYPES, blank, check
from torch import Tensor

from fastedit import ConfigError, ModelError, ops
from fastedit.ops import syrk
from fastedit.ops.registry import choose

Add = Callable[..., None]  # (total, rows, mask=None)


@pytest.fixture(params=["torch", "portable", "avx2", "avx512"])
def add(request: pytest.FixtureRequest) -> Add:
    """syrk_ on one backend, and the extension on one of this processor's instruction sets."""
    if request.param == "torch":
        return lambda total, rows, mask=None: ops.syrk_(total, rows, mask, backend="torch")
    extension = syrk._extension()
    if extension is None or request.param not in extension.isas:
        pytest.skip("fastedit._C is not built" if extension is None else f"this processor has no {request.param}")
    return lambda total, rows, mask=None: syrk._cpp(total, rows, mask, request.param)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("T", "d"), [(1, 1), (7, 3), (129, 129), (1025, 507), (2049, 52), (3, 1100)])
def test_sum(add: Add, dtype: torch.dtype, T: int, d: int, rng: torch.Generator) -> None:
    rows, total = torch.randn(T, d, generator=rng).to(dtype), blank(d)
    add(total, rows)
    check(total, rows)
    add(total, rows[: T // 2])
    check(total, torch.cat([rows, rows[: T // 2]]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mask_leaves_out_rows_whatever_they_hold(add: Add, dtype: torch.dtype, rng: torch.Generator) -> None:
    rows, keep = torch.randn(507, 129, generator=rng).to(dtype), torch.rand(507, generator=rng) < 0.4
    junk = torch.where(keep[:, None], rows, torch.nan)
    total, gathered = blank(129), blank(129)
    add(total, junk, keep)
    add(gathered, rows[keep])
    assert total.tril().equal(gathered.tril())
    check(total, rows[keep])


def test_no_rows(add: Add) -> None:
    total = blank(7)
    add(total, torch.empty(0, 7))
    add(total, torch.full((3, 7), torch.nan), torch.zeros(3, dtype=torch.bool))
    assert not total.tril().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_rows(add: Add, dtype: torch.dtype, rng: torch.Generator) -> None:
    wide = torch.randn(258, 300, generator=rng).to(dtype)
    for rows in (wide[::2, 7:84], wide.T[3:80, ::3], wide[0].expand(9, 300), wide[:, ::2][:, :77]):
        total = blank(rows.shape[1])
        add(total, rows)
        check(total, rows)


def test_denormals(add: Add, rng: torch.Generator) -> None:
    """The smallest fp16 numbers are numbers: their products are far from underflow in fp32."""
    rows = (torch.randint(-9, 10, (64, 33), generator=rng) * 2.0**-24).half()
    total = blank(33)
    add(total, rows)
    check(total, rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1.01 * syrk.LARGEST_VALUE])
def test_bad_value_is_named_and_nothing_added(add: Add, dtype: torch.dtype, value: float) -> None:
    rows, total = torch.ones(1100, 52, dtype=dtype), blank(52)
    rows[1090, 50] = value
    with pytest.raises(ModelError, match=r"rows\[1090\] holds NaN, infinity or a magnitude above 1.4e\+17"):
        add(total, rows)
    with pytest.raises(ModelError, match=r"rows\[1090\]"):
        add(total, rows, torch.arange(1100) % 10 == 0)
    assert not total.tril().any()


@pytest.mark.parametrize(
    ("total", "rows", "mask", "message"),
    [
        (blank(3), torch.ones(2, 3, dtype=torch.int64), None, r"rows are \[2, 3\] int64, expected \[T, d\] of float32"),
        (blank(3), torch.ones(3), None, r"rows are \[3\] float32"),
        (blank(3), torch.ones(2, 4), None, r"total is \[3, 3\] float64, expected \[4, 4\] float64, contiguous"),
        (blank(3).float(), torch.ones(2, 3), None, r"total is \[3, 3\] float32, expected"),
        (blank(3).T, torch.ones(2, 3), None, "contiguous"),
        (blank(3), torch.ones(2, 3), torch.ones(2), r"mask is \[2\] float32, expected \[2\] bool"),
        (blank(3), torch.ones(2, 3), torch.ones(3).bool(), r"mask is \[3\] bool, expected \[2\] bool"),
        (blank(3).to("meta"), torch.ones(2, 3), None, "total is on meta, the rows on cpu"),
    ],
)
def test_bad_input(total: Tensor, rows: Tensor, mask: Tensor | None, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        ops.syrk_(total, rows, mask)


def test_long_sums_keep_what_fp32_loses(add: Add, rng: torch.Generator) -> None:
    """200,000 rows, some columns with a mean of 100 σ: fp32 totals drift, these do not."""
    d, parts = 24, 50
    shift = torch.zeros(d).index_fill_(0, torch.arange(0, d, 3), 100)
    total, plain, wanted = blank(d), torch.zeros(d, d), torch.zeros(d, d, dtype=torch.float64)
    for _ in range(parts):
        rows = torch.randn(4000, d, generator=rng) + shift
        add(total, rows)
        plain.addmm_(rows.T, rows)
        wanted.addmm_(rows.double().T, rows.double())
    norms = wanted.diagonal().sqrt()

    def error(x: Tensor) -> float:
        return float(((x - wanted).tril().abs() / norms / norms[:, None]).max())

    assert error(total) < 5e-8 < error(plain.double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_and_masks_do_not_change_a_bit(dtype: torch.dtype, rng: torch.Generator) -> None:
    if syrk._extension() is None:
        pytest.skip("fastedit._C is not built")
    rows, keep = torch.randn(3000, 507, generator=rng).to(dtype), torch.rand(3000, generator=rng) < 0.7
    first = blank(507)
    syrk._cpp(first, rows[keep], None)
    try:
        for threads in (2, 3, 8):
            torch.set_num_threads(threads)
            total = blank(507)
            ops.syrk_(total, rows, keep, backend="cpp")
            assert total.tril().equal(first.tril())
    finally:
        torch.set_num_threads(1)


def test_without_the_extension_torch_serves_and_one_warning_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastedit._C", None)
    monkeypatch.delenv("FASTEDIT_REQUIRE_EXT", raising=False)
    syrk._extension.cache_clear()
    try:
        total, rows = blank(7), torch.ones(5, 7)
        with pytest.warns(UserWarning, match=r"fastedit\._C cannot be used .* install a C\+\+20 compiler"):
            ops.syrk_(total, rows)
        check(total, rows)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ops.syrk_(total, rows)
        with pytest.raises(ConfigError, match=r"backend='cpp': the extension fastedit\._C is not built"):
            ops.syrk_(total, rows, backend="cpp")
        monkeypatch.setenv("FASTEDIT_REQUIRE_EXT", "1")
        syrk._extension.cache_clear()
        with pytest.raises(ConfigError, match=r"fastedit\._C cannot be used"):
            ops.syrk_(total, rows)
    finally:
        monkeypatch.undo()
        syrk._extension.cache_clear()


@pytest.mark.skipif(os.environ.get("FASTEDIT_REQUIRE_EXT") != "1", reason="FASTEDIT_REQUIRE_EXT=1 asks for it")
def test_the_extension_is_there_and_serves() -> None:
    assert choose("syrk_", device=torch.device("cpu"), dtype=torch.bfloat16, T=4096, d=3072) == "cpp"


def test_threads_race_nowhere(tmp_path: Path) -> None:
    """Under ThreadSanitizer and UBSan, of every instruction set of this processor."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    here, program = Path(__file__), tmp_path / "syrk_threads"
    # the check of vptr (there are none here) asks a pipe whether memory can be read, and that races itself at times
    sanitizers = ["-fsanitize=thread,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=all"]
    sources = [here.with_name("syrk_threads.cpp"), *(here.parents[2] / "csrc").glob("syrk_cpu*.cpp")]
    command = [compiler, "-std=c++20", "-O2", "-g", "-pthread", *sanitizers, *sources, "-o", program]
    built = subprocess.run(command, capture_output=True, text=True)
    if (built.returncode and "sanitize" in built.stderr + built.stdout) or "tsan" in built.stderr:
        pytest.skip(f"{compiler} has no sanitizers: {built.stderr.splitlines()[-1]}")
    assert built.returncode == 0, built.stderr
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip() == "clean"
