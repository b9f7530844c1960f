"""ROME, MEMIT and EMMET over batch sizes on the fact world (the comparison of arXiv 2403.14236, section 5).

    python benchmarks/emmet_vs_memit.py && python -m benchmarks.plot

Every batch edits the unedited model; a row is the mean over batches. ES, PS and NS are CounterFact's measures, score is
their harmonic mean; reliability is by greedy generation. ROME makes the edits of a batch one after the other.
"""

from __future__ import annotations

import argparse
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
from fastedit.evaluation.predict import predict
from fastedit.evaluation.report import compare

# name -> method, distribution, name in tables
VARIANTS = {
    "rome": ("rome", "single", "ROME"),
    "memit": ("memit", "single", "MEMIT, one layer"),
    "emmet": ("emmet", "single", "EMMET, one layer"),
    "memit-spread": ("memit", "spread", "MEMIT, spread"),
    "emmet-spread": ("emmet", "spread", "EMMET, spread"),
}
MEASURES = ("es", "ps", "ns", "score", "reliability", "perplexity")
BATCHES = {1: 64, 4: 16, 16: 8, 64: 4, 256: 2, 1024: 1}  # size -> batches


def measured(editor: Editor, batch: Sequence[EditRequest], text: Sequence[str]) -> dict[str, float]:
    """Edit with one batch, return MEASURES, and revert the edit."""
    before = predict(editor.parts, batch, kinds=("neighbour",))
    result = editor.edit(batch)
    report = compare(batch, predict(editor.parts, batch, text=text), before).to_dict()
    result.revert()
    report["reliability"] = report["reliability"]["generated"]
    return {name: report[name] for name in MEASURES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--batches", type=int, help="batches of each size, at most")
    parser.add_argument("--model", type=Path, default=fastedit.demo.checkpoint_path())
    parser.add_argument("--layers", type=int, nargs="+")
    parser.add_argument("--cov-weight", type=float)
    parser.add_argument("--alpha", type=float)
    args = parser.parse_args()
    world = fastedit.demo.World()
    batches = {size: min(BATCHES.get(size, 1), args.batches or 1024) for size in args.batch_sizes}
    most = max(size * n for size, n in batches.items())
    requests, text = world.requests(most), world.prose(100)
    table = Table("method", "batch", "batches", "ES", "PS", "NS", "score", "reliability", "perplexity")
    with tempfile.TemporaryDirectory() as targets:  # targets are found once for all variants of a batch
        for variant in args.variants:
            method, distribution, label = VARIANTS[variant]
            config: dict[str, Any] = {"distribution": distribution, "targets": targets, "name_weight": 0.0}
            config |= {"cov_weight": args.cov_weight, "alpha": args.alpha if method == "emmet" else None}
            if args.layers:
                config["layers"] = tuple(args.layers) if distribution == "spread" else (args.layers[-1],)
            editor = Editor.from_pretrained(args.model, method, dtype="float32", **config)
            for size, n in batches.items():
                runs = [measured(editor, requests[i * size : (i + 1) * size], text) for i in range(n)]
                means = {name: statistics.fmean(run[name] for run in runs) for name in MEASURES}
                shares = [f"{means[name]:.1%}" for name in MEASURES[:-1]]
                table.add_row(label, str(size), str(n), *shares, f"{means['perplexity']:.2f}")
                print(f"{label}, {n} batches of {size}:", *shares, f"{means['perplexity']:.2f}", flush=True)
                for unit, value in means.items():
                    shape = f"{n} × {size} edit{'s' * (size > 1)}"
                    append(
                        make_row("emmet_vs_memit", "ours", [value], mode=label, shape=shape, dtype="float32", unit=unit)
                    )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
