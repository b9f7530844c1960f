"""The edit as an object: saved, loaded, applied and reverted without losing a bit, or refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import MakeEdits, assert_holds, state, tiny_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from fastedit import Editor, EditResult, ModelError, WeightDelta
from fastedit.models import fingerprint

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@pytest.fixture
def edit(tokenizer: Any, make_edits: MakeEdits) -> Callable[..., EditResult]:
    """Edits a model: two epochs on the MLP of block 2, which is three matrices."""

    def make(model: nn.Module, salt: int = 0, **config: Any) -> EditResult:
        settings = {"layer": 2, "module": "mlp", "lr": 1e-2, "epochs": 2, "batch_size": 4} | config
        return Editor(model, tokenizer, **settings).edit(make_edits(8, salt))

    return make


@DTYPES
def test_saved_loaded_applied_and_reverted_without_losing_a_bit(
    dtype: torch.dtype, edit: Callable[..., EditResult], tmp_path: Path
) -> None:
    model = tiny_model("llama", dtype=dtype)
    before = state(model)
    result = edit(model)
    after = state(model)
    assert any(not torch.equal(after[name], before[name]) for name in before)
    result.delta.save(tmp_path / "edit.safetensors")
    assert list(tmp_path.iterdir()) == [tmp_path / "edit.safetensors"]

    loaded = WeightDelta.load(tmp_path / "edit.safetensors")
    assert loaded.metadata == result.delta.metadata
    assert loaded.updates.keys() == result.delta.updates.keys()
    for name, update in loaded.updates.items():
        assert update.dtype == torch.float32
        assert torch.equal(update, result.delta.updates[name])
    assert not loaded.applied

    other = tiny_model("llama", dtype=dtype)
    for _ in range(2):
        loaded.apply(other)
        assert loaded.applied
        assert_holds(other, after)
        loaded.revert()
        assert not loaded.applied
        assert_holds(other, before)
    result.revert()
    assert_holds(model, before)
    result.delta.apply(model)
    assert_holds(model, after)


def test_file_is_plain_safetensors_that_says_what_it_is(edit: Callable[..., EditResult], tmp_path: Path) -> None:
    """In a folder that does not exist yet, readable by others as the umask allows."""
    path = tmp_path / "new" / "folder" / "edit.safetensors"
    model = tiny_model("llama")
    made_for = fingerprint(model)
    delta = edit(model).delta
    delta.save(path)
    assert load_file(path).keys() == delta.updates.keys()
    assert delta.metadata["method"] == "locft-bf"
    assert delta.metadata["config"]["lr"] == 1e-2
    assert delta.metadata["edits"] == 8
    assert delta.metadata["fingerprint"] == made_for
    assert delta.metadata["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    (tmp_path / "usual").touch()
    assert path.stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_applies_to_the_same_checkpoint_in_another_dtype(edit: Callable[..., EditResult]) -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    wide = tiny_model("llama", dtype=torch.bfloat16).float()
    before = state(wide)
    delta = edit(model).delta
    delta.revert()
    delta.apply(wide)
    for name, update in delta.updates.items():
        assert torch.equal(wide.get_parameter(name), before[name] + update)
    delta.revert()
    assert_holds(wide, before)


@DTYPES
def test_one_checkpoint_has_one_fingerprint(dtype: torch.dtype, tmp_path: Path) -> None:
    """Whatever dtype it is loaded in; any other has another, also one that differs in a quarter of a weight."""
    model = tiny_model("llama", dtype=dtype)
    wanted = fingerprint(model)
    model.save_pretrained(tmp_path)
    for loaded in (torch.bfloat16, torch.float32):
        assert fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=loaded)) == wanted
    assert fingerprint(tiny_model("llama", dtype=dtype, seed=1)) != wanted
    for name in ("model.norm.weight", "model.layers.3.mlp.down_proj.weight", "lm_head.weight"):
        for part in range(4):
            changed = tiny_model("llama", dtype=dtype)
            changed.get_parameter(name).data.chunk(4)[part].mul_(1.5)
            assert fingerprint(changed) != wanted, (name, part)


def test_refuses_another_model_unless_forced(edit: Callable[..., EditResult]) -> None:
    delta = edit(tiny_model("llama")).delta
    delta.revert()
    other = tiny_model("llama", seed=1)
    before = state(other)
    with pytest.raises(ModelError, match="fingerprint"):
        delta.apply(other)
    with pytest.raises(ModelError, match="NoneType is not a Hugging Face causal language model"):
        delta.apply(None)  # type: ignore[arg-type]
    assert_holds(other, before)
    assert not delta.applied
    delta.apply(other, force=True)
    name, update = next(iter(delta.updates.items()))
    assert torch.equal(other.get_parameter(name), before[name] + update)
    delta.revert()
    assert_holds(other, before)


def test_refuses_a_model_that_is_edited_already(edit: Callable[..., EditResult], tmp_path: Path) -> None:
    model = tiny_model("llama")
    result = edit(model)
    after = state(model)
    result.delta.save(tmp_path / "edit")
    with pytest.raises(ModelError, match="already applied"):
        result.delta.apply(model)
    with pytest.raises(ModelError, match="fingerprint"):
        WeightDelta.load(tmp_path / "edit").apply(model)
    assert_holds(model, after)


@pytest.mark.parametrize("force", [False, True])
def test_refuses_other_shapes_and_names_and_changes_nothing(force: bool) -> None:
    """Also when it is only the last of several weights that does not fit."""
    model = tiny_model("llama")
    before, good = state(model), "model.layers.0.mlp.down_proj.weight"
    for bad, shape, said in (
        ("model.layers.1.mlp.down_proj.weight", (32, 55), r"layers\.1.*\(32, 56\).*\(32, 55\)"),
        ("model.layers.4.mlp.down_proj.weight", (32, 56), r"no parameter model\.layers\.4"),
    ):
        updates = {good: torch.ones(32, 56), bad: torch.ones(shape)}
        delta = WeightDelta(updates, {"fingerprint": fingerprint(model)})
        with pytest.raises(ModelError, match=said):
            delta.apply(model, force=force)
        assert_holds(model, before)
        assert not delta.applied


def test_reverting_twice_is_an_error(edit: Callable[..., EditResult]) -> None:
    result = edit(tiny_model("llama"))
    result.revert()
    with pytest.raises(ModelError, match="nothing to revert"):
        result.revert()


@DTYPES
def test_stacked_edits_are_reverted_last_first(dtype: torch.dtype, edit: Callable[..., EditResult]) -> None:
    model = tiny_model("llama", dtype=dtype)
    states = [state(model)]
    first = edit(model)
    states.append(state(model))
    second = edit(model, salt=1)
    states.append(state(model))
    with pytest.raises(ModelError, match="revert the later edits first"):
        first.revert()
    assert_holds(model, states[2])
    assert first.delta.applied
    second.revert()
    assert_holds(model, states[1])
    first.revert()
    assert_holds(model, states[0])


def test_refuses_to_revert_weights_that_were_changed_by_hand(edit: Callable[..., EditResult]) -> None:
    """Also if it is the last of the weights of the edit: none is put back."""
    model = tiny_model("llama")
    result = edit(model)
    name = list(result.delta.updates)[-1]
    model.get_parameter(name).data[3, 4] += 1
    held = state(model)
    with pytest.raises(ModelError, match=name.replace(".", r"\.") + r" was changed .*or by something else \(undo that"):
        result.revert()
    assert_holds(model, held)
