"""Claims of the benchmarks: nothing wrong is timed, rows survive, and tables say what the results file says."""

from __future__ import annotations

import random
import runpy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import compare, end_to_end, kernels, rows, scaling, shapes, tables
from benchmarks.harness import Case, Suite, measured
from benchmarks.micro.cases import all_cases
from fastedit import ops

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "results.csv"
    monkeypatch.setenv(rows.VARIABLE, str(path))
    monkeypatch.setenv("FASTEDIT_COMMIT", "abc1234")
    return path


def made(provider: str = "ours", samples: tuple[float, ...] = (1.0, 2.0, 3.0), **about: Any) -> rows.Row:
    return rows.make_row(about.pop("benchmark", "memit"), provider, list(samples), **{"shape": "n=1", **about})


def product(**providers: Callable[..., Any]) -> Case:
    """a @ b of fresh matrices; the baseline is right."""

    def setup() -> tuple[Tensor, Tensor]:
        return torch.randn(40, 30), torch.randn(30, 50)

    return Case(
        "product",
        setup,
        lambda a, b: (a.double() @ b.double(),),
        providers | {"torch": lambda a, b: (a @ b,)},
        tolerance=1e-5,
        bytes=2e6,
        flops=1e6,
    )


@pytest.fixture
def suite(seed: int) -> Suite:
    torch.manual_seed(seed)
    found = Suite("cpu", budget=0.01)
    found.__dict__["ceilings"] = {"copy": 1e9, "float32": 1e12, "float64": 1e12, "bfloat16": 1e12}
    return found


def test_what_is_right_is_timed_and_kept_with_its_share_of_the_floor(suite: Suite, file: Path) -> None:
    found = suite.run(product(ours=lambda a, b: ((b.T @ a.T).T,)))
    suite.close()
    assert list(found) == ["ours", "torch"]
    for row in rows.read(file):
        assert row == found[row.provider]
        assert row.p20 <= row.p50 <= row.p80
        assert row.floor_share == pytest.approx(2e6 / 1e9 / row.p50, rel=1e-2)
        assert (row.commit, row.unit, row.device) == ("abc1234", "s", rows.device_name(torch.device("cpu")))


def spoiled(a: Tensor, b: Tensor) -> tuple[Tensor]:
    product = a @ b
    product[3, 4] = torch.nan
    return (product,)


def broken(a: Tensor, b: Tensor) -> tuple[Tensor]:
    raise RuntimeError("no such thing")


@pytest.mark.parametrize("wrong", [lambda a, b: (a @ b * 1.001,), spoiled, broken], ids=["off", "nan", "raises"])
def test_nothing_is_timed_where_a_provider_is_wrong(
    wrong: Callable[..., Any], suite: Suite, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert suite.run(product(ours=wrong)) == {}
    printed = capsys.readouterr().out
    assert "RED" in printed
    assert " s " not in printed
    assert rows.read(file) == []
    with pytest.raises(SystemExit, match=r"product.*ours"):
        suite.close()


def test_a_provider_that_works_in_place_does_not_spoil_the_inputs_of_the_next(suite: Suite) -> None:
    def in_place(a: Tensor, b: Tensor) -> tuple[Tensor]:
        out = a @ b
        a.zero_()
        return (out,)

    assert suite.run(product(ours=in_place)).keys() == {"ours", "torch"}


def test_a_provider_without_memory_for_it_is_left_out(suite: Suite, capsys: pytest.CaptureFixture[str]) -> None:
    def large(a: Tensor, b: Tensor) -> tuple[Tensor]:
        raise torch.OutOfMemoryError("19 GiB wanted")

    assert suite.run(product(ours=large)).keys() == {"torch"}
    suite.close()
    assert "not measured: 19 GiB wanted" in capsys.readouterr().out


def test_peak_memory_is_what_was_held_at_once() -> None:
    with measured("cpu") as run:
        for _ in range(2):
            torch.ones(16 << 20)  # 64 MiB, freed before the next
    if run.peak_memory is None:
        pytest.skip("this system does not forget peaks")
    assert run.peak_memory == pytest.approx(64 << 20, rel=0.1)


def test_rows_survive_a_run_that_was_cut_short_and_the_last_of_a_key_counts(file: Path) -> None:
    first, other, again = made(peak_memory=5), made("published", (7.0,)), made(samples=(4.0, 5.0, 6.0))
    for row in (first, other):
        rows.append(row)
    file.write_bytes(file.read_bytes().removesuffix(b"\n"))
    rows.append(again)
    assert rows.read(file) == [first, other, again]
    assert rows.latest(rows.read(file)) == [again, other]
    assert (other.p20, other.p50, other.p80, other.peak_memory) == (None, 7.0, None, None)


def test_rows_from_before_the_gpus_state_was_noted(file: Path) -> None:
    rows.append(made())
    lines = file.read_text().splitlines()
    file.write_text(
        "\n".join([lines[0].removesuffix(",gpu"), *(line.removesuffix(",") for line in lines[1:] * 2)]) + "\n"
    )
    old = rows.read(file)
    file.write_text("\n".join([lines[0], *(line.removesuffix(",") for line in lines[1:])]) + "\n")
    rows.append(replace(made(), gpu="1980 MHz, 512 W, 61 °C"))
    assert rows.read(file)[0] == old[0] == old[1]
    assert rows.read(file)[1].gpu == "1980 MHz, 512 W, 61 °C"


@pytest.mark.parametrize(
    "spoil", [lambda line: line.rsplit(",", 3)[0], lambda line: line[:-9], lambda line: line.replace("2.0", "fast")]
)
def test_a_line_that_is_no_row_is_named(spoil: Callable[[str], str], file: Path) -> None:
    rows.append(made())
    rows.append(made())
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:2], spoil(lines[2])]) + "\n")
    with pytest.raises(ValueError, match=r"results\.csv, line 3"):
        rows.read(file)


def test_tables_are_made_between_their_marks_and_nothing_else_changes() -> None:
    text = "before\n<!-- results:locate_then_edit -->\nstale\n<!-- /results -->\nafter\n"
    about = {"mode": "MEMIT", "shape": "64 edits"}
    found = [made("published", (12.0,), peak_memory=3 << 20, **about), made("ours", (3.0,), **about)]
    table = tables.render(text, found)
    assert table.startswith("before\n<!-- results:locate_then_edit -->\n")
    assert table.endswith("\n<!-- /results -->\nafter\n")
    assert "| MEMIT | 64 edits | 12 s | 3 s | **4.00** | 3 MiB | not measured | not measured |" in table
    assert "stale" not in table
    assert "`abc1234`" in table
    assert "GPU: not measured." in table
    assert tables.render(table, found) == table
    with pytest.raises(ValueError, match="results:nothing"):
        tables.render(text.replace("locate_then_edit", "nothing"), [])


def test_tables_show_what_is_slower_and_what_is_missing() -> None:
    about = {"benchmark": "target_cross_entropy", "shape": "8 rows"}
    found = [made("ours", (0.4,), **about), made("torch, chunked", (0.3,), **about)]
    shown = "\n".join(tables.TABLES["kernels"](found))
    assert "| 400 ms | not measured | not measured | torch, chunked: 0.75 (slower)" in shown
    assert "rank-k solve" in shown.partition("GPU:")[2]
    on_gpu = [replace(row, device="NVIDIA H200") for row in found[1:]]
    assert "NVIDIA H200" in "\n".join(tables.TABLES["kernels"](found + on_gpu))
    for name, draw in tables.TABLES.items():
        assert "not measured" in "\n".join(draw([])), name


def test_the_headlines_are_the_latest_comparisons_of_each_device() -> None:
    what, benchmark, mode, (size, other, *_) = tables.HEADLINES[0]
    about = {"benchmark": benchmark, "mode": mode, "shape": size}
    old, ours, theirs = (
        made(samples=(1.0,), **about),
        made(samples=(3.0,), **about),
        made("published", (12.0,), **about),
    )
    alone = replace(ours, device="one, 1 thread", p50=5.0)  # ours alone: no ratio
    unpaired = replace(ours, shape=other)
    shown = tables.render("<!-- results:headline -->\n<!-- /results -->\n", [old, ours, theirs, alone, unpaired])
    assert f"| published → ours | size | {ours.device} | one, 1 thread | GPU |" in shown
    assert f"| {what} | {size} | 12 s → 3 s, **4.00×** | not measured → 5 s | not measured |" in shown
    assert other not in shown
    gpu = [replace(row, device="NVIDIA H200", shape=other) for row in (ours, theirs)]
    shown = "\n".join(tables.headline([ours, theirs, *gpu]))
    assert f"| {what} | {other} | not measured | 12 s → 3 s, **4.00×** |" in shown
    assert "| GPU |" not in shown


def test_what_is_protected_is_of_the_device_that_last_measured_it() -> None:
    case = {"benchmark": "real_models", "shape": "100 edits (counterfact), smollm2", "unit": "s"}
    old, new = (
        replace(made(samples=(n,), **case), mode="LocFT-BF", device=f"cpu {n}", date=f"2026-01-0{n}") for n in (1, 2)
    )
    other = replace(new, mode="MEMIT", device="cpu 3", date="2026-01-03")
    shown = "\n".join(tables.TABLES["protected"]([new, old, other]))
    assert "| smollm2 | 100 | default |" in shown
    assert "cpu 2" in shown
    assert "cpu 1" not in shown
    assert "cpu 3" not in shown


def test_the_headlines_are_comparisons_that_the_results_file_has() -> None:
    for what, _, pairs in tables.headlines(rows.latest(rows.read(rows.FILE))):
        assert pairs, what


@pytest.mark.parametrize("path", tables.FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_readmes_show_what_the_results_file_holds(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert "<!-- results:" in text
    assert tables.render(text, rows.read(rows.FILE)) == text, "python -m benchmarks.tables"


def test_every_table_stands_in_a_readme() -> None:
    texts = [path.read_text(encoding="utf-8") for path in tables.FILES]
    for name in tables.TABLES:
        assert sum(f"<!-- results:{name} -->" in text for text in texts) == 1, name


@pytest.mark.parametrize(
    ("samples", "word", "code"),
    [((3.5, 4.0, 4.5), "slower", 1), ((0.1, 0.2, 0.3), "faster", 0), ((2.0, 2.5, 3.0), "within noise", 0)],
)
def test_compare_flags_what_is_beyond_the_noise(
    samples: tuple[float, ...], word: str, code: int, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows.append(made())
    rows.append(replace(made(samples=samples), commit="def5678"))
    rows.append(replace(made("torch", (9.0, 9.1)), commit="def5678"))
    with pytest.raises(SystemExit) as ended:
        compare.main(["abc1234", "def5678"])
    printed = capsys.readouterr().out
    assert ended.value.code == code
    assert word in printed
    assert f"{samples[1] / 2:.2f}" in printed
    assert "1 times compared" in printed
    with pytest.raises(SystemExit) as ended:
        compare.main([str(file), "ghi9012"])
    assert ended.value.code == 2
    assert "ghi9012" in capsys.readouterr().err


def test_a_slower_baseline_is_no_regression_of_ours(file: Path) -> None:
    rows.append(made("torch", (1.0, 1.1)))
    rows.append(replace(made("torch", (5.0, 5.1)), commit="def5678"))
    with pytest.raises(SystemExit) as ended:
        compare.main(["abc1234", "def5678"])
    assert ended.value.code == 0


def test_fits_find_the_exponent_of_a_power_law(seed: int) -> None:
    rng = random.Random(seed)
    exponent, mode = rng.uniform(0.5, 3), "cross-entropy"
    points = [
        made(benchmark="scaling", mode=mode, shape=f"vocabulary={x}", samples=(0.1 * x**exponent,))
        for x in rng.sample(range(10, 5000), 5)
    ]
    fit = scaling.fits(points)[mode]
    assert fit.exponent == pytest.approx(exponent, abs=1e-2)
    assert fit.error < 1e-2
    assert scaling.fits(points[:2]) == {}


def test_every_operation_has_a_microbenchmark_beside_torch() -> None:
    found = all_cases()
    assert {*found} == {*ops.__all__} - {"DependentKeysError", "LocalizedAdam", "logits_buffer"}
    assert all({"ours"} < {*case.providers} for cases in found.values() for case in cases)


CPU = torch.device("cpu")
KERNELS: dict[str, Callable[[], Case]] = {
    "adam": lambda: kernels.adam_case(CPU, 48, 32, 20, "float32", "float32"),
    "adam, bf16": lambda: kernels.adam_case(CPU, 48, 32, 20, "bfloat16", "float32"),
    "adam, bf16 moments": lambda: kernels.adam_case(CPU, 48, 32, 20, "bfloat16", "bfloat16"),
    "solve, kernel alone": lambda: kernels.solve_case(CPU, 2, 16, 32, 48, "solve"),
    "solve, update": lambda: kernels.solve_case(CPU, 2, 16, 32, 48, "update"),
    "cross-entropy": lambda: kernels.cross_entropy_case(CPU, 8, 32, 100, "float32"),
    "norm": lambda: kernels.block_case(CPU, "rms_norm", 8, 100, "float32"),
    "norm, bf16": lambda: kernels.block_case(CPU, "rms_norm", 8, 100, "bfloat16"),
    "gated activation": lambda: kernels.block_case(CPU, "gated_activation", 8, 100, "float32"),
}


@pytest.mark.parametrize("case", KERNELS.values(), ids=KERNELS)
def test_every_way_of_a_kernel_s_benchmark_is_right(case: Callable[[], Case], suite: Suite) -> None:
    """The cases that a GPU times at full size are right at a small one, with the kernel in the interpreter."""
    found = case()
    assert suite.run(found).keys() == found.providers.keys(), suite.red
    assert {name.partition(",")[0] for name in found.providers} == {"ours", "torch"}


TOY = "--size toy --n 12 --batch 5 --epochs 2 --published 7 --solver-n 2 3 --solver-published 2 --steps 2 --threads 1"


def test_the_shapes_are_measured_whole_and_once(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Suite, "ceilings", {"bfloat16": 1e15})
    monkeypatch.setattr("sys.argv", ["end_to_end", *TOY.split()])
    end_to_end.main()
    found = rows.read(file)
    of_time = [(row.mode, row.shape.split()[0], row.provider, row.dtype) for row in found if row.unit == "s"]
    assert of_time == [
        ("LocFT-BF", "12", "ours", "bfloat16"),
        ("LocFT-BF", "7", "ours", "bfloat16"),
        ("LocFT-BF", "7", "published, bf16", "bfloat16"),
        ("LocFT-BF", "7", "torch, LLaMA-Factory's way", "bfloat16"),
        ("LocFT-BF", "7", "published, fp32", "float32"),
        *(
            (mode, n, by, "bfloat16")
            for mode in ("MEMIT", "EMMET")
            for n, by in (("2", "ours"), ("3", "ours"), ("2", "published, bf16"))
        ),
    ]
    assert 0 < found[2].floor_share < 1
    assert found[2].flops == pytest.approx(found[2].floor_share * 1e15 * found[2].p50, rel=1e-2)
    shares: dict[tuple[str, str], list[float]] = {}
    for row in found:
        if row.unit not in ("s", "edits/s", "edits/s without the prefix"):
            shares.setdefault((row.mode, row.shape), []).append(row.p50)
    assert len(shares) == 5
    for some in shares.values():
        assert all(0 <= share <= 1 for share in some)
        assert sum(some) == pytest.approx(1, abs=1e-3)

    capsys.readouterr()
    monkeypatch.setattr(shapes, "random_model", None)  # the second run does not even make the model
    shapes.main(TOY.split())
    printed = capsys.readouterr().out
    assert printed.count("already measured") == len(of_time) + 1
    assert rows.read(file) == found
    monkeypatch.setenv("FASTEDIT_COMMIT", "def5678")
    rows.commit.cache_clear()
    shapes.main([*TOY.split(), "--budget", "0"])
    rows.commit.cache_clear()
    assert capsys.readouterr().out.count("not measured, 0 s are over") == len(of_time) + 1
    assert rows.read(file) == found


def test_benchmarks_run_as_modules_and_as_files(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, ROOT / "benchmarks" / "schedules.py", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    monkeypatch.setattr("sys.argv", ["benchmarks.schedules", "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("benchmarks.schedules", run_name="__main__")
    assert stopped.value.code == 0
    for printed in (done.stdout, capsys.readouterr().out):
        assert "--batch-sizes" in printed
