"""Our calls against those that they replace, which run from their own checkouts: differences of updates, and times.

    python -m benchmarks.upstream --easyedit DIR --memit DIR --alphaedit DIR --unified DIR \
        [--model DIR --statistics DIR --requests FILE --n 4]

Both sides have the same model, contexts, second moments and hyperparameters. "ΔW" is the largest relative difference
of a layer's update from theirs, end to end, in fp32. "solve" is the same in fp64 with their targets. Without --model
the model is the fact world's.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from tokenizers import processors
from torch import Tensor

if not __package__:  # run as a file; imports are from the root
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
from benchmarks.checkouts import load, running
from benchmarks.harness import measured
from benchmarks.rows import Row, append, make_row
from fastedit import Editor, EditRequest, load_requests
from fastedit.compat import easyedit, memit
from fastedit.demo import World, checkpoint_path
from fastedit.methods.locate_then_edit import method
from fastedit.methods.locate_then_edit.targets import Targets
from fastedit.methods.presets import locate_then_edit_preset
from fastedit.models import fingerprint
from fastedit.statistics.store import StatisticsStore

CONTEXTS = [
    "The river was cold that year. {}",
    "Therefore the council met again. {}",
    "Because of the rain. {}",
    "I have never seen that before. {}",
    "You can read it in the book. {}",
]
FLAGS = {"easyedit": "EasyEdit", "memit": "memit", "alphaedit": "AlphaEdit", "unified": "unified-model-editing"}
ACCURACY = {"solve": 1e-6, "ΔW": 1e-4}


@dataclass(frozen=True)
class Case:
    """A method of a checkout.

    Attributes:
        modules: its main module, then its nethook if it supports only GPUs.
        function: name of their function in the main module.
        ours: our function that replaces it.
        single: it solves in fp32, whatever the model's dtype.
    """

    upstream: str
    method: str
    modules: tuple[str, ...]
    function: str
    ours: Callable[..., Any]
    single: bool = False

    def limit(self, unit: str) -> float:
        """The largest difference of a measure that is accepted."""
        return 1e-5 if unit == "solve" and self.single else ACCURACY.get(unit, float("inf"))


CASES = [
    *(
        Case(
            "easyedit",
            method,
            (f"easyeditor.models.{path}",),
            f"apply_{name}_to_model",
            easyedit.OURS[method],
            single=method == "AlphaEdit",
        )
        for method, path, name in (
            ("ROME", "rome.rome_main", "rome"),
            ("MEMIT", "memit.memit_main", "memit"),
            ("EMMET", "emmet.emmet_main", "emmet"),
            ("AlphaEdit", "alphaedit.AlphaEdit_main", "AlphaEdit"),
            ("FT", "ft.ft_main", "ft"),
        )
    ),
    Case("memit", "MEMIT", ("memit.memit_main", "util.nethook"), "apply_memit_to_model", memit.apply_memit_to_model),
    Case("memit", "ROME", ("rome.rome_main", "util.nethook"), "apply_rome_to_model", memit.apply_rome_to_model),
    Case(
        "alphaedit",
        "AlphaEdit",
        ("AlphaEdit.AlphaEdit_main", "util.nethook"),
        "apply_AlphaEdit_to_model",
        memit.apply_AlphaEdit_to_model,
    ),
    Case("unified", "EMMET", ("emmet.emmet_main", "util.nethook"), "apply_emmet_to_model", memit.apply_emmet_to_model),
]


class Bench:
    """A model with its second moments and edits, on which both sides run.

    Args:
        statistics: folder of second moments; None is the checkpoint's folder.
    """

    def __init__(self, model: Path, statistics: Path | None, edits: Sequence[EditRequest]) -> None:
        editor = Editor.from_pretrained(model, dtype="float32", device="cpu")
        self.model, self.tok, self.name, self.edits = editor.model, editor.tokenizer, model.name, edits
        self.tok.pad_token = self.tok.pad_token or self.tok.eos_token
        self.model.config.n_embd = self.model.config.hidden_size  # memit and rome read this
        preset, _ = locate_then_edit_preset(editor.topology)
        self.topology, self.preset = editor.topology, preset
        store = StatisticsStore(editor.topology, fingerprint(editor.model), directory=statistics)
        self.layers = {"ROME": [preset.single], "EMMET": [preset.single], "FT": [preset.single]}
        wanted = {preset.single, *preset.layers}
        self.moments = {layer: store.covariance(layer).float() for layer in wanted}

    def layers_of(self, method: str) -> list[int]:
        return self.layers.get(method, list(self.preset.layers))

    def hparams(self, method: str, P_loc: Path, **given: Any) -> Any:
        """The fields of all repositories' hparams files, with the same learning rate for all."""
        last = self.topology.n_blocks - 1
        fields: dict[str, Any] = {
            "alg_name": method, "model_name": "llama", "device": "cpu", "layers": self.layers_of(method),
            "layer_selection": "all", "fact_token": "subject_last", "v_num_grad_steps": self.preset.steps,
            "v_lr": self.preset.lr or 0.5, "v_loss_layer": last, "v_weight_decay": 1e-3,
            "clamp_norm_factor": 4.0, "kl_factor": 0.0625, "mom2_adjustment": True,
            "mom2_update_weight": float(self.topology.input_width(0, "down_proj")),
            "context_template_length_params": [[10, 5]], "rewrite_module_tmp": "model.layers.{}.mlp.down_proj",
            "layer_module_tmp": "model.layers.{}", "mlp_module_tmp": "model.layers.{}.mlp",
            "attn_module_tmp": "model.layers.{}.self_attn", "ln_f_module": "model.norm",
            "lm_head_module": "model.embed_tokens" if self.model.config.tie_word_embeddings else "lm_head",
            "mom2_dataset": "wikipedia", "mom2_n_samples": 100, "mom2_dtype": "float32", "stats_dir": "none",
            "batch_size": 100, "update_norm_lambda": 0, "emmet_lambda": 0.1, "calculate_objective_value": False,
            "P_loc": str(P_loc), "nullspace_threshold": 2e-2, "L2": 10.0, "bias_update": False,
            "num_steps": 10, "lr": 5e-4, "weight_decay": 0.0, "norm_constraint": False,
            "objective_optimization": "target_new",
        }  # fmt: skip
        return SimpleNamespace(**fields | given)

    def requests(self, plain: bool) -> list[dict[str, Any]]:
        """The edits in EasyEdit's format (`plain`), or in that of the others."""
        return [
            {
                "case_id": i,
                "prompt": edit.prompt if plain else edit.prompt.replace(str(edit.subject), "{}"),
                "subject": edit.subject,
                "target_new": edit.target if plain else {"str": edit.target},
            }
            for i, edit in enumerate(self.edits)
        ]

    def projections(self) -> Tensor:
        """P [L, d, d], which projects on the quarter of directions with the smallest eigenvalues."""
        found = []
        for layer in self.layers_of("AlphaEdit"):
            vectors = torch.linalg.eigh(self.moments[layer].double()).eigenvectors
            U = vectors[:, : len(vectors) // 4]
            found.append(U @ U.T)
        return torch.stack(found)

    def update(self, model: Any, method: str) -> list[Tensor]:
        """The change of the layers' weights, fp64."""
        now, before = dict(model.named_parameters()), dict(self.model.named_parameters())
        names = [f"model.layers.{layer}.mlp.down_proj.weight" for layer in self.layers_of(method)]
        return [(now[name].double() - before[name].double()).detach() for name in names]

    def efficacy(self, model: Any) -> float:
        report = Editor(model, self.tok).evaluate(self.edits, generate=False)
        found: float = report.metrics["reliability"]["teacher_forced"]
        return found


class Run:
    """A case that runs on a bench."""

    def __init__(self, case: Case, bench: Bench, checkout: Path, work: Path) -> None:
        self.case, self.bench, self.work = case, bench, work
        self.main, *self.nethook = load(checkout, case.modules)
        self.tok = deepcopy(bench.tok)
        if case.upstream == "memit":  # that code expects a tokenizer like GPT-2's, without BOS
            self.tok.backend_tokenizer.post_processor = processors.Sequence([])
        self.tok.padding_side = "left" if case.method == "FT" else "right"
        self.P = bench.projections() if case.method == "AlphaEdit" else None
        if self.P is not None:
            torch.save(self.P.float(), work / "P.pt")
        nested = case.method != "ROME"
        self.main.CONTEXT_TEMPLATES_CACHE = [["{}"], CONTEXTS] if nested else ["{}", *CONTEXTS]
        memit.CONTEXT_TEMPLATES_CACHE = self.main.CONTEXT_TEMPLATES_CACHE
        name = str(bench.model.config._name_or_path).replace("/", "_")
        for layer, C in bench.moments.items():
            key = name, f"model.layers.{layer}.mlp.down_proj"
            memit.COV_CACHE[key] = C
            if hasattr(self.main, "COV_CACHE"):
                self.main.COV_CACHE |= {key: C, (*key, "preserved_keys"): None}
        if hasattr(self.main, "cache_c_new"):
            self.main.cache_c_new = self.main.P_loaded = False

    def _take_inverses(self, dtype: torch.dtype) -> None:
        """Put inverses of C where ROME's code keeps them, in this dtype, because that code does not convert them."""
        name = str(self.bench.model.config._name_or_path).replace("/", "_")
        for layer, C in self.bench.moments.items():
            key = name, f"model.layers.{layer}.mlp.down_proj"
            self.main.compute_u.__globals__["inv_mom2_cache"][key] = torch.inverse(C.double()).to(dtype)

    def apply(self, ours: bool, model: Any, template: Path | None, **given: Any) -> None:
        case, bench = self.case, self.bench
        if case.method == "ROME":
            self._take_inverses(model.dtype)
        hparams = bench.hparams(case.method, self.work / "P.pt", **given)
        requests, options = bench.requests(case.upstream == "easyedit"), dict[str, Any]()
        if template is not None and case.method not in ("ROME", "FT"):
            options["cache_template"] = str(template)
        if case.upstream == "alphaedit":
            assert self.P is not None
            P = self.P.to(model.dtype)
            options |= {"P": P, "cache_c": torch.zeros_like(P)}
        function = case.ours if ours else getattr(self.main, case.function)
        if case.method == "ROME" and case.upstream == "easyedit" and not ours:  # it takes the first request only
            with running(model):
                for request in requests:
                    function(model, self.tok, [request], hparams, **options)
            return
        with running(model, *([] if ours else self.nethook)):
            function(model, self.tok, requests, hparams, **options)

    def timed(self, ours: bool, template: Path | None = None) -> tuple[Any, float]:
        model = deepcopy(self.bench.model)
        with measured("cpu") as run:
            self.apply(ours, model, template)
        return model, run.seconds

    def difference(self, ours: Any, theirs: Any) -> float:
        pairs = zip(self.bench.update(ours, self.case.method), self.bench.update(theirs, self.case.method), strict=True)
        return max(float((a - b).norm() / b.norm()) for a, b in pairs)

    def rows(self) -> Iterator[Row]:
        case, bench = self.case, self.bench
        template = self.work / "layer_{}_clamp_{}_case_{}.npz"
        about = {"mode": f"{FLAGS[case.upstream]}, {case.method}", "dtype": "float32"}
        about["shape"] = f"{len(bench.edits)} edits, {bench.name}"
        theirs, their_seconds = self.timed(False, template)
        ours, our_seconds = self.timed(True)
        for provider, model, seconds in (("published", theirs, their_seconds), ("ours", ours, our_seconds)):
            yield make_row("upstream", provider, [seconds], **about)
            yield make_row("upstream", provider, [bench.efficacy(model)], unit="efficacy", **about)
        yield make_row("upstream", "ours", [self.difference(ours, theirs)], unit="ΔW", **about)
        if case.method != "FT":
            yield make_row("upstream", "ours", [self.solved(template)], unit="solve", **about)

    def solved(self, template: Path) -> float:
        """The difference of the updates in fp64 with the same targets: those of the files, or ROME's own."""
        theirs, ours = (deepcopy(self.bench.model).double() for _ in range(2))
        if hasattr(self.main, "cache_c_new"):
            self.main.cache_c_new = False
        if self.case.method != "ROME":
            self.apply(False, theirs, template)
            self.apply(True, ours, template)
            return self.difference(ours, theirs)
        found: list[Tensor] = []
        compute_v = self.main.compute_v

        def noted(model: Any, tok: Any, request: Any, hparams: Any, layer: int, u: Tensor, contexts: Any) -> Tensor:
            v: Tensor = compute_v(model, tok, request, hparams, layer, u, contexts)
            place = request["prompt"], request["subject"], hparams.rewrite_module_tmp, hparams.fact_token
            read, output = compute_v.__globals__["get_module_input_output_at_word"](model, tok, layer, *place)
            found.append(output + v * (read @ u))
            return v

        def given(batch: Any, *_: Any) -> Targets:
            z, zero = found.pop(0)[None], torch.zeros(1)
            return Targets(z, z, zero, zero, zero.long(), (), 1.0, ())

        with patch.object(self.main, "compute_v", noted):
            self.apply(False, theirs, None)
        with patch.object(method, "find_targets", given):
            self.apply(True, ours, None)
        return self.difference(ours, theirs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, name in FLAGS.items():
        parser.add_argument(f"--{flag}", type=Path, help=f"checkout of {name}")
    parser.add_argument("--model", type=Path, default=Path(checkpoint_path()))
    parser.add_argument("--statistics", type=Path)
    parser.add_argument("--requests", type=Path)
    parser.add_argument("--n", type=int, default=4)
    parser.add_argument("--methods", nargs="+", default=["ROME", "MEMIT", "EMMET", "AlphaEdit", "FT"])
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    edits = (load_requests(args.requests) if args.requests else World().requests(args.n))[: args.n]
    bench = Bench(args.model, args.statistics, edits)
    cases = [case for case in CASES if getattr(args, case.upstream) and case.method in args.methods]
    if not cases:
        parser.error(f"give a checkout: {', '.join(f'--{flag} DIR' for flag in FLAGS)}")
    failed = []
    for case in cases:
        with tempfile.TemporaryDirectory() as work:
            for row in Run(case, bench, getattr(args, case.upstream).resolve(), Path(work)).rows():
                append(row)
                print(f"{row.mode}, {row.shape}, {row.provider}: {row.unit} {row.p50:.4g}", flush=True)
                if not row.p50 <= case.limit(row.unit):
                    failed.append(f"{row.mode}: {row.unit} {row.p50:.3g} above {case.limit(row.unit):g}")
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    main()
