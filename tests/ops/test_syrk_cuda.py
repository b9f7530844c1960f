"""The CUDA kernels of syrk_: on a GPU where there is one, and on the CPU, a fiber a thread (cuda_on_cpu/)."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from sums import DTYPES, blank, check
from torch import Tensor

from fastedit.ops import syrk
from fastedit.ops.registry import Call

ROOT = Path(__file__).parents[2]
Add = Callable[..., None]  # (total, rows, mask=None)


def no_gpu() -> str | None:
    """Why the CUDA kernels cannot run here."""
    return syrk._no_cuda(Call(torch.device("cuda"), torch.bfloat16, {}))


@pytest.fixture(scope="session")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """csrc/syrk_cuda.cu as C++, beside headers that stand for CUDA's and for its instructions."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder, library = tmp_path_factory.mktemp("cuda_on_cpu"), "libsyrk.so"
    for source in ("csrc", "tests/ops/cuda_on_cpu"):  # the second has another ptx.cuh and ptx_sm90.cuh
        shutil.copytree(ROOT / source, folder, dirs_exist_ok=True)
    options = ["-std=c++20", "-O2", "-U_FORTIFY_SOURCE", "-shared", "-fPIC", "-I", ".", "-x", "c++"]
    built = subprocess.run([compiler, *options, "syrk.cpp", "-o", library], cwd=folder, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return ctypes.CDLL(str(folder / library))


def add_on_cpu(
    library: ctypes.CDLL, seed: int, wgmma: bool, total: Tensor, rows: Tensor, mask: Tensor | None, splits: int = 1
) -> None:
    """Scratch and what pads the rows are NaN; 4 clusters, so that some take several tiles."""
    T, d = rows.shape
    padded = -(-d // 8) * 8
    wide = rows.new_full((T, padded), torch.nan)
    wide[:, :d] = rows
    planes = torch.full((3, T, padded), torch.nan, dtype=torch.bfloat16 if rows.dtype == torch.float32 else rows.dtype)
    kept, parts = torch.full((T + 1,), -1, dtype=torch.int32), torch.full((splits, d, d), torch.nan)

    def address(x: Tensor | None) -> ctypes.c_void_p:
        return ctypes.c_void_p(x.data_ptr() if x is not None else None)

    size = ctypes.c_int64
    library.syrk(
        address(total), address(wide), DTYPES.index(rows.dtype), size(d), size(padded), address(mask), size(T),
        address(kept), address(planes), size(padded), ctypes.c_bool(wgmma), address(parts), splits, 8, seed,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("instruction", ["mma", "wgmma"])
@pytest.mark.parametrize(("T", "d"), [(1, 1), (7, 3), (129, 129), (321, 200), (90, 460)])
def test_on_cpu(
    on_cpu: ctypes.CDLL, instruction: str, dtype: torch.dtype, T: int, d: int, rng: torch.Generator, seed: int
) -> None:
    rows, keep = torch.randn(T, d, generator=rng).to(dtype), torch.rand(T, generator=rng) < 0.6
    total, masked = blank(d), blank(d)
    add_on_cpu(on_cpu, seed, instruction == "wgmma", total, rows, None)
    check(total, rows, cut_off=1)
    add_on_cpu(on_cpu, seed + 1, instruction == "wgmma", total, rows[: T // 2 + 1], None)
    check(total, torch.cat([rows, rows[: T // 2 + 1]]), cut_off=1)
    add_on_cpu(on_cpu, seed, instruction == "wgmma", masked, torch.where(keep[:, None], rows, torch.nan), keep)
    check(masked, rows[keep], cut_off=1)


@pytest.mark.parametrize("instruction", ["mma", "wgmma"])
def test_more_tiles_than_are_taken_together_on_cpu(
    on_cpu: ctypes.CDLL, instruction: str, rng: torch.Generator, seed: int
) -> None:
    rows, total = torch.randn(9, 1300, generator=rng).bfloat16(), blank(1300)
    add_on_cpu(on_cpu, seed, instruction == "wgmma", total, rows, None)
    check(total, rows, cut_off=1)


@pytest.mark.parametrize("splits", [2, 3])
def test_split_rows_on_cpu(on_cpu: ctypes.CDLL, splits: int, rng: torch.Generator, seed: int) -> None:
    """With so few rows that count that a part has none; the order of threads changes no bit."""
    rows, keep = torch.randn(700, 300, generator=rng).bfloat16(), torch.rand(700, generator=rng) < 0.6
    for mask in (None, keep, keep & (torch.arange(700) < 99)):
        total, again = blank(300), blank(300)
        add_on_cpu(on_cpu, seed, True, total, rows, mask, splits)
        add_on_cpu(on_cpu, seed + 1, True, again, rows, mask, splits)
        check(total, rows if mask is None else rows[mask], cut_off=1)
        assert total.equal(again)


@pytest.mark.parametrize("instruction", ["mma", "wgmma"])
def test_truncated_sums_are_promoted_on_cpu(
    on_cpu: ctypes.CDLL, instruction: str, rng: torch.Generator, seed: int
) -> None:
    """More rows than one launch sums, all of one sign: what tensor cores cut off would add up to 1e-5."""
    rows = (1 + torch.rand(8300, 5, generator=rng)).bfloat16()
    total, wanted = blank(5), rows.double().T @ rows.double()
    add_on_cpu(on_cpu, seed, instruction == "wgmma", total, rows, None)
    assert ((total - wanted).tril().abs() / wanted).max() < 6e-7


@pytest.mark.parametrize("instruction", ["mma", "wgmma"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)  # fp16 ends below
def test_the_largest_rows_on_cpu(on_cpu: ctypes.CDLL, dtype: torch.dtype, instruction: str, seed: int) -> None:
    rows, total = torch.full((8192, 3), syrk.LARGEST_VALUE).to(dtype), blank(3)
    add_on_cpu(on_cpu, seed, instruction == "wgmma", total, rows, None)
    check(total, rows, cut_off=1)


def test_what_a_kernel_is_given_lies_on_16_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A single row, too, which torch calls contiguous whatever its stride."""
    given: list[dict[str, int]] = []
    called = SimpleNamespace(syrk_cuda=lambda **named: given.append(named), syrk_cuda_splits=lambda *_: 1)
    monkeypatch.setattr(syrk, "_extension", lambda: called)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=0))
    wide = torch.randn(5, 505).bfloat16()
    for rows in (wide[:1, :504], wide[:, :504], wide[1:2, 1:], wide[:1, :501], wide[:, 1:9].T):
        syrk._cuda(blank(rows.shape[1]), rows, None, "wgmma")
        assert given[-1]["stride"] % 8 == 0


@pytest.mark.skipif(no_gpu() is not None, reason=f"CUDA kernels: {no_gpu()}")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("instruction", ["mma", "wgmma", "torch"])
@pytest.mark.parametrize(("T", "d"), [(1, 1), (1, 504), (7, 3), (129, 129), (2049, 507), (9000, 1160)])
def test_cuda(instruction: str, dtype: torch.dtype, T: int, d: int, rng: torch.Generator) -> None:
    if instruction == "wgmma" and not syrk._has_wgmma(torch.device("cuda")):
        pytest.skip("wgmma: the GPU is not sm_90, or the extension was built without 90a")

    def add(total: Tensor, rows: Tensor, mask: Tensor | None = None) -> None:
        if instruction == "torch":
            syrk._torch(total, rows, mask)
        else:
            syrk._cuda(total, rows, mask, instruction)

    # tensor cores cut off the sum of 16 rows and what was summed before; our kernels promote it
    cut_off = syrk.GPU_CHUNK // 16 if instruction == "torch" and dtype != torch.float32 else 1
    rows, keep = torch.randn(T, d + 1, generator=rng).to(dtype), torch.rand(T, generator=rng) < 0.6
    junk = torch.where(keep[:, None], rows, torch.nan).cuda()
    for columns in (slice(d), slice(1, d + 1)):  # rows that begin on 16 bytes or do not
        total, masked, again = (blank(d).cuda() for _ in range(3))
        add(total, rows.cuda()[:, columns])
        check(total.cpu(), rows[:, columns], cut_off)
        add(masked, junk[:, columns], keep.cuda())
        add(again, junk[:, columns], keep.cuda())
        check(masked.cpu(), rows[keep, columns], cut_off)
        assert masked.tril().equal(again.tril())


@pytest.mark.skipif(no_gpu() is not None, reason=f"CUDA kernels: {no_gpu()}")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_cuda_under_the_sanitizer(tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
    if sanitizer is None:
        pytest.skip("no compute-sanitizer")
    # torch makes calls that may fail; whether racecheck knows the barriers of copies between blocks is not documented
    options = ["--report-api-errors", "no", "--error-exitcode", "9"]
    tests = [
        "-m",
        "pytest",
        "-q",
        __file__,
        "-k",
        "test_cuda and 129-129 and mma" + " and not wgmma" * (tool == "racecheck"),
    ]
    done = subprocess.run([sanitizer, "--tool", tool, *options, sys.executable, *tests], capture_output=True, text=True)
    if "Device not supported" in done.stdout:
        pytest.skip(f"compute-sanitizer: {done.stdout.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


@pytest.fixture
def cuobjdump() -> Callable[..., list[str]]:
    """Lines of what the tool that triton ships says of the extension."""
    tool = Path(pytest.importorskip("triton").__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    extension = syrk._extension()
    if extension is None or not extension.cuda_architectures or not tool.exists():
        pytest.skip("fastedit._C is not built, or without nvcc, or triton has no cuobjdump")

    def run(*options: str) -> list[str]:
        command = [tool, *options, extension.__file__]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()

    return run


def test_no_cuda_kernel_spills(cuobjdump: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    """Of every architecture in the binary; prints the table."""
    rows, architecture = [], ""
    for line in cuobjdump("-res-usage"):
        if found := re.match(r"arch = (\S+)", line):
            architecture = found[1]
        elif found := re.match(r" Function \S*\d([a-z_]+_kernel)", line):
            kernel = found[1]
        elif found := re.match(r"  REG:(\d+) STACK:(\d+) .* LOCAL:(\d+)", line):
            rows.append((architecture, kernel, *map(int, found.groups())))
    with capsys.disabled():
        print(
            "\n"
            + "\n".join(f"{arch:8s}{kernel:18s} registers {n:3d} stack {s} local {m}" for arch, kernel, n, s, m in rows)
        )
    wanted = {f"sm_{name.removesuffix('+PTX')}" for name in syrk._extension().cuda_architectures.split()}
    assert {row[0] for row in rows} == wanted
    assert all(stack == local == 0 for *_, stack, local in rows)


def test_wgmma_runs_on_until_it_is_waited_for(cuobjdump: Callable[..., list[str]]) -> None:
    """ptxas serializes products where it cannot see that their sums are left alone: a wait after each."""
    if "90a" not in syrk._extension().cuda_architectures:
        pytest.skip("fastedit._C was built without 90a")
    code = "\n".join(cuobjdump("-sass", "-arch", "sm_90a"))
    kernels = re.findall(r"Function : \S*syrk_wgmma_kernel.*?(?=Function :|\Z)", code, re.DOTALL)
    assert len(kernels) == 2  # of fp16 and bf16
    for kernel in kernels:
        assert kernel.count("HGMMA.64x192x16") == 8  # of a stage, twice: 128 rows between two waits
        assert kernel.count("WARPGROUP.DEPBAR") == 2
        assert kernel.count("MEMBAR.ALL.GPU") == 2  # of the cluster's first and last meeting, and none of a stage
