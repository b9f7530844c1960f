"""MEMIT: ours against the published procedure, with the same edits, contexts, statistics and settings, in one run.

    python benchmarks/locate_then_edit.py

First the solve alone, then the whole edit against the published one, then how ours grows with the number of edits. The
model is a Llama with random weights and random second moments: speed does not depend on what it knows.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaForCausalLM

if not __package__:  # run as a file; imports are from the root
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
import fastedit.demo
from benchmarks import published_memit
from benchmarks.harness import Run, Suite, measured
from benchmarks.models import SIZES, load_tokenizer, random_llama, random_statistics
from benchmarks.rows import make_row
from fastedit import Editor, EditRequest, load_requests, ops

LAYERS = (3, 4, 5, 6)
CONTEXTS = ["The river was cold that year. {}", "Therefore we went home. {}", "Because of that, nothing changed. {}"]
CONTEXTS += ["I was in the city for a week. {}", "You can see it from the road. {}"]


MOST = {"solve": 1e-8, "edit": 1e-2}
"""Largest relative difference of the updates: of an fp64 solve, and of an fp32 edit, which may stop a step later."""


def seconds_of(function: Callable[[], object], repeats: int, device: torch.device) -> list[float]:
    found = []
    for _ in range(repeats):
        with measured(device) as run:
            function()
        found.append(run.seconds)
    return found


def solve_alone(suite: Suite, d: int, n: int, cov_weight: float = 15_000.0) -> None:
    """Time one layer's update with a given factor of C: an N×N system against the published d×d system."""
    rows = torch.randn(2 * d, d, dtype=torch.float64, device=suite.device)
    C = rows.T @ rows / len(rows)
    K, R = torch.randn(2, n, d, dtype=torch.float64, device=suite.device)
    L = ops.factor_covariance(C)

    def published() -> Tensor:
        return R.T @ torch.linalg.solve(cov_weight * C + K.T @ K, K.T).T

    def ours() -> tuple[Tensor, Tensor]:
        return ops.rank_k_update(K, R, L, ridge=cov_weight)

    with measured(suite.device) as our_run:
        left, right = ours()
    with measured(suite.device) as their_run:
        direct = published()
    error = float((left @ right - direct).norm() / direct.norm())
    print(f"solve alone, d = {d}, N = {n}, relative difference {error:.1e}")
    if not error <= MOST["solve"]:
        suite.fail(f"the solves differ by {error:.1e} > {MOST['solve']:.0e}")
        return
    case = {"mode": "solve alone", "shape": f"d={d}, N={n}", "dtype": "float64", "device": suite.device}
    medians = {}
    for provider, function, run, repeats in (("published", published, their_run, 3), ("ours", ours, our_run, 9)):
        samples = seconds_of(function, repeats, suite.device)
        row = make_row("rank_k_against_direct", provider, samples, peak_memory=run.peak_memory, **case)
        medians[provider] = suite.record(row).p50
    suite.record(make_row("rank_k_against_direct", "ours", [error], unit="difference", **case))
    print(f"ratio {medians['published'] / medians['ours']:.1f}", flush=True)


@dataclass(frozen=True)
class Comparison:
    """The same edits by ours and by the published procedure.

    Attributes:
        requests: requests; each run edits the first ones.
        theirs: a copy of `model`.
        covariances: second moments of the layers; `statistics` is the folder with the same.
        settings: settings of both.
    """

    suite: Suite
    model: LlamaForCausalLM
    theirs: LlamaForCausalLM
    tokenizer: Any
    requests: Sequence[EditRequest]
    covariances: Sequence[Tensor]
    statistics: str
    settings: dict[str, Any]

    def edit(self, n: int, targets: Path | None = None) -> tuple[Run, float, dict[str, Tensor]]:
        """Edit by ours and revert; returns time and memory, the learning rate, and the updates."""
        editor = Editor(
            self.model,
            self.tokenizer,
            "memit",
            layers=LAYERS,
            cov_weight=1000.0,
            name_weight=0.0,
            contexts=tuple(CONTEXTS),
            statistics=self.statistics,
            targets=targets and str(targets),
            **self.settings,
        )
        with measured(self.suite.device) as run:
            result = editor.edit(self.requests[:n])
        updates = {path: update.dense() for path, update in result.delta.updates.items()}
        lr = result.delta.metadata["config"]["lr"]
        result.revert()
        return run, lr, updates

    def compare(self, n: int) -> tuple[float, Run, Run]:
        """The largest relative difference of a layer's update, and time and memory of theirs and ours."""
        targets = Path(self.statistics) / "targets"
        self.edit(2)  # factors C, so that both have it ready
        our_run, lr, updates = self.edit(n, targets)
        (file,) = targets.iterdir()
        ours = load_file(file)
        now = dict(self.theirs.named_parameters())
        before = {path: now[path].detach().clone() for path in updates}
        triples = [(r.prompt, str(r.subject), r.target) for r in self.requests[:n]]
        about = {"cov_weight": 1000.0, "lr": lr, **self.settings}
        with measured(self.suite.device) as their_run:
            z, taken = published_memit.memit(
                self.theirs, self.tokenizer, triples, CONTEXTS, LAYERS, self.covariances, **about
            )
        difference = max(
            float((now[path].detach() - before[path] - update).norm() / update.norm())
            for path, update in updates.items()
        )
        alike = (torch.cosine_similarity(z.cpu(), ours["z"]) >= 0.999).double().mean()
        same = (torch.tensor(taken) == ours["steps"]).double().mean()
        print(f"published: {sum(taken) / len(taken):.1f} updates an edit")
        print(f"targets with cosine of at least 0.999: {alike:.1%}, with the same number of updates: {same:.1%}")
        print(f"largest |dW - dW_published| / |dW_published| of a layer  {difference:.1e}")
        return difference, their_run, our_run


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=Path)
    parser.add_argument("--tokenizer", type=Path, default=fastedit.demo.checkpoint_path())
    parser.add_argument("--n", type=int, default=64, help="edits of the comparison")
    parser.add_argument("--scaling", type=int, nargs="*", default=[16, 64, 256], help="edits of ours alone")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--solve", type=int, default=4096, help="width of the solve alone; 0 for none")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    suite = Suite.of(args)
    if args.solve:
        solve_alone(suite, args.solve, 32)

    most = max([args.n, *args.scaling])
    requests = load_requests(args.requests) if args.requests else fastedit.demo.World().requests(most)
    requests = [r for r in requests if r.subject and r.subject in r.prompt][:most]
    model = random_llama(args.size, args.device)
    settings = {"steps": args.steps, "weight_decay": 1e-3, "clamp": 4.0, "kl_factor": 0.0625, "stop_loss": 0.05}
    case = {"mode": "MEMIT", "dtype": "float32", "device": args.device}

    with tempfile.TemporaryDirectory() as folder:
        covariances, theirs = random_statistics(model, Path(folder), LAYERS), copy.deepcopy(model)
        tokenizer = load_tokenizer(args.tokenizer)
        both = Comparison(suite, model, theirs, tokenizer, requests, covariances, folder, settings)
        n = len(requests[: args.n])
        print(f"\n{n} edits, layers {LAYERS}, {args.steps} steps, fp32", flush=True)
        difference, their_run, our_run = both.compare(n)
        if difference <= MOST["edit"]:
            shape = f"{n} edits, {args.size} Llama, {len(LAYERS)} layers, {args.steps} steps"
            for provider, run in (("published", their_run), ("ours", our_run)):
                suite.record(
                    make_row("memit", provider, [run.seconds], shape=shape, peak_memory=run.peak_memory, **case)
                )
            suite.record(make_row("memit", "ours", [difference], shape=shape, unit="difference", **case))
            print(f"ratio {their_run.seconds / our_run.seconds:.2f}", flush=True)
            for n in args.scaling:
                run, shape = both.edit(n)[0], f"edits={len(requests[:n])}"
                row = make_row("scaling", "ours", [run.seconds], shape=shape, peak_memory=run.peak_memory, **case)
                suite.record(row, shape)
        else:
            suite.fail(f"the updates differ by {difference:.1e} > {MOST['edit']:.0e}")
    suite.close()


if __name__ == "__main__":
    main()
