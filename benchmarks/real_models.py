"""Methods and their variants on trained models: what is written, what is kept, and what it costs.

    python -m benchmarks.real_models --requests counterfact.json --text wiki.txt --n 10 100 [--model smollm2-135m DIR …]

The first records are edited. `known facts` is measured on later records, which are not edited: of those that the
unedited model answers, the share that the edited model still answers. Perplexity is measured on the beginning of the
text, and `fastedit covariance` collects second moments from the rest. Without --requests the edits are the fact
world's, which no trained model knows. Without --text the perplexity is of our guide, and the model writes the text for
the statistics.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

if not __package__:  # run as a file; imports are from the root
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
from benchmarks.harness import measured
from benchmarks.pretrained import SOURCES, folder
from benchmarks.rows import ROOT, Row, append, make_row
from fastedit import Editor, EditRequest, load_requests
from fastedit.demo import World
from fastedit.evaluation.predict import Predictions, predict
from fastedit.evaluation.report import EvaluationReport, compare
from fastedit.models import Model

HELD_OUT = 200_000  # characters at the beginning of the text that are not used for statistics
VARIANTS: dict[str, dict[str, Any]] = {
    "LocFT-BF": {"method": "locft-bf"},
    "LocFT-BF, published": {"method": "locft-bf", "published": True},
    "LocFT-BF, own text": {"method": "locft-bf", "statistics": None},
    "LocFT-BF, null space": {"method": "locft-bf", "preserve": "null-space"},
    "LocFT-BF, anchors": {"method": "locft-bf", "preserve": "anchors"},
    "LocFT-BF, both": {"method": "locft-bf", "preserve": "both"},
    **{name: {"method": name.lower()} for name in ("MEMIT", "EMMET", "ROME", "AlphaEdit")},
}
MEASURES = {
    "reliability": ("reliability", "generated"),
    "begins": ("generated_begins", "reliability"),
    "generalization": ("generalization", "teacher_forced"),
    "locality": ("locality", "teacher_forced"),
    "first token": ("first_token", None),
    "KL": ("kl", None),
    "PS": ("ps", None),
    "NS": ("ns", None),
}


def statistics_of(model: Path, text: Path, layers: Sequence[int], tokens: int, work: Path) -> Path:
    """The folder with the second moments of these layers; missing ones are collected."""
    made = work / f"{model.name}-{tokens}"
    missing = [layer for layer in layers if not (made / f"{layer}.down_proj.safetensors").exists()]
    if missing:
        rest = work / "rest.txt"
        rest.write_text(text.read_text(encoding="utf-8")[HELD_OUT:], encoding="utf-8")
        command = ["covariance", "--model", model, "--text", rest, "--layers", ",".join(map(str, missing))]
        command += ["--tokens", tokens, "--output", made]
        subprocess.run([sys.executable, "-m", "fastedit", *map(str, command)], check=True)
    return made


def layers_of(editor: Editor) -> list[int]:
    """The layers whose statistics the variants need on this model."""
    from fastedit.methods.presets import locate_then_edit_preset, locft_bf_preset

    spread, single = locate_then_edit_preset(editor.topology)[0], locft_bf_preset(editor.topology)[0]
    return sorted({*spread.layers, spread.single, single.layer})


def known(model: Model, records: Sequence[EditRequest], limit: int = 200) -> list[EditRequest]:
    """Facts whose answers the model predicts token by token, as requests."""
    asked = [EditRequest(r.prompt, r.true_target, id=r.id) for r in records if r.true_target]
    answers = predict(model, asked, kinds=("rewrite",), generate=False).answers
    return [request for request, a in zip(asked, answers, strict=True) if all(a["rewrite"][0].hits)][:limit]


def still_known(model: Model, facts: Sequence[EditRequest]) -> float:
    answers = predict(model, facts, kinds=("rewrite",), generate=False).answers
    return sum(all(a["rewrite"][0].hits) for a in answers) / len(facts)


def figures(report: EvaluationReport) -> dict[str, float]:
    """The measures by name; names for the unedited model end in "before"."""
    values: dict[str, float] = {}
    for name, (measure, part) in MEASURES.items():
        value = report.metrics[measure]
        value = value[part] if part else value
        if value is not None:
            values[name] = value
    for when, metrics in (("perplexity", report.metrics), ("perplexity before", report.before or {})):
        if metrics.get("perplexity") is not None:
            values[when] = metrics["perplexity"]
    return values


@dataclass(frozen=True)
class Trained:
    """An unedited model, with the data to measure its edits.

    Attributes:
        statistics: folder of its second moments; None without text to collect them from.
        facts: facts that the model knows and that are not edited.
        text: the text for perplexity.
    """

    model: Model
    name: str
    statistics: Path | None
    facts: Sequence[EditRequest]
    text: str

    @classmethod
    def load(cls, path: Path, others: Sequence[EditRequest], text: Path | None, tokens: int, work: Path) -> Trained:
        """Load a model in fp32; `others` are records that are not edited."""
        editor = Editor.from_pretrained(path, dtype="float32")
        statistics = text and statistics_of(path, text, layers_of(editor), tokens, work)
        pages = [text] if text else sorted((ROOT / "docs" / "pages").glob("*.md"))
        held_out = "\n".join(page.read_text(encoding="utf-8") for page in pages)[: HELD_OUT // 16]
        return cls(editor.parts, path.name, statistics, known(editor.parts, others), held_out)

    def predict(self, edits: Sequence[EditRequest]) -> Predictions:
        return predict(self.model, edits, text=[self.text], keep_head=True)

    def measure(self, edits: Sequence[EditRequest], before: Predictions, variant: str) -> Iterator[Row]:
        """Edit, measure, and revert the edit."""
        config = {"statistics": self.statistics and str(self.statistics)} | VARIANTS[variant]
        editor = Editor(self.model.network, self.model.tokenizer, **config)
        with measured(torch.device("cpu")) as run:
            result = editor.edit(edits)
        values = figures(compare(edits, self.predict(edits), before))
        if self.facts:
            values["known facts"] = still_known(self.model, self.facts)
        result.delta.revert()
        row = {"mode": variant, "dtype": "float32"}
        yield make_row("real_models", "ours", [run.seconds], peak_memory=run.peak_memory, **row)
        for unit, value in values.items():
            yield make_row("real_models", "ours", [value], unit=unit, **row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=list(SOURCES), help=f"folders, or {', '.join(SOURCES)}")
    parser.add_argument("--requests", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--n", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--skip", type=int, default=0, help="records before the edited ones")
    parser.add_argument("--neighbours", type=int, default=2, help="of each record, at most")
    parser.add_argument("--tokens", type=int, default=40_000, help="that statistics are collected from")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--work", type=Path, default=Path("real_models"), help="folder for statistics")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    read = load_requests(args.requests) if args.requests else World().requests(args.skip + max(args.n))
    records = [
        replace(record, neighbours=record.neighbours[: args.neighbours], portability=()) for record in read[args.skip :]
    ]
    source = (args.requests.stem if args.requests else "fact world") + f" from record {args.skip}" * bool(args.skip)
    for name in args.model:
        path = folder(name) if name in SOURCES else Path(name)
        trained = Trained.load(path, records[max(args.n) :], args.text, args.tokens, args.work)
        for n in args.n:
            edits = records[:n]
            before = trained.predict(edits)
            for variant in args.variants:
                for row in trained.measure(edits, before, variant):
                    append(replace(row, shape=f"{len(edits)} edits ({source}), {path.name}"))
                    print(f"{path.name}, {n} edits, {variant}: {row.unit} {row.p50:.4g}", flush=True)


if __name__ == "__main__":
    main()
