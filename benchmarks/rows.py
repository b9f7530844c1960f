"""The results file: one row per measurement, appended; if a key has several rows, the last one counts."""

from __future__ import annotations

import csv
import io
import os
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from functools import cache
from pathlib import Path

import numpy as np
import torch

from fastedit.version import version_of

ROOT = Path(__file__).parents[1]
FILE = Path(__file__).with_name("results") / "results.csv"
VARIABLE = "FASTEDIT_RESULTS"
"""Environment variable with another results file; empty for none."""


@dataclass(frozen=True)
class Row:
    """A measurement. Fields that were not measured are None, an empty cell in the file.

    Attributes:
        benchmark: the file's subject, such as "localized_adam".
        provider: "ours", "published" (the papers' procedure) or "torch" (what a user would write), with a variant
            after a comma.
        mode: the part of the benchmark, such as "adam".
        shape: sizes as tables print them.
        dtype: of the data.
        device: the processor, with its instruction set and the threads that were used.
        unit: unit of p20, p50 and p80: "s", or the name of a quality measure.
        p20, p50, p80: quantiles over repetitions; only p50 for a single one.
        peak_memory: peak bytes beyond those of the inputs.
        floor_share: the time for bytes and flops at the ceilings measured in this run, divided by p50.
        bytes, flops: the least that must be moved and computed.
        version: versions of fastedit, torch, transformers and triton.
        commit: the commit, with "-dirty" if files of the repository differ from it.
        date: UTC.
        gpu: its SM clock, power and temperature while it was measured, such as "1980 MHz, 512 W, 61 °C"; may be empty.
    """

    benchmark: str
    provider: str
    mode: str
    shape: str
    dtype: str
    device: str
    unit: str
    p20: float | None
    p50: float | None
    p80: float | None
    peak_memory: int | None
    floor_share: float | None
    bytes: float | None
    flops: float | None
    version: str
    commit: str
    date: str
    gpu: str = ""

    @property
    def key(self) -> tuple[str, ...]:
        """The fields in which two measurements of the same thing agree."""
        return self.benchmark, self.provider, self.mode, self.shape, self.dtype, self.device, self.unit


COLUMNS = tuple(f.name for f in fields(Row))
_NUMBERS = ("p20", "p50", "p80", "peak_memory", "floor_share", "bytes", "flops")


def make_row(
    benchmark: str,
    provider: str,
    samples: Sequence[float],
    *,
    mode: str = "",
    shape: str = "",
    dtype: str = "",
    device: torch.device | str = "cpu",
    unit: str = "s",
    peak_memory: int | None = None,
    floor_share: float | None = None,
    bytes: float | None = None,
    flops: float | None = None,
    gpu: str = "",
) -> Row:
    """Make a row with the current time, commit and machine."""
    p20, p50, p80 = (float(f"{q:.4g}") for q in np.quantile(samples, (0.2, 0.5, 0.8)))
    spread = (p20, p80) if len(samples) > 1 else (None, None)
    return Row(
        benchmark, provider, mode, shape, dtype, device_name(torch.device(device)), unit, spread[0], p50, spread[1],
        peak_memory, floor_share and float(f"{floor_share:.3g}"), bytes, flops, versions(), commit(),
        datetime.now(timezone.utc).isoformat(timespec="seconds"), gpu,
    )  # fmt: skip


def append(row: Row, path: Path | None = None) -> None:
    """Append a row to the file in one write, so that a run can be stopped after any row."""
    path = path or results_file()
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    with open(path, "a+b") as file:
        if file.tell() == 0:
            writer.writeheader()
        else:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # the last line is incomplete, or lacks its newline
                text.write("\n")
        writer.writerow({name: "" if x is None else x for name, x in asdict(row).items()})
        os.write(file.fileno(), text.getvalue().encode())


def read(path: Path | None = None) -> list[Row]:
    """All rows in the order in which they were written; [] if there is no file.

    Raises:
        ValueError: a line is not a row; names the line.
    """
    path = path or results_file()
    if path is None or not path.exists():
        return []
    rows = []
    with open(path, newline="", encoding="utf-8") as file:
        for cells in (reader := csv.DictReader(file)):
            try:
                cells["gpu"] = cells.get("gpu") or ""  # older rows end with the date
                if tuple(cells) != COLUMNS or None in cells.values():
                    raise ValueError(f"it has not the columns {', '.join(COLUMNS)}")
                datetime.fromisoformat(cells["date"])  # a line that was cut off ends in it
                numbers = {name: float(cells[name]) if cells[name] else None for name in _NUMBERS}
                if numbers["peak_memory"] is not None:
                    numbers["peak_memory"] = int(numbers["peak_memory"])
            except ValueError as error:
                raise ValueError(f"{path}, line {reader.line_num} is no row of results: {error}") from None
            rows.append(Row(**cells | numbers))
    return rows


def latest(rows: Iterable[Row]) -> list[Row]:
    """The last row of each key, in the order in which the keys first appear."""
    return list({row.key: row for row in rows}.values())


def results_file() -> Path | None:
    wanted = os.environ.get(VARIABLE)
    return FILE if wanted is None else Path(wanted) if wanted else None


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{_processor()}, {torch.backends.cpu.get_cpu_capability()}, {threads} thread{'s' * (threads > 1)}"


def gpu_state(device: torch.device) -> str:
    """SM clock, power and temperature of a GPU now, as `Row.gpu` has them; "" if nvidia-smi cannot tell."""
    fields, units = "clocks.sm,power.draw,temperature.gpu", ("MHz", "W", "°C")
    command = ["nvidia-smi", f"--id=GPU-{torch.cuda.get_device_properties(device).uuid}", f"--query-gpu={fields}"]
    try:
        done = subprocess.run([*command, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=5)
        values = [f"{float(value):.0f}" for value in done.stdout.split(",")]
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return ""
    return ", ".join(f"{value} {unit}" for value, unit in zip(values, units, strict=True))


@cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        import platform

        return platform.processor() or platform.machine()


@cache
def versions() -> str:
    packages = ("fastedit", "torch", "transformers", "triton")
    return ", ".join(f"{package} {version_of(package, 'none')}" for package in packages)


@cache
def commit() -> str:
    """FASTEDIT_COMMIT if set, for copies without .git, else git's. Files that benchmarks write do not make it dirty."""
    if found := os.environ.get("FASTEDIT_COMMIT"):
        return found

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        written = (":!benchmarks/results", ":!README.md", ":!benchmarks/README.md")
        changed = git("status", "--porcelain", "--", ".", *written)
        return git("rev-parse", "--short=7", "HEAD") + "-dirty" * bool(changed)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
