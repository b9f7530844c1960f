"""A GPU makes the edits, measurements and statistics that a CPU makes; runs where there is one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FAMILIES, make_documents, moments, random_edits, tiny_model

from fastedit import Editor, EditRequest, EditResult
from fastedit.delta import WeightDelta
from fastedit.models import Model
from fastedit.statistics.collect import collect

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
METHODS: dict[str, dict[str, Any]] = {
    "locft-bf": {"layer": 2, "module": "mlp", "lr": 1e-3, "batch_size": 4, "epochs": 3},
    "rome": {"layers": (1,), "steps": 3},
    "memit": {"layers": (0, 2), "steps": 3},
    "emmet": {"layers": (1,), "steps": 3},
    "alphaedit": {"layers": (0, 2), "steps": 3, "null_threshold": 0.07},
}


@pytest.fixture
def edit(tokenizer: Any, tmp_path: Path, seed: int) -> Callable[..., tuple[Any, Editor, EditResult]]:
    def run(family: str, method: str, edits: Sequence[EditRequest], device: str) -> tuple[Any, Editor, EditResult]:
        model, config = tiny_model(family, seed=seed), METHODS[method]
        if family.startswith("opt") and method == "locft-bf":
            config = config | {"module": "down_proj"}  # it has no mlp of its own
        if method != "locft-bf":
            moments(model, tmp_path, seed)
            config = config | {"statistics": str(tmp_path)}
        editor = Editor(model.to(device), tokenizer, method, **config)
        return model, editor, editor.edit(edits)

    return run


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_edits(
    family: str, method: str, edit: Callable[..., Any], make_edits: Callable[..., Any], tmp_path: Path, seed: int
) -> None:
    """The change within rounding, which Adam's division by √v enlarges; saved, put back and loaded bit for bit."""
    edits = make_edits(6) if method == "locft-bf" else random_edits(4, seed)
    wanted, cpu, _ = edit(family, method, edits, "cpu")
    model, gpu, result = edit(family, method, edits, "cuda")
    before = dict(tiny_model(family, seed=seed).named_parameters())
    after = {name: p.detach().clone() for name, p in model.named_parameters()}
    changed = [name for name, p in wanted.named_parameters() if not torch.equal(p, before[name])]
    assert changed
    for name, p in wanted.named_parameters():
        assert after[name].is_cuda
        if name in changed:
            assert (after[name].cpu() - p).norm() <= 1e-2 * (p - before[name]).norm(), name
        else:
            assert after[name].cpu().equal(before[name]), name
    result.delta.save(tmp_path / "edit.safetensors")
    result.revert()
    assert all(p.cpu().equal(before[name]) for name, p in model.named_parameters())
    WeightDelta.load(tmp_path / "edit.safetensors").apply(model)
    assert all(p.equal(after[name]) for name, p in model.named_parameters())
    model.load_state_dict(wanted.state_dict())
    reports = [editor.evaluate(edits).to_dict() for editor in (cpu, gpu)]
    for metric in ("reliability", "generalization"):
        assert reports[1][metric] == reports[0][metric]


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics(family: str, tokenizer: Any, seed: int) -> None:
    documents = make_documents(seed, 40)
    wanted, found = (
        collect(Model.of(tiny_model(family).to(device), tokenizer), documents, [0, 2], batch_tokens=96, row_tokens=24)
        for device in ("cpu", "cuda")
    )
    for layer, moment in wanted.items():
        C = moment.finalize()
        assert found[layer].count == moment.count
        assert (found[layer].finalize().cpu() - C).norm() <= 1e-5 * C.norm()
