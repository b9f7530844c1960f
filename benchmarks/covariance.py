"""Second moments: ours against torch, for the sums alone, for a whole run over text, and in accuracy.

    python benchmarks/covariance.py --device cuda

The floor is the time for the flops of a lower triangle at the rate of a matrix product. In the whole run, the published
way is one pass per layer, which ends in that layer, over documents padded to the longest of their batch, with C += kᵀk
in full.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

if not __package__:  # run as a file: its folder would hide packages of the same names
    sys.path[0] = str(Path(__file__).parents[1])
import fastedit.demo
from benchmarks.harness import Case, Inputs, Suite
from benchmarks.rows import make_row
from fastedit import ops
from fastedit.models import Model, Topology, topology
from fastedit.ops import syrk
from fastedit.ops.registry import Backend
from fastedit.statistics.collect import collect

# (rows, width, dtype)
SUMS = {
    "cuda": [(8192, d, "bfloat16") for d in (14336, 4096, 1024)] + [(8192, 4096, "float32")],
    "cpu": [(4096, 3072, "float32"), (4096, 3072, "bfloat16"), (4096, 1024, "float32"), (4096, 1024, "bfloat16")],
}
LAYERS = 5


def sum_case(device: torch.device, T: int, d: int, name: str) -> Case:
    dtype = getattr(torch, name)

    def setup() -> Inputs:
        total, plain = (torch.zeros(d, d, dtype=kind, device=device) for kind in (torch.float64, torch.float32))
        return torch.randn(T, d, device=device).to(dtype), total, plain

    def lower(C: Tensor) -> Sequence[Tensor]:
        """Views that hold most of the lower triangle; entries near the diagonal are computed like the others."""
        halves = [(start, size) for size in (d // 2, d // 4) for start in range(0, d - 2 * size + 1, 2 * size)]
        return [C.diagonal()] + [C[start + size : start + 2 * size, start : start + size] for start, size in halves]

    def reference(rows: Tensor, *_: Tensor) -> Sequence[Tensor]:
        return lower(rows.double().T @ rows.double())

    def ours(backend: Backend, rows: Tensor, total: Tensor, _: Tensor) -> Sequence[Tensor]:
        ops.syrk_(total, rows, backend=backend)
        return lower(total)

    def torch_way(rows: Tensor, _: Tensor, C: Tensor) -> Sequence[Tensor]:
        if rows.dtype != torch.float32 and device.type == "cuda":
            return lower(torch.addmm(C, rows.T, rows, out_dtype=torch.float32, out=C))
        rows = rows.float()
        return lower(C.addmm_(rows.T, rows))

    def by_mma(rows: Tensor, total: Tensor, _: Tensor) -> Sequence[Tensor]:
        syrk._cuda(total, rows, None, "mma")
        return lower(total)

    others: tuple[Backend, ...] = ("cuda", "torch") if device.type == "cuda" else ("torch",)
    providers = {"ours": partial(ours, "auto")} | {f"ours, {name}": partial(ours, name) for name in others}
    if device.type == "cuda" and syrk._has_wgmma(device):
        providers["ours, mma"] = by_mma
    # tensor cores truncate their sums: torch's over all rows, ours by torch over 1,024, our kernels' over 128
    cut_off = {"torch": 1e-4, "ours": 1e-5, "ours, torch": 1e-5} if device.type == "cuda" else {}
    return Case(
        "covariance",
        setup,
        reference,
        providers | {"torch": torch_way},
        tolerance=dict.fromkeys([*providers, "torch"], 1e-6) | cut_off,
        mode="sum",
        shape=f"{T}×{d}",
        dtype=name,
        flops=float(T) * d * d,
        rate=name if device.type == "cuda" else "float32",
    )


def run_case(device: torch.device, documents: int, batch: int) -> Case:
    """A whole run: the demo model's five layers before the last one, over texts of the fact world."""
    path = fastedit.demo.checkpoint_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.padding_side = "right"
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(device).eval()
    stories, draw = iter(fastedit.demo.World().prose(2 * documents)), random.Random(0)
    texts = [" ".join(islice(stories, draw.randint(1, 2))) for _ in range(documents)]  # none longer than the context
    parts = topology(model)
    depth = model.config.num_hidden_layers
    layers = list(range(depth - 1 - LAYERS, depth - 1))

    def ours() -> Sequence[Tensor]:
        found = collect(Model(parts, tokenizer), texts, layers)
        return [found[layer].finalize() for layer in layers]

    def published(dtype: torch.dtype = torch.float32) -> Sequence[Tensor]:
        return [_published_layer(model, tokenizer, texts, parts, layer, batch, dtype) for layer in layers]

    return Case(
        "covariance",
        lambda: (),
        partial(published, torch.float64),
        {"ours": ours, "published": published},
        tolerance=1e-5,
        mode="run",
        shape=f"{documents} documents, {LAYERS} of {depth} layers",
    )


class _LayerSeenError(Exception):
    pass


@torch.no_grad()
def _published_layer(
    model: torch.nn.Module,
    tokenizer: Callable[..., dict[str, Tensor]],
    texts: Sequence[str],
    parts: Topology,
    layer: int,
    batch: int,
    dtype: torch.dtype,
) -> Tensor:
    seen: list[Tensor] = []

    def look(_: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0])
        raise _LayerSeenError

    handle = parts.resolve(layer, "down_proj")[1].register_forward_pre_hook(look)
    C, count = torch.zeros((), device=parts.device), 0
    try:
        for start in range(0, len(texts), batch):
            inputs = tokenizer(texts[start : start + batch], return_tensors="pt", padding=True)
            try:
                model(**{name: inputs[name].to(parts.device) for name in ("input_ids", "attention_mask")})
            except _LayerSeenError:
                keys = seen.pop()[inputs["attention_mask"].to(parts.device).bool()].to(dtype)
            C, count = C + keys.T @ keys, count + len(keys)
    finally:
        handle.remove()
    return C / count


def accuracy(suite: Suite, T: int = 1_000_000, d: int = 128, part: int = 4096) -> None:
    """Measure the largest error of an entry c_ij, relative to √(c_ii c_jj); some columns have a mean of 100 σ."""
    device = torch.device(suite.device)
    shift = torch.zeros(d, device=device).index_fill_(0, torch.arange(0, d, 3, device=device), 100)
    total, wanted = (torch.zeros(d, d, dtype=torch.float64, device=device) for _ in range(2))
    plain = torch.zeros(d, d, device=device)
    for start in range(0, T, part):
        rows = torch.randn(min(part, T - start), d, device=device) + shift
        ops.syrk_(total, rows)
        plain.addmm_(rows.T, rows)
        wanted.addmm_(rows.double().T, rows.double())
    norms = wanted.diagonal().sqrt()
    errors = [float(((x - wanted).tril().abs() / norms / norms[:, None]).max()) for x in (total, plain)]
    shape = f"{T}×{d}, mean 100 σ"
    print(f"\ncovariance accuracy {shape} float32", flush=True)
    for name, error in zip(("ours", "torch"), errors, strict=True):
        suite.record(make_row("covariance", name, [error], mode="accuracy", shape=shape, dtype="float32",
                              device=device, unit="relative error"))  # fmt: skip
    if not errors[0] < 1e-6:
        suite.fail(f"accuracy: error {errors[0]:.1e} > 1e-6")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--budget", type=float, default=2.0, help="seconds of timing for each provider of a case")
    parser.add_argument("--documents", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16, help="documents of a batch of the published way")
    parser.add_argument("--only", choices=["sum", "run", "accuracy"])
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    suite, device = Suite.of(args), torch.device(args.device)
    if args.only in (None, "accuracy"):
        accuracy(suite)
    if args.only in (None, "sum"):
        for sizes in SUMS[device.type]:
            suite.run(sum_case(device, *sizes))
    if args.only in (None, "run"):
        suite.run(run_case(device, args.documents, args.batch))
    suite.close()


if __name__ == "__main__":
    main()
