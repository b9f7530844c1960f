"""Draw the results file into benchmarks/results/: the headlines of all devices, and for each device ratios as bars,
scaling as lines, a roofline, and ROME, MEMIT and EMMET over batch sizes.

python -m benchmarks.plot
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np

if not __package__:  # run as a file; imports are from the root
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
from benchmarks.cells import by_case
from benchmarks.rows import FILE, Row, latest, read
from benchmarks.scaling import EXPECTED, fits
from benchmarks.tables import headlines

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def ratios(rows: Sequence[Row]) -> plt.Figure | None:
    """A bar for each baseline: its time over ours, with a range from the p20 and p80 of both."""
    bars = []
    for (benchmark, mode, shape, dtype), found in by_case(rows).items():
        ours = found.get("ours")
        for row in found.values():
            if ours and not row.provider.startswith("ours"):
                low, high = (row.p20 or row.p50) / (ours.p80 or ours.p50), (row.p80 or row.p50) / (ours.p20 or ours.p50)
                name = ", ".join(filter(None, (mode or benchmark, shape, dtype)))
                bars.append((f"{name}\nagainst {row.provider}", row.p50 / ours.p50, low, high))
    if not bars:
        return None
    names, values, low, high = zip(*bars, strict=True)
    figure, axis = plt.subplots(figsize=(9, 1 + 0.45 * len(bars)), constrained_layout=True)
    error = np.abs(np.array([low, high]) - np.array(values))
    colors = ["tab:green" if least > 1 else "tab:red" if most < 1 else "0.7" for _, _, least, most in bars]
    axis.barh(range(len(bars)), np.array(values) - 1, left=1, xerr=error, color=colors, height=0.6, ecolor="0.3")
    axis.set_yticks(range(len(bars)), names, fontsize="x-small")
    axis.invert_yaxis()
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_xscale("log")
    ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if min(*low, 1) / 2 < t < max(*high, 1) * 2]
    axis.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axis.minorticks_off()
    axis.set_xlabel("its time over ours (gray: within the noise)")
    return figure


def headline(rows: Sequence[Row]) -> plt.Figure | None:
    """A bar for each comparison in the main README and each device: the published procedure's time over ours."""
    bars = [
        (f"{what}\n{size}", device, theirs.p50 / ours.p50)
        for what, size, pairs in headlines(rows)
        for device, (theirs, ours) in sorted(pairs.items())
        if theirs
    ]
    if not bars:
        return None
    names = list(dict.fromkeys(name for name, *_ in bars))
    devices = sorted({device for _, device, _ in bars})
    figure, axis = plt.subplots(figsize=(9, 1 + 0.55 * len(names)), constrained_layout=True)
    height = 0.8 / len(devices)
    for i, device in enumerate(devices):
        own = {name: value for name, other, value in bars if other == device}
        places = [names.index(name) + (i - (len(devices) - 1) / 2) * height for name in own]
        drawn = axis.barh(places, [value - 1 for value in own.values()], left=1, height=height, label=device)
        axis.bar_label(drawn, [f"{value:.1f}×" for value in own.values()], padding=3, fontsize="small")
    axis.set_yticks(range(len(names)), names, fontsize="small")
    axis.invert_yaxis()
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_xscale("log")
    low, high = min(value for *_, value in bars), max(value for *_, value in bars)
    axis.set_xlim(0.9 * min(low, 1), 1.5 * high)
    ticks = [t for t in (0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if 0.9 * min(low, 1) < t < 1.5 * high]
    axis.set_xticks(ticks, [f"{t:g}×" for t in ticks])
    axis.minorticks_off()
    axis.set_xlabel("time of the published procedure over ours")
    axis.legend(fontsize="small", loc="lower right")
    return figure


def scaling(rows: Sequence[Row]) -> plt.Figure | None:
    """Seconds against size, with a panel for each mode."""
    points: dict[str, list[Row]] = {}
    for row in rows:
        points.setdefault(row.mode, []).append(row)
    if not points:
        return None
    found = fits(rows)
    columns = min(3, len(points))
    lines = -(-len(points) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(4 * columns, 3 * lines), squeeze=False, constrained_layout=True
    )
    for axis in axes.flat[len(points) :]:
        axis.remove()
    for axis, (mode, own) in zip(axes.flat, points.items(), strict=False):
        x = [float(row.shape.rpartition("=")[2]) for row in own]
        axis.loglog(x, [row.p50 for row in own], marker="o")
        axis.fill_between(x, [row.p20 or row.p50 for row in own], [row.p80 or row.p50 for row in own], alpha=0.2)
        axis.set_xticks(x, [f"{value:g}" for value in x])
        axis.minorticks_off()
        axis.set_xlabel(EXPECTED[mode][0])
        axis.set_ylabel("seconds")
        fit = f"\nexponent {found[mode].exponent:.2f}, expected {EXPECTED[mode][1]}" if mode in found else ""
        axis.set_title(mode + fit, fontsize="small")
    return figure


def roofline(rows: Sequence[Row]) -> plt.Figure | None:
    """Throughput in flops/s against flops/byte, under the ceilings measured on that device."""
    ceilings = {(row.mode, row.dtype): row.p80 or row.p50 for row in rows if row.benchmark == "ceiling"}
    points = [row for row in rows if row.bytes and row.flops and row.benchmark not in ("ceiling", "scaling")]
    if not points or ("copy", "float32") not in ceilings:
        return None
    figure, axis = plt.subplots(figsize=(8, 5), constrained_layout=True)
    x = np.array([row.flops / row.bytes for row in points])
    span = np.geomspace(x.min() / 4, x.max() * 4, 100)
    for (mode, dtype), rate in ceilings.items():
        if mode == "matmul":
            roof = np.minimum(span * ceilings["copy", "float32"], rate)
            axis.loglog(span, roof, linewidth=1, label=f"ceiling {dtype}")
    for i, benchmark in enumerate(dict.fromkeys(row.benchmark for row in points)):
        for ours, marker in ((True, "o"), (False, "x")):
            own = [r for r in points if r.benchmark == benchmark and r.provider.startswith("ours") == ours]
            label = f"{benchmark}, {'ours' if ours else 'others'}"
            intensity, reached = [r.flops / r.bytes for r in own], [r.flops / r.p50 for r in own]
            axis.plot(intensity, reached, marker, color=f"C{i + 3}", linestyle="none", label=label)
    axis.set_xlabel("flops a byte, at the least")
    axis.set_ylabel("flops/s")
    axis.legend(fontsize="x-small")
    return figure


def batch_sizes(rows: Sequence[Row]) -> plt.Figure | None:
    """Measures of emmet_vs_memit against batch size, with a panel for each; shapes are "N × SIZE edits"."""
    points: dict[tuple[str, str], dict[int, float]] = {}
    for row in rows:
        if size := re.fullmatch(r"\d+ × (\d+) edits?", row.shape):
            points.setdefault((row.unit, row.mode), {})[int(size[1])] = row.p50
    if not points:
        return None
    figure, axes = plt.subplots(1, 4, figsize=(14, 3.2), constrained_layout=True)
    for axis, unit in zip(axes, ("es", "ps", "ns", "perplexity"), strict=True):
        for (measure, label), values in points.items():
            if measure == unit:
                axis.plot(*zip(*sorted(values.items()), strict=True), marker="o", markersize=4, label=label)
        axis.set_xscale("log", base=4)
        axis.set_xlabel("batch size")
        axis.set_title(unit.upper() if len(unit) == 2 else unit)
    axes[-1].set_yscale("log")
    axes[0].legend(fontsize="small")
    return figure


def real_models(rows: Sequence[Row]) -> plt.Figure | None:
    """Edits written against neighbours kept: a point for each variant, a panel for each model and number of edits."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows:
        if row.benchmark == "real_models":
            found.setdefault(row.shape, {}).setdefault(row.mode, {})[row.unit] = row.p50
    if not found:
        return None
    figure, axes = plt.subplots(
        1, len(found), figsize=(1 + 4 * len(found), 4), squeeze=False, sharey=True, constrained_layout=True
    )
    names = dict.fromkeys(variant for variants in found.values() for variant in variants)
    points = {name: axes[0][0].plot([], [], "o", color=f"C{i}", label=name)[0] for i, name in enumerate(names)}
    for axis, (shape, variants) in zip(axes[0], found.items(), strict=True):
        for variant, values in variants.items():
            if {"begins", "first token"} <= values.keys():
                color = points[variant].get_color()
                axis.plot(100 * values["begins"], 100 * values["first token"], "o", color=color)
        axis.set(xlim=(-2, 102), ylim=(-2, 102))
        axis.set_title(shape, fontsize="small")
        axis.set_xlabel("edits whose text begins with the answer, %")
    axes[0][0].set_ylabel("neighbours whose first token is kept, %")
    axes[0][0].legend(fontsize="x-small", loc="lower left")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=FILE.parent)
    args = parser.parse_args()
    rows = latest(read())
    args.output.mkdir(parents=True, exist_ok=True)
    if figure := headline(rows):
        figure.savefig(path := args.output / "headline.png", dpi=110)
        print(path)
        plt.close(figure)
    for device in dict.fromkeys(row.device for row in rows):
        own = [row for row in rows if row.device == device]
        times = [row for row in own if row.unit == "s"]
        grown = [row for row in times if row.benchmark == "scaling"]
        compared = [row for row in times if row.benchmark != "scaling"]
        name = re.sub(r"\W+", "-", device).strip("-").lower()
        by_size = [row for row in own if row.benchmark == "emmet_vs_memit"]
        pictures = {
            "ratios": ratios(compared),
            "scaling": scaling(grown),
            "roofline": roofline(own),
            "batch-sizes": batch_sizes(by_size),
            "real-models": real_models(own),
        }
        for kind, figure in pictures.items():
            if figure:
                figure.suptitle(device, fontsize="medium")
                figure.savefig(path := args.output / f"{kind}-{name}.png", dpi=110)
                print(path)
                plt.close(figure)


if __name__ == "__main__":
    main()
