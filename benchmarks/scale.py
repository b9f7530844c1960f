"""Cost and memory for a thousand to a hundred thousand edits: read, plan, edit, measure a sample, save.

    python -m benchmarks.scale [--edits 1000 10000 100000] [--epochs 2] [--requests FILE ... --model DIR]

Each size runs in its own process. Without arguments the model is the fact world's, with one fact about each of many new
people, so that none contradicts another. From given files it takes the first edits with different prompts. The prefix
cache is always a file. Memory is the process's anonymous pages beyond those with the model loaded. Pages of the
cache file do not count, because the system takes them back when it needs them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch

if not __package__:  # run as a file; imports are from the root
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
from benchmarks.rows import append, make_row
from fastedit import Editor, load_requests
from fastedit.demo import checkpoint_path, lexicon
from fastedit.demo.lexicon import RELATIONS
from fastedit.progress import StageClock, no_progress

MOST = 1.15
"""Limit on the cost of an edit at the largest size, divided by that at the smallest."""


def facts(n: int, seed: int = 0) -> Iterator[dict[str, str]]:
    """One fact about each of `n` people whom the fact world does not know."""
    rng = random.Random(seed)
    relations = [relation for relation in RELATIONS.values() if relation.subjects is None]
    places = [f"{a} and {b}" for a, b in product(lexicon.VILLAGES, repeat=2) if a != b]
    people = [*product(lexicon.GIVEN, lexicon.FAMILY, places)]
    for given, family, place in rng.sample(people, n):
        subject, relation = f"{given} {family} of {place}", rng.choice(relations)
        prompt = rng.choice(relation.trained).format(s=subject)
        yield {"prompt": prompt, "target": rng.choice(relation.objects), "subject": subject}


class Memory:
    """The peak anonymous memory of this process since `start`, sampled twenty times a second."""

    def __init__(self) -> None:
        self.base = self.peak = _anonymous()
        threading.Thread(target=self._look, daemon=True).start()

    def start(self) -> None:
        self.base = self.peak = _anonymous()

    def _look(self) -> None:
        while True:
            self.peak = max(self.peak, _anonymous())
            time.sleep(0.05)


def _anonymous() -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        return int(re.search(r"RssAnon:\s+(\d+) kB", file.read())[1]) * 1024


def one(args: argparse.Namespace, requests: Path) -> None:
    """Make the edits of a file in this process, and append their rows."""
    torch.set_num_threads(args.threads)
    memory, clock = Memory(), StageClock(no_progress)
    options: dict[str, Any] = {"epochs": args.epochs, "batch_size": args.batch_size}
    options |= {"stop_loss": 0.0, "skip_loss": 0.0, "cache_bytes": 0}
    options |= {"layer": tuple(args.layers)} if args.layers else {}
    options |= {"module": args.module} if args.module else {}
    options |= {"lr": args.lr, "lr_schedule": args.lr_schedule}
    editor = Editor.from_pretrained(args.model, dtype="float32", device="cpu", published=True, **options)
    memory.start()
    started = time.perf_counter()
    with clock.stage("read"):
        edits = load_requests(requests)
    result = editor.edit(edits)
    with clock.stage("evaluate"):
        report = editor.evaluate(edits, sample=args.sample).metrics
    with clock.stage("save"):
        result.delta.save(requests.with_suffix(".safetensors"))
    whole, peak, n = time.perf_counter() - started, memory.peak - memory.base, len(edits)
    stages, generated = clock.seconds | result.stages, report["reliability"]["generated"]
    learned = 1 - len(result.unlearned) / n
    parts = ", ".join(f"{name} {taken:.1f}" for name, taken in stages.items())
    print(f"{n} edits: {whole:.1f} s, {whole / n * 1e3:.3g} ms an edit; {peak / 2**20:.0f} MiB; {parts}")
    print(f"  learned after each epoch: {', '.join(f'{count / n:.1%}' for count in result.learned)}")
    print(f"  loss {result.losses[-1]:.3g}, learned {learned:.2%}, generated {generated:.2%}; {report}")
    texts = ", ".join(path.stem for path in args.requests) or "fact world"
    where = "" if args.layers is None else f", {args.module or 'down_proj'} in {args.layers} of {Path(args.model).name}"
    rate = "" if args.lr is None else f", rate {args.lr:g}"
    falls = ", falling rate" if args.lr_schedule == "linear" else ""
    shape = f"{n} edits ({texts}), {args.epochs} epochs{rate}{falls}{where}"
    about = {"mode": "LocFT-BF", "shape": shape, "dtype": "float32"}
    append(make_row("scale", "ours", [whole], peak_memory=peak, **about))
    shares = {name: stages[name] for name in ("prefix", "train", "evaluate")}
    shares["train"] += stages.get("epoch", 0.0)  # time within long epochs
    shares["read, plan, save"] = stages["read"] + stages["plan"] + stages["save"]
    for unit, value in shares.items():
        append(make_row("scale", "ours", [value / whole], unit=unit, **about))
    for unit, value in (("learned", learned), ("generated", generated)):
        append(make_row("scale", "ours", [value], unit=unit, **about))
    with (requests.parent / "costs").open("a", encoding="ascii") as file:
        file.write(f"{whole / n}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edits", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--model", default=checkpoint_path())
    parser.add_argument("--requests", type=Path, nargs="+", default=[], help="files of edits")
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--layers", type=int, nargs="+")
    parser.add_argument("--module")
    parser.add_argument("--lr", type=float, help="Adam's learning rate; without it, that of the published recipe")
    parser.add_argument("--lr-schedule", choices=("constant", "linear"), default="constant")
    parser.add_argument("--sample", type=int, default=200, help="edits that are measured")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        one(args, args.one)
        return
    with tempfile.TemporaryDirectory(prefix="fastedit-scale-") as name:
        for n in args.edits:
            path = Path(name) / f"{n}.jsonl"
            records = _first(args.requests, n) if args.requests else facts(n)
            path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
            command = [sys.executable, "-m", "benchmarks.scale", *sys.argv[1:], "--one", str(path)]
            subprocess.run(command, check=True)
        costs = [float(line) for line in (Path(name) / "costs").read_text("ascii").split()]
    rise = costs[-1] / costs[0]
    print(f"cost of an edit, largest size over smallest: {rise:.2f}")
    if rise > MOST:
        sys.exit(f"an edit costs {rise:.2f} times as much at {args.edits[-1]} edits, more than {MOST}")


def _first(paths: Sequence[Path], n: int) -> list[dict[str, Any]]:
    """The first `n` edits with different prompts of the files in order, with one paraphrase and one neighbour each."""
    found: dict[str, dict[str, Any]] = {}
    for request in (request for path in paths for request in load_requests(path, skip_bad=True)):
        kept = {"prompt": request.prompt, "target": request.target, "subject": request.subject}
        found.setdefault(
            request.prompt, kept | {"paraphrases": request.paraphrases[:1], "neighbours": request.neighbours[:1]}
        )
    if len(found) < n:
        sys.exit(f"{', '.join(map(str, paths))} have {len(found)} edits with different prompts, fewer than {n}")
    return [*found.values()][:n]


if __name__ == "__main__":
    main()
