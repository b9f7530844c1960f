"""ROME, MEMIT and EMMET over batch sizes on the fact world (the comparison of arXiv 2403.14236, section 5).

    python benchmarks/emmet_vs_memit.py --picture emmet_vs_memit.png

Every batch edits the unedited model; a row is the mean over its batches. ES, PS and NS are CounterFact's, score their
harmonic mean; reliability is by greedy generation. ROME has no batches: it takes a batch's edits one after the other.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

if not __package__:  # run as a file; imports are from the root
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
import fastedit.demo
from benchmarks.rows import append, make_row
from fastedit import Editor, EditRequest

# (method, distribution) -> how tables call it
VARIANTS = {
    ("rome", "single"): "ROME",
    ("memit", "single"): "MEMIT, one layer",
    ("emmet", "single"): "EMMET, one layer",
    ("memit", "spread"): "MEMIT, spread",
    ("emmet", "spread"): "EMMET, spread",
}
MEASURES = ("es", "ps", "ns", "score", "reliability", "perplexity")
BATCHES = {1: 64, 4: 16, 16: 8, 64: 4, 256: 2, 1024: 1}  # size -> batches


def measured(report: dict[str, Any]) -> dict[str, float]:
    found = {name: report[name] for name in MEASURES if name != "reliability"}
    return found | {"reliability": report["reliability"]["generated"]}


def run(editor: Editor, batches: Sequence[Sequence[EditRequest]], text: Sequence[str]) -> dict[str, float]:
    rows = []
    for batch in batches:
        result = editor.edit(batch)
        rows.append(measured(editor.evaluate(batch, text=text).to_dict()))
        result.revert()
    return {name: statistics.fmean(row[name] for row in rows) for name in MEASURES}


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(14, 3.2), constrained_layout=True)
    for axis, name in zip(axes, ("es", "ps", "ns", "perplexity"), strict=True):
        for label in dict.fromkeys(row["method"] for row in rows):
            points = [(row["batch"], row[name]) for row in rows if row["method"] == label]
            axis.plot(*zip(*points, strict=True), marker="o", label=label)
        axis.set_xscale("log", base=4)
        axis.set_xlabel("batch size")
        axis.set_title(name.upper() if len(name) == 2 else name)
    axes[-1].set_yscale("log")
    axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--batches", type=int, help="batches of each size, at most")
    parser.add_argument("--rome-up-to", type=int, default=64)
    parser.add_argument("--model", type=Path, default=fastedit.demo.checkpoint_path())
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--layers", type=int, nargs="+")
    parser.add_argument("--cov-weight", type=float)
    parser.add_argument("--alpha", type=float)
    args = parser.parse_args()
    world = fastedit.demo.World()
    batches = {size: min(BATCHES.get(size, 1), args.batches or 1024) for size in args.batch_sizes}
    most = max(size * n for size, n in batches.items())
    requests, text = world.requests(most), world.prose(100)
    table = Table("method", "batch", "batches", "ES", "PS", "NS", "score", "reliability", "perplexity")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as targets:  # one search serves all variants of a batch
        for (method, distribution), label in VARIANTS.items():
            for size in args.batch_sizes:
                if method == "rome" and size > args.rome_up_to:
                    continue
                config: dict[str, Any] = {"distribution": distribution, "targets": targets}
                config |= {"cov_weight": args.cov_weight, "alpha": args.alpha if method == "emmet" else None}
                if args.layers:
                    config["layers"] = tuple(args.layers) if distribution == "spread" else (args.layers[-1],)
                editor = Editor.from_pretrained(args.model, method, dtype="float32", **config)
                n = batches[size]
                found = run(editor, [requests[i * size : (i + 1) * size] for i in range(n)], text)
                rows.append({"method": label, "batch": size, "batches": n, **found})
                shares = (f"{found[name]:.1%}" for name in MEASURES[:-1])
                table.add_row(label, str(size), str(n), *shares, f"{found['perplexity']:.2f}")
                print(rows[-1], flush=True)
                for name, value in found.items():
                    shape = f"{n} × {size} edit{'s' * (size > 1)}"
                    append(
                        make_row("emmet_vs_memit", "ours", [value], mode=label, shape=shape, dtype="float32", unit=name)
                    )
    Console(width=110).print(table)
    if args.picture:
        draw(rows, args.picture)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
