"""LocFT-BF: ours against the published loop, with the same edits, seed and order, in one run.

    python benchmarks/locft_bf.py --requests zsre.json --tokenizer DIR --rounds 3

Prints the medians of rounds that take turns, their ratio and the relative difference of the two updates. Without
arguments the requests are the fact world's. The model is a Llama with random weights: speed does not depend on what it
knows.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

if not __package__:  # run as a file; imports are from the root
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
import fastedit.demo
from benchmarks import published
from benchmarks.harness import Run, Suite, measured
from benchmarks.models import SIZES, load_tokenizer, random_llama
from benchmarks.rows import make_row
from fastedit import Editor, load_requests

MOST = 1e-3
"""Largest relative difference of the two updates in fp32."""


def order(n: int, batch: int, epochs: int, seed: int) -> Iterator[Tensor]:
    """The batches that `Editor(seed=seed)` uses."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        yield from torch.randperm(n, generator=generator).split(batch)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=Path)
    parser.add_argument("--tokenizer", type=Path, default=fastedit.demo.checkpoint_path())
    parser.add_argument("--n", type=int, default=300)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--layer", type=int, default=11)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    suite = Suite.of(args)
    tokenizer = load_tokenizer(args.tokenizer)
    requests = load_requests(args.requests) if args.requests else fastedit.demo.World().requests(args.n)
    requests = requests[: args.n]
    ours = random_llama(args.size, args.device)
    theirs = copy.deepcopy(ours)
    settings = {"layer": args.layer, "module": "down_proj", "lr": 5e-4, "batch_size": args.batch}
    editor = Editor(ours, tokenizer, seed=0, **settings, epochs=args.epochs, stop_loss=0.0)
    our_weight, their_weight = (model.model.layers[args.layer].mlp.down_proj.weight for model in (ours, theirs))
    before = our_weight.detach().clone()
    editor.edit(requests[: args.batch // 4]).revert()  # warms up for both

    runs: dict[str, list[Run]] = {"published": [], "ours": []}
    for _ in range(args.rounds):
        with measured(args.device) as run:
            result = editor.edit(requests)
        runs["ours"].append(run)
        our_update = our_weight.detach() - before
        result.revert()
        with torch.no_grad():
            their_weight.copy_(before)
        with measured(args.device) as run:
            losses = published.locft_bf(
                theirs,
                tokenizer,
                [(r.prompt, r.target) for r in requests],
                their_weight,
                lr=5e-4,
                batches=order(len(requests), args.batch, args.epochs, seed=0),
            )
        runs["published"].append(run)

    their_update = their_weight.detach() - before
    difference = ((our_update - their_update).norm() / their_update.norm()).item()
    print(f"{len(requests)} edits, batch {args.batch}, {args.epochs} epochs, fp32")
    print(f"|dW - dW_published| / |dW_published|  {difference:.1e}")
    if not difference <= MOST:
        suite.fail(f"the updates differ by {difference:.1e} > {MOST:.0e}")
        suite.close()
    print(f"last batch loss {losses[-1]:.4f} (published), last epoch loss {result.losses[-1]:.4f} (ours)")
    texts = args.requests.stem if args.requests else "fact world"
    case = {
        "mode": "LocFT-BF",
        "shape": f"{len(requests)} edits ({texts}), {args.size} Llama, batch {args.batch}, {args.epochs} epochs",
        "dtype": "float32",
        "device": args.device,
    }
    medians = {}
    for provider, own in runs.items():
        row = make_row("locft_bf", provider, [run.seconds for run in own], peak_memory=own[0].peak_memory, **case)
        medians[provider] = suite.record(row).p50
    suite.record(make_row("locft_bf", "ours", [difference], unit="difference", **case))
    print(f"ratio {medians['published'] / medians['ours']:.2f}")


if __name__ == "__main__":
    main()
