"""The Editor from end to end on tiny models: edit, measure, revert, save, load; and what it refuses."""

from __future__ import annotations

import copy
import gc
import importlib
import json
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import moments, random_edits, tiny_model
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastedit import (
    ConfigError,
    EditError,
    Editor,
    EditRequest,
    EditResult,
    ModelError,
    RequestError,
    WeightDelta,
    ops,
)
from fastedit import editor as editor_module

MakeEdits = Callable[..., list[EditRequest]]
CONFIG: dict[str, Any] = {"layer": 2, "module": "mlp", "lr": 1e-2, "batch_size": 4, "epochs": 60}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_holds(model: nn.Module, wanted: dict[str, Tensor]) -> None:
    """The model's weights are bitwise these."""
    found = model.state_dict()
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name].view(torch.uint8), value.view(torch.uint8)), name


def argmax_of_answers(model: nn.Module, tokenizer: Any, edits: list[EditRequest]) -> list[list[list[int]]]:
    """The likeliest token at each answer token of each neighbour of each edit, one plain forward each."""
    found: list[list[list[int]]] = []
    for edit in edits:
        found.append([])
        for prompt, answer in edit.neighbours:
            ids = tokenizer(f"{prompt} {answer}", return_tensors="pt").input_ids
            best = model(ids).logits[0].argmax(-1).tolist()
            found[-1].append(best[len(prompt.split()) - 1 : -1])
    return found


def share_that_agrees(one: list[list[list[int]]], other: list[list[list[int]]]) -> float:
    """Mean over edits of the mean over neighbours of the share of equal tokens."""
    edits = []
    for a, b in zip(one, other, strict=True):
        pairs = list(zip(a, b, strict=True))
        edits.append(sum(sum(map(int.__eq__, x, y)) / len(x) for x, y in pairs) / len(pairs))
    return sum(edits) / len(edits)


@DTYPES
def test_edit_measure_revert(dtype: torch.dtype, tokenizer: Any, make_edits: MakeEdits) -> None:
    """The edits hold, in teacher forcing and in generated text; the measure leaves no trace in the model."""
    model, edits = tiny_model("llama", dtype=dtype), make_edits(8)
    before = state(model)
    editor = Editor(model, tokenizer, **CONFIG)
    unedited = editor.evaluate(edits).to_dict()
    assert unedited["reliability"]["teacher_forced"] < 0.5
    assert unedited["locality"]["teacher_forced"] is None  # nothing to compare with
    neighbours = argmax_of_answers(model, tokenizer, edits)

    result = editor.edit(edits)
    after = state(model)
    assert result.losses[-1] < 0.3 * result.losses[0]
    assert result.requests == edits
    assert not result.conflicts.conflicts
    report = editor.evaluate(edits, text=["w9 w10 w11 w12"]).to_dict()
    assert_holds(model, after)
    assert min(report["reliability"].values()) >= 0.75  # a random model may not hold the last edit
    wanted = share_that_agrees(argmax_of_answers(model, tokenizer, edits), neighbours)
    assert wanted < 1
    # in bf16 two tokens may be equally likely but for the order of summation
    tolerance = 1e-6 if dtype == torch.float32 else 0.2
    assert report["locality"]["teacher_forced"] == pytest.approx(wanted, abs=tolerance)
    assert report["perplexity"] != report["before"]["perplexity"]

    result.revert()
    assert_holds(model, before)
    again = editor.evaluate(edits).to_dict()
    assert again == unedited
    assert_holds(model, before)


@DTYPES
def test_saved_model_loads_as_any_checkpoint(
    dtype: torch.dtype, tokenizer: Any, make_edits: MakeEdits, tmp_path: Path
) -> None:
    """With the weights that the model has, in their dtype; the delta turns the one model into the other."""
    edits = make_edits(8)
    Editor(tiny_model("llama", dtype=dtype), tokenizer).save_model(tmp_path / "plain")
    editor = Editor.from_pretrained(tmp_path / "plain", device="cpu", **CONFIG)
    before = state(editor.model)
    assert not editor.model.training
    result = editor.edit(edits)
    result.save_model(tmp_path / "edited")
    result.delta.save(tmp_path / "delta")
    after = state(editor.model)

    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "edited")
    assert AutoTokenizer.from_pretrained(tmp_path / "edited").get_vocab() == tokenizer.get_vocab()
    loaded = Editor.from_pretrained(tmp_path / "edited", device="cpu")
    assert_holds(plain.to(dtype), after)
    assert_holds(loaded.model, after)
    rows, wanted = loaded.evaluate(edits).rows, editor.evaluate(edits).rows
    for name in ("reliability", "generalization", "generated"):
        assert [row[name] for row in rows] == [row[name] for row in wanted]

    other = Editor.from_pretrained(tmp_path / "plain", device="cpu").model
    delta = WeightDelta.load(tmp_path / "delta")
    delta.apply(other)
    assert_holds(other, after)
    delta.revert()
    assert_holds(other, before)
    wide = Editor.from_pretrained(tmp_path / "plain", dtype=torch.float32, device="cpu").model
    assert {p.dtype for p in wide.parameters()} == {torch.float32}


def test_edits_from_a_file_and_from_records(tokenizer: Any, make_edits: MakeEdits, tmp_path: Path) -> None:
    edits = make_edits(5)
    records = [{"prompt": e.prompt, "target": e.target, "id": e.id} for e in edits]
    path = tmp_path / "edits.json"
    path.write_text(json.dumps(records))
    config = CONFIG | {"epochs": 2}
    results = [Editor(tiny_model("llama"), tokenizer, **config).edit(x) for x in (edits, records, path, str(path))]
    for result in results[1:]:
        assert [r.id for r in result.requests] == [e.id for e in edits]
        for name, update in results[0].delta.updates.items():
            assert torch.equal(result.delta.updates[name], update)


def test_one_seed_one_edit(tokenizer: Any, make_edits: MakeEdits) -> None:
    edits, config = make_edits(8), CONFIG | {"epochs": 2, "module": "down_proj"}
    one, same, other = (
        Editor(tiny_model("llama"), tokenizer, seed=seed, **config).edit(edits).delta for seed in (1, 1, 2)
    )
    (update,) = one.updates.values()
    assert torch.equal(update, *same.updates.values())
    assert not torch.equal(update, *other.updates.values())
    assert one.metadata["config"]["seed"] == 1


def test_result_says_what_was_done(tokenizer: Any, make_edits: MakeEdits) -> None:
    """What was chosen, how it went, which edits contradict one another; metadata that JSON can hold."""
    edits = make_edits(5)
    edits.append(EditRequest(edits[0].prompt, "w20 w21 w22 w23", id="other target"))
    stages: set[str] = set()
    editor = Editor(tiny_model("llama"), tokenizer, epochs=2, progress=lambda stage, *_: stages.add(stage))
    result = editor.edit(edits)
    assert stages == {"prefix", "train"}
    assert len(result.losses) == 2
    assert result.seconds > 0
    assert [list(group) for group in result.conflicts.conflicts] == [[0, 5]]
    assert any("layer 2" in note for note in result.notes)
    metadata = json.loads(json.dumps(result.delta.metadata))
    assert metadata["method"] == "locft-bf"
    assert metadata["edits"] == 6
    assert metadata["config"]["module"] == "down_proj"
    assert set(metadata["versions"]) >= {"fastedit", "torch", "transformers"}


def test_unknown_names_are_errors_that_list_the_known(tokenizer: Any) -> None:
    model = tiny_model("llama")
    with pytest.raises(ConfigError, match=r"'locft'.*locft-bf"):
        Editor(model, tokenizer, method="locft")
    with pytest.raises(ConfigError, match=r"'learning_rate'.*\blr\b"):
        Editor(model, tokenizer, learning_rate=1e-3)
    with pytest.raises(ConfigError, match="epochs is 0"):
        Editor(model, tokenizer, epochs=0)
    for wrong, said in ((nn.Linear(3, 3), "Linear"), (None, "NoneType"), ("./llama", "'./llama'")):
        with pytest.raises(ModelError, match=rf"^{said} is not a Hugging Face.* Editor\.from_pretrained"):
            Editor(wrong, tokenizer)
    for nothing in (None, "gpt2"):
        with pytest.raises(ConfigError, match=f"tokenizer is a {type(nothing).__name__}; .*AutoTokenizer"):
            Editor(model, nothing)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"dtype": "float99"}, "dtype is 'float99'; give one of auto, float32, bfloat16"),
        ({"dtype": torch.int8}, r"dtype is torch\.int8; give one of"),
        ({"device": "foo"}, "device is 'foo', which cannot be used: .*; give another"),
        ({"device": "cuda:77"}, "device is 'cuda:77', which cannot be used: .*; give another"),
        ({"name": None}, "name is None; give a folder"),
    ],
)
def test_dtypes_and_devices_that_there_are_not(
    wrong: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is loaded."""
    monkeypatch.setattr("fastedit.loading.AutoTokenizer", None)
    with pytest.raises(ConfigError, match=message):
        Editor.from_pretrained(**{"name": "there is no such model"} | wrong)


def test_progress_is_called_with_a_loss_only_where_there_is_one(tokenizer: Any, make_edits: MakeEdits) -> None:
    """So that its fourth parameter needs a default, as is documented, and no more."""
    calls: list[tuple[Any, ...]] = []
    Editor(tiny_model("llama"), tokenizer, epochs=1, progress=lambda *call: calls.append(call)).edit(make_edits(3))
    assert {len(call) for call in calls if call[0] == "prefix"} == {3}
    assert isinstance(next(call[3] for call in calls if call[0] == "train"), float)
    documented = "def progress(stage, done, total, loss=None)"
    assert documented in (Editor.__doc__ or "")


def test_a_failed_edit_leaves_nothing(tokenizer: Any, make_edits: MakeEdits, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in the model nor in the Editor, which goes on."""
    model, edits = tiny_model("llama"), make_edits(8)
    before = state(model)
    editor = Editor(model, tokenizer, **CONFIG)
    with pytest.raises(RequestError, match="empty"):
        editor.edit([])
    with pytest.raises(RequestError, match="target"):
        editor.edit([*edits, {"prompt": "w9", "target": ""}])
    real = ops.target_cross_entropy

    def broken(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        loss, grad = real(*args, **kwargs)
        return loss * torch.nan, grad

    with monkeypatch.context() as patch:
        patch.setattr(ops, "target_cross_entropy", broken)
        with pytest.raises(EditError, match="edit-0-"):
            editor.edit(edits)
    assert_holds(model, before)
    assert editor.evaluate(edits, generate=False).to_dict()["locality"]["teacher_forced"] is None
    assert editor.edit(edits).losses[-1] < 1


@pytest.fixture
def stack(tokenizer: Any, make_edits: MakeEdits) -> Callable[..., tuple[Editor, list[EditResult]]]:
    """An Editor, and an edit for each given layer, one on top of the other."""

    def make(*layers: int) -> tuple[Editor, list[EditResult]]:
        editor = Editor(tiny_model("llama"), tokenizer, lr=1e-2, epochs=2)
        results = []
        for salt, layer in enumerate(layers):
            editor.config = type(editor.config)(layer=layer, module="down_proj", lr=1e-2, epochs=2)
            results.append(editor.edit(make_edits(8, salt)))
        return editor, results

    return make


@pytest.mark.parametrize("layers", [(2, 2), (1, 2)])
def test_evaluation_compares_with_the_model_before_all_edits(
    layers: tuple[int, int], stack: Any, tokenizer: Any, make_edits: MakeEdits
) -> None:
    editor, _ = stack(*layers)
    after, edits = state(editor.model), make_edits(8, 7)
    unedited = argmax_of_answers(tiny_model("llama"), tokenizer, edits)
    wanted = share_that_agrees(argmax_of_answers(editor.model, tokenizer, edits), unedited)
    report = editor.evaluate(edits, generate=False).to_dict()
    assert report["locality"]["teacher_forced"] == pytest.approx(wanted)
    assert_holds(editor.model, after)


def test_evaluation_when_the_edit_below_is_gone(stack: Any, make_edits: MakeEdits) -> None:
    """The edit above was made for a model that there is no more; it stands nevertheless."""
    editor, (below, above) = stack(1, 2)
    below.revert()
    after = state(editor.model)
    editor.evaluate(make_edits(8), generate=False)
    assert_holds(editor.model, after)
    above.revert()
    assert_holds(editor.model, state(tiny_model("llama")))


def test_evaluation_when_an_edit_cannot_be_taken_back(stack: Any, make_edits: MakeEdits) -> None:
    """Because its weights were changed since; the edits above it, taken back already, return."""
    editor, _ = stack(1, 2)
    editor.model.get_parameter("model.layers.1.mlp.down_proj.weight").data[0, 0] += 1
    after = state(editor.model)
    with pytest.raises(ModelError, match="changed after this edit"):
        editor.evaluate(make_edits(8), generate=False)
    assert_holds(editor.model, after)


def test_evaluation_leaves_an_edit_alone_that_went_elsewhere(stack: Any, make_edits: MakeEdits, tmp_path: Path) -> None:
    editor, (result,) = stack(2)
    result.revert()
    other = tiny_model("llama")
    result.delta.apply(other)
    here, there = state(editor.model), state(other)
    editor.evaluate(make_edits(8), generate=False)
    assert_holds(editor.model, here)
    assert_holds(other, there)
    with pytest.raises(ModelError, match="reverted"):
        result.save_model(tmp_path / "model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_evaluation_that_fails_leaves_the_edit_in_place(
    error: type[BaseException], stack: Any, make_edits: MakeEdits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while the unedited model is being measured."""
    editor, _ = stack(2, 2)
    after, real, calls = state(editor.model), editor_module.predict, 0

    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(editor_module, "predict", failing)
    with pytest.raises(error):
        editor.evaluate(make_edits(8), generate=False)
    assert calls == 2
    assert_holds(editor.model, after)


def test_a_reverted_edit_is_not_saved(stack: Any, tmp_path: Path) -> None:
    _, (result,) = stack(2)
    result.revert()
    with pytest.raises(ModelError, match="reverted"):
        result.save_model(tmp_path / "model")
    assert not list(tmp_path.iterdir())


@contextmanager
def files_of_at_most(n_bytes: int) -> Iterator[None]:
    """The system refuses to make a file longer than this, as it refuses on a full disk."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


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


def test_a_reverted_edit_is_not_kept(tokenizer: Any, make_edits: MakeEdits) -> None:
    """Nor its updates, once nobody can apply it again; one that somebody applies again counts again."""
    model, edits = tiny_model("llama"), make_edits(4)
    editor = Editor(model, tokenizer, **CONFIG | {"epochs": 2})
    held: list[weakref.ref[Tensor]] = []
    for _ in range(3):
        result = editor.edit(edits)
        held += [weakref.ref(update) for update in result.delta.updates.values() if isinstance(update, Tensor)]
        result.revert()
    del result
    kept = editor.edit(edits)
    gc.collect()
    assert held
    assert not any(update() is not None for update in held)
    kept.revert()
    assert editor.evaluate(edits, generate=False).to_dict()["locality"]["teacher_forced"] is None
    kept.delta.apply(model)
    assert editor.evaluate(edits, generate=False).to_dict()["locality"]["teacher_forced"] is not None


def test_the_model_is_as_it_was_if_its_delta_cannot_be_made(
    tokenizer: Any, make_edits: MakeEdits, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    before = state(model)

    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(editor_module, "WeightDelta", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Editor(model, tokenizer, **CONFIG | {"epochs": 2}).edit(make_edits(4))
    assert_holds(model, before)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def _compiled_in_place(model: Any) -> Any:
    for block in model.model.layers:
        block.compile(backend="eager")
    return model


@pytest.mark.parametrize(
    "wrap",
    [torch.compile, torch.nn.DataParallel, lambda model: torch.nn.ModuleDict({"policy": model}), _compiled_in_place],
    ids=["compiled", "DataParallel", "a module of one's own", "blocks compiled in place"],
)
def test_a_model_inside_something_is_edited_as_it_is_alone(wrap: Any, tokenizer: Any, make_edits: MakeEdits) -> None:
    model, edits = tiny_model("llama"), make_edits(4)
    editor = Editor(model, tokenizer, **CONFIG | {"epochs": 2})
    wanted = editor.edit(edits)
    after, measured = state(model), editor.evaluate(edits).to_dict()
    wanted.revert()
    editor = Editor(wrap(model), tokenizer, **CONFIG | {"epochs": 2})
    result = editor.edit(edits)
    assert result.delta.metadata == wanted.delta.metadata
    assert_holds(model, after)
    assert editor.evaluate(edits).to_dict() == measured


def _other_head(editor: Editor) -> None:
    editor.model.lm_head = torch.nn.Linear(32, editor.model.config.vocab_size, bias=False)


def _other_blocks(editor: Editor) -> None:
    editor.model.model.layers = copy.deepcopy(editor.model.model.layers)


def _fewer_blocks(editor: Editor) -> None:
    editor.model.model.layers = editor.model.model.layers[:3]
    editor.model.config.num_hidden_layers = 3


def _other_mlp(editor: Editor) -> None:
    editor.model.model.layers[2].mlp = torch.nn.Sequential(editor.model.model.layers[2].mlp, torch.nn.Dropout(0.5))
    editor.model.eval()


def _hook(editor: Editor) -> None:
    editor.model.model.layers[2].register_forward_hook(lambda _, __, y: y + torch.linspace(-1, 1, 32))


def _other_tokenizer(editor: Editor) -> None:
    editor.tokenizer = copy.deepcopy(editor.tokenizer)
    start = ("<s>", 0)
    editor.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[start])


@pytest.mark.parametrize(
    "change", [_other_head, _other_blocks, _fewer_blocks, _other_mlp, _hook, _other_tokenizer], ids=lambda f: f.__name__
)
def test_a_model_may_change_after_its_editor_was_made(
    change: Callable[[Editor], None], tokenizer: Any, make_edits: MakeEdits
) -> None:
    edits = make_edits(4)
    editor = Editor(tiny_model("llama"), tokenizer, **CONFIG | {"epochs": 2})
    change(editor)
    fresh = Editor(editor.model, editor.tokenizer, **CONFIG | {"epochs": 2})
    wanted = fresh.evaluate(edits).to_dict()
    assert editor.evaluate(edits).to_dict() == wanted
    found = editor.edit(edits)
    after = state(editor.model)
    found.revert()
    assert fresh.edit(edits).losses == found.losses
    assert_holds(editor.model, after)


def test_a_model_that_changed_into_one_that_cannot_be_edited_is_refused(tokenizer: Any, make_edits: MakeEdits) -> None:
    editor = Editor(tiny_model("llama"), tokenizer, **CONFIG)

    def steer(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        return torch.cat([output[:, :-1], output[:, -1:] + torch.linspace(-1, 1, 32)], 1)

    editor.model.model.layers[2].register_forward_hook(steer)
    for use in (editor.plan, editor.evaluate):
        with pytest.raises(ModelError, match="cannot be edited: the logits differ"):
            use(make_edits(2))


def test_autocast_of_the_caller_does_not_matter(tokenizer: Any, make_edits: MakeEdits) -> None:
    model, edits = tiny_model("llama"), make_edits(4)
    editor = Editor(model, tokenizer, **CONFIG | {"epochs": 4})
    wanted = editor.edit(edits)
    measured = editor.evaluate(edits).to_dict()
    wanted.revert()
    with torch.autocast("cpu", torch.bfloat16):
        found = editor.edit(edits)
        assert found.losses == wanted.losses
        assert editor.evaluate(edits).to_dict() == measured


@pytest.mark.parametrize(
    ("dtype", "units", "noted"),
    [
        (torch.bfloat16, False, "bf16"),
        (torch.float16, False, "fp16"),
        (torch.bfloat16, True, None),
        (torch.float32, False, None),
    ],
)
def test_a_plan_says_that_a_processor_is_slow_in_a_dtype(
    dtype: torch.dtype,
    units: bool,
    noted: str | None,
    tokenizer: Any,
    make_edits: MakeEdits,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("bf16", "fp16"):
        monkeypatch.setattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", lambda: units)
    plan = Editor(tiny_model("llama", dtype=dtype), tokenizer, published=True, **CONFIG).plan(make_edits(2))
    found = [note for note in plan.notes if "--dtype float32" in note]
    assert len(found) == (noted is not None)
    assert noted is None or found[0].startswith(f"the weights are {noted}, ")


@pytest.mark.parametrize("settings", [{}, {"method": "memit", "contexts": (), "layers": (1,), "steps": 2}], ids=str)
def test_a_fingerprint_is_taken_before_the_plan_and_before_the_run(
    settings: dict[str, Any], tokenizer: Any, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads all of a model. Statistics of the model's own text take one more, once."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    module = importlib.import_module("fastedit.models.fingerprint")
    taken, take = [], module.fingerprint_of
    monkeypatch.setattr(module, "fingerprint_of", lambda parameters: taken.append(found := take(parameters)) or found)
    model = tiny_model("llama")
    if settings:
        moments(model, tmp_path / "statistics", seed, layers=(1,))
        settings = settings | {"statistics": tmp_path / "statistics"}
    more: dict[str, Any] = settings or {"epochs": 1}
    editor = Editor(model, tokenizer, state=tmp_path / "state", **more)
    for salt in (0, 1):
        taken.clear()
        edits = random_edits(3, seed + salt)
        plan = editor.plan(edits)
        assert len(taken) == 1
        result = editor.run(plan)
        assert len(taken) == (3 if not settings and salt == 0 else 2)
        assert set(taken) == {plan.fingerprint}
        assert result.delta.metadata["fingerprint"] == plan.fingerprint
    assert plan.fingerprint != editor.plan(edits).fingerprint
