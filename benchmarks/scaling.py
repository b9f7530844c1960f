"""How cost grows: measured exponents beside the expected ones.

    python benchmarks/scaling.py

Exponents are least-squares slopes of the medians in log-log, with their standard errors.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

if not __package__:  # run as a file; imports are from the root
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
import fastedit.demo
from benchmarks import kernels
from benchmarks.harness import Case, Suite, measured
from benchmarks.rows import Row, latest, make_row
from fastedit import Editor

# mode of a row -> (what grows, expected exponent)
EXPECTED = {
    "LocFT-BF, an epoch": ("edits", "1"),
    "MEMIT": ("edits", "1"),
    "rank-k update, d wide": ("N", "0 (reading L) to 1 (d²N)"),
    "rank-k update, N edits": ("d", "2"),
    "localized Adam, T rows": ("d", "2"),
    "cross-entropy": ("vocabulary", "1"),
}
SIZES = {
    "cuda": {"N": (8, 16, 32, 64, 128), "d": (1024, 2048, 4096, 8192), "vocabulary": (16_032, 32_064, 64_128, 128_256)},
    "cpu": {"N": (8, 16, 32, 64, 128), "d": (512, 1024, 2048, 4096), "vocabulary": (6_288, 12_576, 25_152, 50_304)},
}
EDITS = (100, 200, 400, 800)


@dataclass(frozen=True)
class Fit:
    """A fit of cost ∝ x^exponent for x from `low` to `high`."""

    exponent: float
    error: float
    low: float
    high: float


def fits(rows: Iterable[Row]) -> dict[str, Fit]:
    """Fit each mode of `scaling` rows that has three sizes or more; shapes end in "=SIZE"."""
    points: dict[str, list[tuple[float, float]]] = {}
    for row in latest(rows):
        if row.benchmark == "scaling" and row.provider == "ours":
            points.setdefault(row.mode, []).append((float(row.shape.rpartition("=")[2]), row.p50))
    found = {}
    for mode, pairs in points.items():
        if len(pairs) >= 3:
            x, y = np.log(np.array(sorted(pairs))).T
            (slope, level), spread = np.polyfit(x, y, 1), x - x.mean()
            error = float(np.sqrt(((y - slope * x - level) ** 2).sum() / (len(x) - 2) / (spread**2).sum()))
            found[mode] = Fit(float(slope), error, *np.exp([x[0], x[-1]]).round().tolist())
    return found


def cases(device: torch.device) -> list[Case]:
    """Cases of ours alone, at sizes that double."""
    sizes, gpu = SIZES[device.type], device.type == "cuda"
    width, T, adam_dtype = 4096 if gpu else 1024, 512 if gpu else 64, "bfloat16" if gpu else "float32"
    rows, h, entropy_dtype = (512, 4096, "bfloat16") if gpu else (64, 256, "float32")

    def alone(case: Case, mode: str, x: int) -> Case:
        return replace(
            case,
            benchmark="scaling",
            mode=mode,
            shape=f"{EXPECTED[mode][0]}={x}",
            providers={"ours": case.providers["ours"]},
        )

    found = []
    for x in sizes["N"]:
        case = kernels.solve_case(device, 1, x, width, width, "update")
        found.append(alone(case, "rank-k update, d wide", x))
    for x in sizes["d"]:
        case = kernels.solve_case(device, 1, 32, x, x, "update")
        found.append(alone(case, "rank-k update, N edits", x))
    for x in sizes["d"]:
        case = kernels.adam_case(device, x, x, T, adam_dtype, "float32")
        found.append(alone(case, "localized Adam, T rows", x))
    for x in sizes["vocabulary"]:
        case = kernels.cross_entropy_case(device, rows, h, x, entropy_dtype)
        found.append(alone(case, "cross-entropy", x))
    return found


def edits(suite: Suite, counts: Sequence[int], repeats: int = 3) -> list[Row]:
    """Time one epoch of LocFT-BF on the fact world, including the prefix cache."""
    requests = fastedit.demo.World().requests(max(counts))
    path, mode = fastedit.demo.checkpoint_path(), "LocFT-BF, an epoch"
    config = {"published": True, "batch_size": 50, "epochs": 1, "stop_loss": 0.0}
    editor = Editor.from_pretrained(path, dtype="float32", device=suite.device, **config)
    editor.edit(requests[:50]).revert()
    print(f"\nscaling {mode}", flush=True)
    rows = []
    for n in counts:
        samples, peaks = [], []
        for _ in range(repeats):
            with measured(suite.device) as run:
                result = editor.edit(requests[:n])
            result.revert()
            samples.append(run.seconds)
            peaks.append(run.peak_memory)
        row = make_row(
            "scaling", "ours", samples, mode=mode, shape=f"edits={n}", dtype="float32", device=suite.device,
            peak_memory=peaks[0],
        )  # fmt: skip
        rows.append(suite.record(row, row.shape))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--budget", type=float, default=0.5, help="seconds of timing for each size")
    parser.add_argument("--edits", type=int, nargs="*", default=EDITS)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    suite = Suite.of(args)
    rows = [row for case in cases(torch.device(args.device)) for row in suite.run(case).values()]
    rows += edits(suite, args.edits) if args.edits else []
    print()
    for mode, fit in fits(rows).items():
        variable, expected = EXPECTED[mode]
        print(f"{mode}: {variable}^{fit.exponent:.2f} ± {fit.error:.2f}, expected {expected}")
    suite.close()


if __name__ == "__main__":
    main()
