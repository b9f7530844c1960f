"""Breadth-first against depth-first on the fact world: the gap that LocFT-BF's paper reports (arXiv 2509.22072).

    python benchmarks/schedules.py

Edits, module, learning rate and stop loss are the same; only schedule and batch size differ. Breadth-first trains on
all edits until their mean loss is below `stop_loss`; depth-first trains each batch until its own loss is, and does not
return to it.
"""

from __future__ import annotations

import argparse
import os
import sys

from rich.console import Console
from rich.table import Table

if not __package__:  # run as a file; imports are from the root
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
import fastedit.demo
from benchmarks.rows import append, make_row
from fastedit import Editor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=500)
    parser.add_argument("--lr", type=float, help="the same for all; default: what locft-bf chooses")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 100])
    parser.add_argument("--epochs", type=int, default=200, help="at most, so that every run converges")
    args = parser.parse_args()
    world = fastedit.demo.World()
    requests, text = world.requests(args.n), world.prose(200)
    table = Table("schedule", "batch", "reliability", "generalization", "locality", "perplexity", "seconds", "loss")
    for schedule in ("breadth-first", "depth-first"):
        for batch_size in args.batch_sizes:
            editor = Editor.from_pretrained(
                fastedit.demo.checkpoint_path(),
                dtype="float32",
                published=True,
                schedule=schedule,
                batch_size=batch_size,
                lr=args.lr,
                epochs=args.epochs,
            )
            result = editor.edit(requests)
            report = editor.evaluate(requests, text=text).to_dict()
            measures = {name: report[name]["generated"] for name in ("reliability", "generalization", "locality")}
            shares = [f"{share:.1%}" for share in measures.values()]
            measures |= {"perplexity": report["perplexity"], "s": result.seconds}
            for unit, value in measures.items():
                shape = f"{len(requests)} edits, batch {batch_size}"
                append(make_row("schedules", "ours", [value], mode=schedule, shape=shape, dtype="float32", unit=unit))
            perplexity = f"{report['before']['perplexity']:.2f} → {report['perplexity']:.2f}"
            table.add_row(
                schedule, str(batch_size), *shares, perplexity, f"{result.seconds:.0f}", f"{result.losses[-1]:.3f}"
            )
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
