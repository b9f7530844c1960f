"""Folders that an Editor saves a model to or loads one from: whole or not at all, and only where they can serve."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from editing import CONFIG
from helpers import MakeEdits, assert_holds, files_of_at_most, state, tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fastedit import Editor, ModelError


def test_a_model_is_saved_whole_or_not_at_all(tokenizer: Any, tmp_path: Path) -> None:
    """A full disk leaves the old checkpoint, or nothing; and no temporary folder."""
    path, small = tmp_path / "models" / "one", 4096
    editor = Editor(tiny_model("llama"), tokenizer)
    with files_of_at_most(small), pytest.raises(ModelError, match=r"one: the model could not be saved"):
        editor.save_model(path)
    assert not list(path.parent.iterdir())
    editor.save_model(path)
    old = {p.name: p.read_bytes() for p in path.iterdir()}
    other = Editor(tiny_model("llama", seed=1), tokenizer)
    with files_of_at_most(small), pytest.raises(ModelError, match=r"one: the model could not be saved"):
        other.save_model(path)
    assert {p.name: p.read_bytes() for p in path.iterdir()} == old
    other.save_model(path)
    assert_holds(Editor.from_pretrained(path, device="cpu").model, state(other.model))
    assert list(path.parent.iterdir()) == [path]
    (tmp_path / "usual").touch()
    assert {p.stat().st_mode for p in path.iterdir()} == {(tmp_path / "usual").stat().st_mode}


def test_a_model_is_saved_to_the_folder_it_came_from(tokenizer: Any, make_edits: MakeEdits, tmp_path: Path) -> None:
    """Whose files may still be mapped as the weights."""
    Editor(tiny_model("llama"), tokenizer).save_model(tmp_path / "one")
    editor = Editor.from_pretrained(tmp_path / "one", device="cpu", **CONFIG | {"epochs": 2})
    result = editor.edit(make_edits(8))
    after = state(editor.model)
    result.save_model(tmp_path / "one")
    assert_holds(editor.model, after)
    assert_holds(Editor.from_pretrained(tmp_path / "one", device="cpu").model, after)


def test_a_folder_that_holds_the_model_s_own_is_not_replaced(tokenizer: Any, tmp_path: Path) -> None:
    """As a trainer's last checkpoint lies in the folder of its run."""
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoint-5"):
        Editor(tiny_model("llama"), tokenizer).save_model(folder)
    editor = Editor.from_pretrained(tmp_path / "run" / "checkpoint-5", device="cpu")
    with pytest.raises(ModelError, match=r"run would be replaced, and the model .*checkpoint-5 is inside it"):
        editor.save_model(tmp_path / "run")
    assert (tmp_path / "run" / "checkpoint-5" / "model.safetensors").is_file()


def test_a_folder_of_something_else_is_not_overwritten(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    editor = Editor(tiny_model("llama"), tokenizer)
    for path in (tmp_path, tmp_path / "notes"):
        with pytest.raises(ModelError, match="not a checkpoint"):
            editor.save_model(path)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("notes", "mine")]


def spoil(path: Path, how: str) -> None:
    """Make a checkpoint one that cannot be loaded."""
    weights, config = path / "model.safetensors", path / "config.json"
    changes = {
        "config that contradicts itself": {"num_attention_heads": 5},
        "config of fewer layers": {"num_hidden_layers": 2},
        "config of other shapes": {"intermediate_size": 40},
        "config with an unknown function": {"hidden_act": "w9"},
    }
    if how in changes:
        config.write_text(json.dumps(json.loads(config.read_text()) | changes[how]))
    if how.startswith("no "):
        for file in path.glob({"no config": "config.json", "no tokenizer": "tokenizer.json"}.get(how, "no such")):
            file.unlink()
    if how == "nothing in it":
        for file in path.iterdir():
            file.unlink()
    if how == "weights by a dead link":
        weights.unlink()
        weights.symlink_to(path / "gone")
    if how == "no such folder":
        path.rename(path.with_name("elsewhere"))
    elif how == "cut weights":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "empty weights":
        weights.write_bytes(b"")
    elif how == "a missing weight":
        tensors = load_file(weights)
        del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, weights, {"format": "pt"})
    elif how == "pickled weights":
        torch.save({"lm_head.weight": torch.ones(97, 32)}, path / "pytorch_model.bin")
        weights.unlink()
    elif how == "config is no JSON":
        config.write_text("{")
    elif how == "unknown type":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "brand-new"}))
    elif how == "unsupported architecture":
        about = {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 97, "state_size": 4}
        config.write_text(json.dumps(about))
        model = AutoModelForCausalLM.from_pretrained(path, config=None, use_safetensors=True)
        model.save_pretrained(path)


@pytest.mark.parametrize(
    "how",
    [
        "no such folder",
        "cut weights",
        "empty weights",
        "a missing weight",
        "pickled weights",
        "config is no JSON",
        "unknown type",
        "unsupported architecture",
        "config that contradicts itself",
        "config of fewer layers",
        "config of other shapes",
        "config with an unknown function",
        "no config",
        "no tokenizer",
        "nothing in it",
        "weights by a dead link",
    ],
)
def test_checkpoints_that_cannot_be_loaded_are_errors(how: str, tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "model"
    Editor(tiny_model("llama"), tokenizer).save_model(path)
    Editor.from_pretrained(path, device="cpu")
    spoil(path, how)
    reasons = {
        "config that contradicts itself": r".*hidden size \(32\) is not a multiple .* heads \(5\)",
        "config with an unknown function": "KeyError: 'w9'",
        "no config": "it lacks config.json$",
        "no tokenizer": "it lacks the tokenizer's files$",
        "nothing in it": r"it lacks config.json and weights as \*.safetensors and the tokenizer's files$",
        "weights by a dead link": "model.safetensors cannot be read: No such file",
    }
    expected = {
        "unsupported architecture": "has no attention and MLP that can be told apart",
        "a missing weight": "lacks 1 weights of its architecture, model.layers.1.mlp.up_proj.weight",
        "no such folder": f"^no folder {path}, and no model could be loaded from the hub: .",
        "config of fewer layers": f"{path} has 18 weights of blocks beyond the 2 .*, model.layers.2.input_layernorm",
        "config of other shapes": r"layers.0.mlp.down_proj.weight is (\[32, 56\], .*should be \[32, 40\]|of another)",
    }.get(how, f"no model could be loaded from {path}: " + reasons.get(how, "."))
    with pytest.raises(ModelError, match=expected):
        Editor.from_pretrained(path, device="cpu")


@pytest.mark.parametrize("family", ["gpt2", "gptj", "gpt_neox", "llama"])
def test_buffers_of_old_checkpoints_are_no_weights_too_many(family: str, tokenizer: Any, tmp_path: Path) -> None:
    """Causal masks and frequencies, which transformers once saved."""
    model = tiny_model(family)
    Editor(model, tokenizer).save_model(tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    paths = {"gpt_neox": "gpt_neox.layers.1.attention", "llama": "model.layers.1.self_attn"}
    attn = paths.get(family, "transformer.h.1.attn")
    names = ["rotary_emb.inv_freq"] if family == "llama" else ["bias", "masked_bias"]
    save_file(load_file(weights) | {f"{attn}.{name}": torch.ones(4) for name in names}, weights, {"format": "pt"})
    assert_holds(Editor.from_pretrained(tmp_path / "model", device="cpu").model, state(model))


@pytest.mark.parametrize("kind", ["llama", "brand-new"])
def test_code_in_a_checkpoint_is_never_run_nor_offered(
    kind: str, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, ran = tmp_path / "model", tmp_path / "ran"
    Editor(tiny_model("llama"), tokenizer).save_model(path)
    config = json.loads((path / "config.json").read_text())
    config |= {"model_type": kind, "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (path / "config.json").write_text(json.dumps(config))
    (path / "code.py").write_text(f"open({str(ran)!r}, 'w')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run code"))
    if kind == "llama":  # which needs no code
        Editor.from_pretrained(path, device="cpu")
    else:
        with pytest.raises(ModelError, match="no model could be loaded"):
            Editor.from_pretrained(path, device="cpu")
    assert not ran.exists()
