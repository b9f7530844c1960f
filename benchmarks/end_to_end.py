"""LocFT-BF, MEMIT, EMMET and ROME on the fact world: edits/s, peak memory and quality, ours against the published way.

    python benchmarks/end_to_end.py --n 1000

Both have the same model, edits, contexts, statistics and settings, in one run. The published procedures optimize one
target at a time; `--published` gives them fewer edits.

With `--size` it measures models of a published shape instead, as `python -m benchmarks.shapes --help` describes.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
from collections.abc import Sequence
from typing import Any

if not __package__:  # run as a file; imports are from the root
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
import fastedit.demo
from benchmarks import published, published_memit
from benchmarks.harness import Run, Suite, measured
from benchmarks.locft_bf import order
from benchmarks.rows import make_row
from fastedit import Editor, EditRequest
from fastedit.evaluation.predict import Predictions, predict
from fastedit.evaluation.report import compare
from fastedit.models import Model, topology
from fastedit.statistics.store import StatisticsStore

NAMES = {"locft-bf": "LocFT-BF", "memit": "MEMIT", "emmet": "EMMET", "rome": "ROME"}
CONTEXTS = ("It was late. {}", "Then they went home. {}", "Nothing had changed. {}", "They asked again. {}", "So. {}")
MEASURES = ("reliability", "generalization", "locality")
WORSE = 0.05
"""Ours fails if its share of written edits is lower than the published procedure's by more than this."""


class Quality:
    """The effect of an edit on the model, measured against the unedited one."""

    def __init__(self, model: Any, tokenizer: Any, requests: Sequence[EditRequest], text: Sequence[str]) -> None:
        self.tokenizer, self.requests, self.text = tokenizer, list(requests), text
        self.before: Predictions = predict(Model.of(model, tokenizer), self.requests, kinds=("neighbour",))

    def of(self, model: Any) -> dict[str, float]:
        after = predict(Model.of(model, self.tokenizer), self.requests, text=self.text)
        report = compare(self.requests, after, self.before).to_dict()
        shares = {f"{name}, {way}": report[name][way] for name in MEASURES for way in ("generated", "teacher_forced")}
        return {name.replace("_", "-"): share for name, share in shares.items()} | {"perplexity": report["perplexity"]}


def run_published(model: Any, tokenizer: Any, method: str, edits: Sequence[EditRequest], found: dict[str, Any]) -> Run:
    """Edit the model in the published way, with the settings that ours chose."""
    config, epochs = found["config"], found["epochs"]
    if method == "locft-bf":
        weight = dict(model.named_parameters())[found["path"]]
        with measured(model.device) as run:
            published.locft_bf(
                model,
                tokenizer,
                [(r.prompt, r.target) for r in edits],
                weight,
                lr=config["lr"],
                batches=order(len(edits), config["batch_size"], epochs, config["seed"]),
                skip_loss=config["skip_loss"],
            )
        return run
    names = ("cov_weight", "lr", "steps", "weight_decay", "clamp", "kl_factor", "stop_loss", "site")
    settings = {name: config[name] for name in names}
    if config["objective"] == "equality":
        settings["alpha"] = config["alpha"]
    parts = topology(model)
    statistics = StatisticsStore(parts, found["fingerprint"], directory=config["statistics"])
    covariances = [statistics.covariance(layer) for layer in config["layers"]]
    triples = [(r.prompt, str(r.subject), r.target) for r in edits]
    with measured(model.device) as run:
        for batch in ([t] for t in triples) if method == "rome" else [triples]:
            published_memit.memit(
                model,
                tokenizer,
                batch,
                CONTEXTS,
                config["layers"],
                covariances,
                direction=method == "rome",
                **settings,
            )
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--published", type=int, help="edits of the published procedures; default: as many")
    parser.add_argument("--methods", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--size", help="measure a model of this shape; all options are then those of benchmarks.shapes")
    if parser.parse_known_args()[0].size:
        from benchmarks import shapes

        shapes.main()
        return
    args = parser.parse_args()
    suite = Suite.of(args)
    world = fastedit.demo.World()
    requests, text = world.requests(args.n), world.prose(100)
    for method in args.methods:
        config = {"published": True} if method == "locft-bf" else {"contexts": CONTEXTS, "name_weight": 0.0}
        editor = Editor.from_pretrained(
            fastedit.demo.checkpoint_path(), method, dtype="float32", device=args.device, **config
        )
        editor.edit(requests[:2]).revert()  # factors C, because the published procedure reads C ready-made
        theirs = copy.deepcopy(editor.model)
        quality = {}

        def record(
            provider: str, edits: Sequence[EditRequest], run: Run, measures: dict[str, float], mode: str
        ) -> None:
            case = {"mode": mode, "shape": f"{len(edits)} edits", "dtype": "float32", "device": args.device}
            suite.record(make_row("end_to_end", provider, [run.seconds], peak_memory=run.peak_memory, **case))
            for unit, value in measures.items():
                suite.record(make_row("end_to_end", provider, [value], unit=unit, **case))

        for n in dict.fromkeys((args.published or args.n, args.n)):
            edits = requests[:n]
            measure = Quality(editor.model, editor.tokenizer, edits, text)
            with measured(args.device) as run:
                result = editor.edit(edits)
            quality["ours"] = measure.of(editor.model)
            chosen = {**result.delta.metadata, "epochs": len(result.losses), "path": next(iter(result.delta.updates))}
            result.revert()
            print(f"\n{NAMES[method]}, {n} edits", flush=True)
            if n == (args.published or args.n):
                their_run = run_published(theirs, editor.tokenizer, method, edits, chosen)
                quality["published"] = measure.of(theirs)
                ours, other = (quality[who]["reliability, generated"] for who in ("ours", "published"))
                if not ours >= other - WORSE:
                    suite.fail(f"{NAMES[method]}: ours writes {ours:.1%} of the edits, the published way {other:.1%}")
                    break
                record("published", edits, their_run, quality["published"], NAMES[method])
            record("ours", edits, run, quality["ours"], NAMES[method])
    suite.close()


if __name__ == "__main__":
    main()
