"""Targets that ROME, MEMIT, EMMET and AlphaEdit seek by themselves, and how far their updates reach them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FAMILIES, moments, random_edits, same, tiny_model, values
from published import METHODS, SOUGHT, Case

from fastedit import Editor
from fastedit.methods.batch import Batch
from fastedit.methods.keys import KeyWalk
from fastedit.methods.locate_then_edit import method as method_module
from fastedit.methods.locate_then_edit.targets import Targets
from fastedit.models import Model
from fastedit.statistics.collect import collect
from fastedit.weights import LowRank


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_rate_of_the_targets_is_that_of_all_edits(batch_size: int, case: Case, seed: int) -> None:
    """Not of those that happen to come first."""
    edits = random_edits(7, seed)
    rates = []
    for given, size in ((edits, len(edits)), (edits, batch_size), (edits[::-1], batch_size)):
        result = case.editor("memit", METHODS["memit"], **SOUGHT | {"lr": None, "batch_size": size}).edit(given)
        rates.append(result.delta.metadata["config"]["lr"])
        assert sum(note.startswith("lr ") for note in result.notes) == 1
        result.revert()
    assert rates == pytest.approx([rates[0]] * 3, rel=1e-6)


def test_looking_at_all_edits_for_the_rate_is_no_stage_of_its_own(case: Case, seed: int) -> None:
    """A bar of keys would come to its end before the work begins."""
    stages: dict[float | None, list[tuple[str, int, int]]] = {0.3: [], None: []}
    for lr, seen in stages.items():
        editor = case.editor("memit", METHODS["memit"], **SOUGHT | {"lr": lr, "batch_size": 2})
        editor.progress = lambda stage, done, total, _=None, seen=seen: seen.append((stage, done, total))
        editor.edit(random_edits(4, seed)).revert()
    assert ("keys", 2 * 4, 2 * 4) in stages[0.3]
    assert stages[None] == stages[0.3]


@pytest.mark.parametrize("method", METHODS)
def test_from_text_to_an_edited_model(
    method: str, tokenizer: Any, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Statistics of text, targets that are sought, and contexts of the model's own; weights by those targets."""
    model, edits = tiny_model("llama"), random_edits(4, seed)
    texts = [edit.prompt for edit in random_edits(150, seed + 1)]
    collect(Model.of(model, tokenizer), texts, [0, 1], directory=tmp_path)
    before = values(model)
    found: list[Targets] = []
    find = method_module.find_targets
    monkeypatch.setattr(
        method_module, "find_targets", lambda *args, **named: found.append(find(*args, **named)) or found[-1]
    )
    editor = Editor(model, tokenizer, method, statistics=str(tmp_path), clamp=4.0, cov_weight=0.1, null_threshold=0.3)
    result = editor.edit(edits)
    assert result.losses == pytest.approx([float(targets.loss.mean()) for targets in found])
    assert not same(model, before)
    again = Editor(tiny_model("llama"), tokenizer, method, **dict(editor.config.__dict__))
    monkeypatch.setattr(method_module, "find_targets", lambda *_, **__: found.pop(0))
    again.edit(edits)
    assert same(again.model, values(model))
    config = result.delta.metadata["config"]
    left = {"contexts", "names", "targets", "state", "cache_bytes"}
    assert None not in [config[name] for name in config if name not in left]
    assert json.loads(json.dumps(config))["layers"] == list(config["layers"])
    result.revert()
    assert same(model, before)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_target_is_reached_or_it_is_said_that_it_is_not(
    family: str, tokenizer: Any, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With next to nothing to preserve. A norm after the MLP keeps a block's output from following an update."""
    case = Case(tokenizer, tmp_path, seed, family, dtype=torch.float32)  # Gemma 2's softmax is fp32, 0/0 in fp64
    edits = random_edits(2, seed)
    found: list[Any] = []
    seek = method_module.find_targets
    monkeypatch.setattr(
        method_module, "find_targets", lambda *args, **named: found.append(seek(*args, **named)) or found[-1]
    )
    config: dict[str, Any] = {"statistics": str(case.folder), "n_contexts": 0, "cov_weight": 1e-9, "steps": 5}
    for layers, options in (((1,), {"distribution": "single"}), ((0, 1), {})):
        editor = Editor(case.model, tokenizer, "memit", layers=layers, **config, **options)
        result = editor.edit(edits)
        site = result.delta.metadata["config"]["site"]
        with KeyWalk(Batch(editor.parts, edits), 1) as walk:
            now = walk.outputs(1, "down_proj" if site == "mlp" else "block")
        z, h0 = found[-1].z, found[-1].h0
        reached = bool((now - z).norm() < 1e-3 * (z - h0).norm())
        assert reached != any("targets are reached in part" in note for note in result.notes)
        assert reached or (len(layers) > 1 and family in ("gemma2", "gemma3", "olmo2", "opt_post_norm"))
        result.revert()


def test_an_update_before_a_norm_is_of_the_size_of_the_outputs_there(tokenizer: Any, tmp_path: Path, seed: int) -> None:
    """In Gemma 3 the outputs of `down_proj` are hundreds of times smaller than what the norm makes of them."""
    case = Case(tokenizer, tmp_path, seed, "gemma3", dtype=torch.float32)
    weights = {path: w for path, w in case.model.named_parameters() if "down_proj" in path}
    with torch.no_grad():
        for weight in weights.values():
            weight.mul_(0.01)
    moments(case.model, case.folder, seed)
    before = {path: weight.norm().item() for path, weight in weights.items()}
    sizes = []
    for through_norm in (True, False):
        config = {"statistics": str(case.folder), "n_contexts": 0, "cov_weight": 1e-6}
        config |= {"through_norm": through_norm, "module": "mlp.down_proj"}
        editor = Editor(case.model, tokenizer, "memit", layers=(0, 1), **config)
        result = editor.edit(random_edits(3, seed))
        updates = {path: u.dense() if isinstance(u, LowRank) else u for path, u in result.delta.updates.items()}
        assert any("may be far too large" in note for note in result.notes) != through_norm
        sizes.append(max(float(u.norm()) / before[path] for path, u in updates.items()))
        result.revert()
    assert sizes[0] < 3
    assert sizes[1] > 10 * sizes[0]
