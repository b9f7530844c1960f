"""Collect the fact world's own statistics: `python -m fastedit.demo.statistics --output DIR`.

The text is the documents that the model was trained on, joined as in training, but in another order.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastedit.demo import World, checkpoint_path
from fastedit.models import Model
from fastedit.statistics.collect import collect
from fastedit.statistics.store import statistics_path


def documents(seed: int) -> Iterator[str]:
    """Yield endless training documents about all people, without EOS at the end."""
    for spans in World().documents(seed, curriculum=False):
        yield " ".join(span.text for span in spans)


def main(model: Path, output: Path, layers: list[int] | None, tokens: int, seed: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    parts = Model.of(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), tokenizer)
    wanted = layers or list(range(parts.topology.n_blocks))
    moments = collect(parts, documents(seed), wanted, max_tokens=tokens)
    for layer, moment in moments.items():
        path = statistics_path(parts.topology, output, layer)
        moment.save(path, dtype=torch.float32)
        print(f"{path}: {moment.count} tokens, {path.stat().st_size} bytes")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=checkpoint_path())
    parser.add_argument("--layers", type=int, nargs="+", help="by default all")
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=100)
    main(**vars(parser.parse_args()))
