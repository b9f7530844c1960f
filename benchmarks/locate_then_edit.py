"""MEMIT: ours against the published procedure, same edits, contexts, statistics and settings, in one run.

    python benchmarks/locate_then_edit.py

First the solve alone, then the whole edit against the published one, then how ours grows with the edits. The model is
a Llama with random weights, whose second moments are random too: speed does not depend on what it knows.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import published_memit
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, GPT2TokenizerFast, LlamaConfig, LlamaForCausalLM

import fastedit.demo
from fastedit import Editor, EditRequest, StreamingCovariance, load_requests, ops
from fastedit.models import fingerprint, topology
from fastedit.statistics import statistics_path

LAYERS = (3, 4, 5, 6)
CONTEXTS = ["The river was cold that year. {}", "Therefore we went home. {}", "Because of that, nothing changed. {}"]
CONTEXTS += ["I was in the city for a week. {}", "You can see it from the road. {}"]


def median_seconds(function: Callable[[], object], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def solve_alone(d: int, n: int, cov_weight: float = 15_000.0) -> None:
    """One layer's update, C factored before: an N×N system against the published d×d one."""
    rows = torch.randn(2 * d, d, dtype=torch.float64)
    C = rows.T @ rows / len(rows)
    K, R = torch.randn(n, d, dtype=torch.float64), torch.randn(n, d, dtype=torch.float64)
    L = ops.factor_covariance(C)

    def published() -> Tensor:
        return R.T @ torch.linalg.solve(cov_weight * C + K.T @ K, K.T).T

    def ours() -> tuple[Tensor, Tensor]:
        return ops.rank_k_update(K, R, L, ridge=cov_weight)

    left, right = ours()
    direct = published()
    error = float((left @ right - direct).norm() / direct.norm())
    slow, fast = median_seconds(published, 3), median_seconds(ours, 9)
    print(f"solve alone, d = {d}, N = {n}, relative difference {error:.1e}")
    print(f"direct {slow:.3f} s, fastedit {fast:.4f} s, ratio {slow / fast:.1f}")


def random_statistics(model: LlamaForCausalLM, folder: Path) -> list[Tensor]:
    """Second moments of random keys for all layers, as files and as matrices."""
    parts, found = topology(model), []
    for layer in LAYERS:
        width = parts.input_width(layer, "down_proj")
        about = {"fingerprint": fingerprint(model), "layer": layer, "module": parts.resolve(layer, "down_proj")[0]}
        covariance = StreamingCovariance(width, metadata=about)
        covariance.update(torch.randn(4 * width, width) * 0.1)
        covariance.save(statistics_path(parts, folder, layer))
        found.append(covariance.finalize())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=Path)
    parser.add_argument("--tokenizer", type=Path, default=fastedit.demo.checkpoint_path())
    parser.add_argument("--n", type=int, default=64, help="edits of the comparison")
    parser.add_argument("--scaling", type=int, nargs="*", default=[16, 64, 256], help="edits of ours alone")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    solve_alone(4096, 32)

    kind = AutoTokenizer if (args.tokenizer / "tokenizer_config.json").exists() else GPT2TokenizerFast
    tokenizer = kind.from_pretrained(args.tokenizer)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    most = max([args.n, *args.scaling])
    requests = load_requests(args.requests) if args.requests else fastedit.demo.World().requests(most)
    requests = [r for r in requests if r.subject and r.subject in r.prompt][:most]
    config = LlamaConfig(
        vocab_size=50_304,
        hidden_size=512,
        intermediate_size=1792,
        num_hidden_layers=16,
        num_attention_heads=8,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval()
    theirs = copy.deepcopy(model)
    settings = {"steps": args.steps, "weight_decay": 1e-3, "clamp": 4.0, "kl_factor": 0.0625, "stop_loss": 0.05}

    with tempfile.TemporaryDirectory() as folder:
        covariances = random_statistics(model, Path(folder))

        def edit(edits: list[EditRequest], targets: Path | None = None) -> tuple[float, float, dict[str, Tensor]]:
            editor = Editor(
                model,
                tokenizer,
                "memit",
                layers=LAYERS,
                cov_weight=1000.0,
                contexts=tuple(CONTEXTS),
                statistics=folder,
                targets=targets and str(targets),
                **settings,
            )
            started = time.perf_counter()
            result = editor.edit(edits)
            seconds = time.perf_counter() - started
            updates = {path: update.dense() for path, update in result.delta.updates.items()}
            lr = result.delta.metadata["config"]["lr"]
            result.revert()
            return seconds, lr, updates

        edit(requests[:2])  # factors C, which both would have ready
        ours, lr, updates = edit(chosen := requests[: args.n], Path(folder) / "targets")
        (file,) = (Path(folder) / "targets").iterdir()
        our_targets = load_file(file)
        print(f"{args.n} edits, layers {LAYERS}, {args.steps} steps, {args.threads} threads, fp32", flush=True)
        print(f"fastedit             {ours:8.2f} s", flush=True)
        before = {path: dict(theirs.named_parameters())[path].detach().clone() for path in updates}
        triples = [(r.prompt, str(r.subject), r.target) for r in chosen]
        started = time.perf_counter()
        z, taken = published_memit.memit(
            theirs, tokenizer, triples, CONTEXTS, LAYERS, covariances, cov_weight=1000.0, lr=lr, **settings
        )
        slow = time.perf_counter() - started
        now = dict(theirs.named_parameters())
        difference = max(
            float((now[path].detach() - before[path] - update).norm() / update.norm())
            for path, update in updates.items()
        )
        print(f"published procedure  {slow:8.2f} s   {sum(taken) / len(taken):.1f} updates an edit")
        print(f"ratio                {slow / ours:8.2f}")
        alike = (torch.cosine_similarity(z, our_targets["z"]) >= 0.999).double().mean()
        same = (torch.tensor(taken) == our_targets["steps"]).double().mean()
        print(f"targets with cosine of at least 0.999: {alike:.1%}, with the same number of updates: {same:.1%}")
        print(f"largest |dW - dW_published| / |dW_published| of a layer  {difference:.1e}")
        for n in args.scaling:
            seconds = edit(requests[:n])[0]
            print(f"{n:4d} edits  {seconds:8.2f} s  {seconds / n:6.3f} s an edit", flush=True)


if __name__ == "__main__":
    main()
