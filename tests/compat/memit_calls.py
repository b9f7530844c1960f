"""Calls of rome, memit, EMMET and AlphaEdit on a tiny model, and an Editor with the same settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from helpers import CONTEXTS, moments, random_edits, tiny_model, values
from torch import nn

from fastedit import Editor, EditRequest
from fastedit.compat import memit
from fastedit.models import topology
from fastedit.statistics.moment import StreamingCovariance
from fastedit.statistics.store import statistics_path

FIELDS: dict[str, Any] = {
    "layers": [0, 2],
    "fact_token": "subject_last",
    "layer_selection": "all",
    "v_num_grad_steps": 4,
    "v_lr": 0.3,
    "v_loss_layer": 3,
    "v_weight_decay": 0.1,
    "clamp_norm_factor": 2,
    "kl_factor": 0.0625,
    "mom2_adjustment": True,
    "mom2_update_weight": 7.0,
    "context_template_length_params": [[5, 2], [10, 1]],
    "rewrite_module_tmp": "model.layers.{}.mlp.down_proj",
    "layer_module_tmp": "model.layers.{}",
    "mlp_module_tmp": "model.layers.{}.mlp",
    "ln_f_module": "model.norm",
    "lm_head_module": "lm_head",
    "mom2_dataset": "wikipedia",
    "mom2_n_samples": 100000,
    "mom2_dtype": "float32",
    "update_norm_lambda": 0,
    "emmet_lambda": 0.2,
    "L2": 3.0,
    "nullspace_threshold": 0.07,
}
TARGET = {"steps": 4, "lr": 0.3, "weight_decay": 0.1, "clamp": 2.0}
OURS: dict[str, dict[str, Any]] = {  # the same for an Editor
    "rome": TARGET | {"layers": (1,)},
    "memit": TARGET | {"layers": (0, 2), "cov_weight": 7.0},
    "emmet": TARGET | {"layers": (1,), "cov_weight": 7.0, "alpha": 0.2, "site": "block"},
    "alphaedit": TARGET | {"layers": (0, 2), "l2": 3.0, "null_threshold": 0.07},
}
CALLS: dict[str, Callable[..., Any]] = {
    "rome": memit.apply_rome_to_model,
    "memit": memit.apply_memit_to_model,
    "emmet": memit.apply_emmet_to_model,
    "alphaedit": memit.apply_AlphaEdit_to_model,
}


def hparams(method: str = "memit", **given: Any) -> SimpleNamespace:
    return SimpleNamespace(**FIELDS | {"layers": list(OURS[method]["layers"])} | given)


def requests_of(edits: Sequence[EditRequest]) -> list[dict[str, Any]]:
    """Each a template, with the subject's last occurrence taken out."""
    found = []
    for i, edit in enumerate(edits):
        before, _, after = edit.prompt.rpartition(str(edit.subject))
        prompt = f"{before}{{}}{after}"
        found.append({"case_id": i, "prompt": prompt, "subject": edit.subject, "target_new": {"str": edit.target}})
    return found


class Case:
    """A tiny model called "org/tiny" whose second moments are in COV_CACHE, and those of an Editor in a folder."""

    def __init__(self, tokenizer: Any, folder: Path, seed: int, family: str = "llama") -> None:
        self.model, self.tokenizer, self.folder, self.family = tiny_model(family), tokenizer, folder, family
        self.model.config._name_or_path = "org/tiny"
        self.before = values(self.model)
        moments(self.model, folder, seed)
        self.edits = random_edits(3, seed)
        self.requests = requests_of(self.edits)
        self.C = {}
        for layer in range(4):
            found = StreamingCovariance.load(statistics_path(topology(self.model), folder, layer))
            self.C["org_tiny", f"model.layers.{layer}.mlp.down_proj"] = found.finalize()

    def editor(self, method: str, model: Any = None, **config: Any) -> Editor:
        own = {"statistics": self.folder, "contexts": CONTEXTS} | OURS[method] | config
        return Editor(model or tiny_model(self.family), self.tokenizer, method, **own)

    def wanted(self, method: str, edits: Sequence[EditRequest] | None = None, **config: Any) -> dict[str, torch.Tensor]:
        editor = self.editor(method, **config)
        editor.edit(edits or self.edits)
        return values(editor.model)

    def call(self, method: str, requests: Any = None, given: Any = None, **options: Any) -> Any:
        requests = self.requests if requests is None else requests
        return CALLS[method](self.model, self.tokenizer, requests, given or hparams(method), **options)


def close(
    model: nn.Module, wanted: dict[str, torch.Tensor], before: dict[str, torch.Tensor], tolerance: float = 1e-4
) -> bool:
    """Relative to the change."""
    return all(
        float((p.detach() - wanted[name]).norm()) <= tolerance * float((wanted[name] - before[name]).norm())
        for name, p in model.named_parameters()
    )
