"""Edits/s on random bf16 models of published shapes, for GPUs: ours against the published way and a usual fine-tuning.

    python -m benchmarks.end_to_end --size 8b --device cuda

Rows are appended as they are measured, the most valuable first. What has a row of this commit and device already is
skipped, so that a run that was cut off can be started again. `--size toy` is for the tests.

1. LocFT-BF of `--n` edits: time, speed with and without the prefix, memory, share of the bf16 matrix products' ceiling;
   then where an epoch's time goes.
2. `--published` of these edits: by ours, by the published loop in bf16, as LLaMA-Factory fine-tunes, and by the
   published loop in fp32.
3. MEMIT and EMMET, spread over five layers with random second moments, and the published procedure for a few edits.
   Every target takes all of its steps, because when it is good enough depends on what a model knows.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

if not __package__:  # run as a file; imports are from the root
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
import fastedit.demo
from benchmarks.device_time import GAPS, EpochProfile, training_flops
from benchmarks.end_to_end import CONTEXTS, NAMES, run_published
from benchmarks.harness import Run, Suite, measured
from benchmarks.locft_bf import order
from benchmarks.models import load_tokenizer, random_statistics
from benchmarks.rows import commit, make_row, read
from benchmarks.scale import facts
from fastedit import Editor, EditRequest, load_requests
from fastedit.methods.presets import locate_then_edit_preset, locft_bf_preset
from fastedit.models import topology
from fastedit.requests import as_requests

# vocabulary (None: the tokenizer's), hidden, inner, heads, kv heads and blocks, and what else is published
SHAPES: dict[str, tuple[type[LlamaConfig | Qwen2Config], tuple[int | None, ...], dict[str, float]]] = {
    "8b": (LlamaConfig, (128_256, 4096, 14_336, 32, 8, 32), {"rope_theta": 500_000.0, "rms_norm_eps": 1e-5}),
    "qwen-7b": (Qwen2Config, (152_064, 3584, 18_944, 28, 4, 28), {"rope_theta": 1_000_000.0, "rms_norm_eps": 1e-6}),
    "1b": (LlamaConfig, (128_256, 2048, 8192, 32, 8, 16), {"rope_theta": 500_000.0, "rms_norm_eps": 1e-5}),
    "toy": (LlamaConfig, (None, 64, 128, 4, 2, 6), {}),
}
GOALS = {
    "LocFT-BF": "250 edits/s on an H200, 220 edits/s on an H100",
    "MEMIT": "14 edits/s",
    GAPS: f"{GAPS} of at most 2 %",
}
LR = 5e-4
OURS, BF16, FP32, FACTORY = "ours", "published, bf16", "published, fp32", "torch, LLaMA-Factory's way"


def random_model(size: str, device: torch.device | str, vocabulary: int) -> Any:
    """A model of a published shape with random bf16 weights, which are drawn on the device."""
    kind, (published, hidden, inner, heads, kv_heads, blocks), more = SHAPES[size]
    config = kind(
        vocab_size=published or vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        num_hidden_layers=blocks,
        tie_word_embeddings=False,
        **more,
    )
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def fine_tune(
    model: Any, tokenizer: Any, edits: Sequence[EditRequest], weight: Tensor, batches: Iterator[Tensor]
) -> None:
    """Train `weight` as LLaMA-Factory does: padded to a batch's longest, with the model's own loss and fused AdamW."""
    model.requires_grad_(False)
    weight.requires_grad_(True)
    optimizer = torch.optim.AdamW([weight], lr=LR, weight_decay=0.0, fused=True)
    ids, labels = [], []
    for edit in edits:
        prompt = tokenizer(edit.prompt).input_ids
        target = [*tokenizer(f" {edit.target}", add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        ids.append(torch.tensor(prompt + target))
        labels.append(torch.tensor([-100] * len(prompt) + target))
    for batch in batches:
        chosen = batch.tolist()
        padded = pad_sequence([ids[i] for i in chosen], batch_first=True, padding_value=tokenizer.pad_token_id)
        known = pad_sequence([torch.ones_like(ids[i]) for i in chosen], batch_first=True)
        wanted = pad_sequence([labels[i] for i in chosen], batch_first=True, padding_value=-100)
        padded, known, wanted = (x.to(model.device, non_blocking=True) for x in (padded, known, wanted))
        model(input_ids=padded, attention_mask=known, labels=wanted, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@contextmanager
def restored(model: Any, paths: Sequence[str]) -> Iterator[None]:
    """Put these weights back afterwards, and let all be trainable again."""
    named = dict(model.named_parameters())
    before = {path: named[path].detach().clone() for path in paths}
    try:
        yield
    finally:
        model.zero_grad()
        for path, value in before.items():
            named[path].data = value
        model.requires_grad_(True)


@contextmanager
def in_fp32(model: Any) -> Iterator[None]:
    """Hold the weights in fp32 inside the block; bf16 weights come back as they were."""
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()


@dataclass(frozen=True)
class Found:
    """The figures of a measurement by unit; the last of them is written last, and tells that all are there.

    The others belong to the row of seconds.
    """

    values: dict[str, float]
    peak_memory: int | None = None
    flops: float | None = None
    floor_share: float | None = None

    @classmethod
    def of(cls, run: Run, values: Mapping[str, float] | None = None, **more: Any) -> Found:
        return cls({**(values or {}), "s": run.seconds}, run.peak_memory, **more)


class Bench:
    """The measurements of one shape; the model is made when the first one needs it.

    `folder` is for second moments.
    """

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder, self.suite = args, folder, Suite(args.device)
        self.started = time.monotonic()
        self.tokenizer = load_tokenizer(args.tokenizer)
        most = max(args.n, args.published, *args.solver_n, args.solver_published)
        found = load_requests(args.requests) if args.requests else as_requests([*facts(most)])
        self.requests: list[EditRequest] = found[: args.n]
        self.with_subject = [r for r in found if r.subject and r.subject in r.prompt]
        self.texts = f" ({args.requests.stem})" if args.requests else ""

    @cached_property
    def model(self) -> Any:
        torch.manual_seed(0)
        return random_model(self.args.size, self.suite.device, len(self.tokenizer))

    @property
    def layer(self) -> int:
        return locft_bf_preset(topology(self.model))[0].layer

    @property
    def weight(self) -> str:
        return f"model.layers.{self.layer}.mlp.down_proj.weight"

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """The preset's layers of MEMIT, with second moments in `folder`; of other shapes five from an eighth on."""
        preset, published = locate_then_edit_preset(topology(self.model))
        first = self.model.config.num_hidden_layers // 8
        layers = preset.layers if published else tuple(range(first, first + 5))
        random_statistics(self.model, self.folder, layers)
        return layers

    def measure(
        self,
        work: Callable[[], Found],
        provider: str,
        mode: str,
        shape: str,
        *,
        dtype: str = "bfloat16",
        last: str = "s",
        goal: str = "",
    ) -> None:
        """Record what `work` finds, unless it was recorded at this commit, or the budget is spent.

        Args:
            last: the last unit of what `work` finds.
            goal: printed beside.
        """
        about = {"mode": mode, "shape": shape, "dtype": dtype, "device": self.suite.device}
        label, key = f"{mode}, {shape}: {provider}", make_row("shapes", provider, [0.0], unit=last, **about).key
        if any(row.key == key and row.commit == commit() for row in read()):
            print(f"{label}: already measured at this commit", flush=True)
            return
        if time.monotonic() - self.started > self.args.budget:
            print(f"{label}: not measured, {self.args.budget:g} s are over", flush=True)
            return
        print(f"\n{label}", flush=True)
        try:
            found = work()
        except torch.OutOfMemoryError as error:
            print(f"  not measured: {error}", flush=True)
        except Exception as error:  # the other measurements can still be made
            self.suite.fail(f"{label}: {type(error).__name__}: {error}")
        else:
            of_time = {"peak_memory": found.peak_memory, "flops": found.flops, "floor_share": found.floor_share}
            for unit, value in found.values.items():
                row = make_row("shapes", provider, [value], unit=unit, **about, **(of_time if unit == "s" else {}))
                self.suite.record(row)
            if goal:
                print(f"  goal: {goal}", flush=True)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def trainer(self, epochs: int, **more: Any) -> Editor:
        settings = {"layer": self.layer, "module": "down_proj", "batch_size": self.args.batch, "lr": LR}
        settings |= {"stop_loss": 0.0, "skip_loss": 0.0, "published": True, "epochs": epochs}
        return Editor(self.model, self.tokenizer, "locft-bf", **settings, **more)

    def locft_bf(self, edits: Sequence[EditRequest]) -> Found:
        editor = self.trainer(self.args.epochs)
        editor.edit(edits[: self.args.batch]).revert()  # warms up
        made: Any = editor.plan(edits).made
        samples = made.data.samples
        flops = training_flops(
            self.model.config, samples.lengths - 1, samples.target_start, self.layer, self.args.epochs
        )
        with measured(self.suite.device) as run:
            result = editor.edit(edits)
        result.revert()
        print("  " + ", ".join(f"{stage} {taken:.3g} s" for stage, taken in result.stages.items()))
        trained = result.stages["train"] + result.stages.get("epoch", 0.0)  # "epoch" is time within long epochs
        speeds = {"edits/s": len(edits) / run.seconds, "edits/s without the prefix": len(edits) / trained}
        share = flops / self.suite.ceilings["bfloat16"] / run.seconds
        return Found.of(run, speeds, flops=flops, floor_share=share)

    def where(self, edits: Sequence[EditRequest]) -> Found:
        profile = EpochProfile(self.suite.device)
        self.trainer(EpochProfile.EPOCHS, progress=profile).edit(edits).revert()
        return Found(profile.shares())

    def published(self, edits: Sequence[EditRequest]) -> Found:
        config = {"lr": LR, "batch_size": self.args.batch, "seed": 0, "skip_loss": 0.0}
        about = {"config": config, "path": self.weight}
        with restored(self.model, [self.weight]):
            for some, epochs in ((edits[: self.args.batch], 1), (edits, self.args.epochs)):  # the first warms up
                run = run_published(self.model, self.tokenizer, "locft-bf", some, about | {"epochs": epochs})
        return Found.of(run)

    def published_in_fp32(self, edits: Sequence[EditRequest]) -> Found:
        with in_fp32(self.model):
            return self.published(edits)

    def factory(self, edits: Sequence[EditRequest]) -> Found:
        weight = dict(self.model.named_parameters())[self.weight]
        with restored(self.model, [self.weight]):
            for some, epochs in ((edits[: self.args.batch], 1), (edits, self.args.epochs)):  # the first warms up
                batches = order(len(some), self.args.batch, epochs, seed=0)
                with measured(self.suite.device) as run:
                    fine_tune(self.model, self.tokenizer, some, weight, batches)
        return Found.of(run)

    def solver(self, method: str) -> Editor:
        return Editor(
            self.model,
            self.tokenizer,
            method,
            layers=self.layers,
            distribution="spread",
            steps=self.args.steps,
            stop_loss=0.0,
            contexts=CONTEXTS,
            statistics=str(self.folder),
            on_duplicates="merge",
            name_weight=0.0,
        )

    def solve(self, method: str, edits: Sequence[EditRequest]) -> Found:
        """Edit by ours; the stages are targets, keys at the lowest layer, and solving and writing with all else."""
        editor = self.solver(method)
        editor.edit(edits[:2]).revert()  # factors C
        with measured(self.suite.device) as run:
            result = editor.edit(edits)
        result.revert()
        of_stage = {"targets": "targets", "keys": "keys", "edits": "solve"}
        shares = {name: result.stages[stage] / run.seconds for stage, name in of_stage.items()}
        shares["other"] = 1 - sum(shares.values())
        return Found.of(run, shares | {"edits/s": len(edits) / run.seconds})

    def published_solve(self, method: str, edits: Sequence[EditRequest]) -> Found:
        result = self.solver(method).edit(edits)  # makes the same choices
        about = {**result.delta.metadata, "epochs": 0}
        result.revert()
        with restored(self.model, [*result.delta.updates]):
            run = run_published(self.model, self.tokenizer, method, edits, about)
        print(f"  {run.seconds / len(edits):.3g} s an edit", flush=True)
        return Found.of(run)

    def run(self) -> None:
        args, every = self.args, self.requests

        def train(edits: Sequence[EditRequest], epochs: int = args.epochs) -> tuple[str, str]:
            size = f"{len(edits)} edits{self.texts}, {args.size}, batch {args.batch}"
            return "LocFT-BF", f"{size}, {epochs} epoch{'s' * (epochs > 1)}"

        some = every[:300]
        self.measure(lambda: self.locft_bf(every), OURS, *train(every), goal=GOALS["LocFT-BF"])
        self.measure(lambda: self.where(some), OURS, *train(some, 1), last=GAPS, goal=GOALS[GAPS])
        few = every[: args.published]
        self.measure(lambda: self.locft_bf(few), OURS, *train(few))
        self.measure(lambda: self.published(few), BF16, *train(few))
        self.measure(lambda: self.factory(few), FACTORY, *train(few))
        self.measure(lambda: self.published_in_fp32(few), FP32, *train(few), dtype="float32")
        if not self.with_subject:
            print("MEMIT and EMMET: not measured, no edit has a subject in its prompt", flush=True)
        for method in ("memit", "emmet") if self.with_subject else ():
            name, by_theirs = NAMES[method], self.with_subject[: args.solver_published]
            for edits in (self.with_subject[:n] for n in args.solver_n):
                work = lambda edits=edits, method=method: self.solve(method, edits)  # noqa: E731
                self.measure(work, OURS, name, self._solved(edits), goal=GOALS.get(name, ""))
            work = lambda edits=by_theirs, method=method: self.published_solve(method, edits)  # noqa: E731
            self.measure(work, BF16, name, self._solved(by_theirs))
        self.suite.close()

    def _solved(self, edits: Sequence[EditRequest]) -> str:
        return f"{len(edits)} edits{self.texts}, {self.args.size}, 5 layers, {self.args.steps} steps"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SHAPES, default="8b")
    parser.add_argument("--requests", type=Path, help="a file of edits; default: facts about the fact world's people")
    parser.add_argument("--tokenizer", type=Path, default=fastedit.demo.checkpoint_path())
    parser.add_argument("--n", type=int, default=3000, help="edits of LocFT-BF")
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--published", type=int, default=200, help="edits of the comparison with other ways")
    parser.add_argument("--solver-n", type=int, nargs="+", default=[64, 512], help="edits of MEMIT and EMMET")
    parser.add_argument("--solver-published", type=int, default=8, help="edits of their published procedures")
    parser.add_argument("--steps", type=int, default=25, help="steps of each target")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which nothing new begins")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    with (
        tempfile.TemporaryDirectory(prefix="fastedit-shapes-") as folder,
        mock.patch.dict(os.environ, XDG_CACHE_HOME=folder),  # factors of second moments are gigabytes
    ):
        Bench(args, Path(folder)).run()


if __name__ == "__main__":
    main()
