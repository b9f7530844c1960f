"""Models that are inside something, or change after their Editor was made."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from editing import CONFIG
from helpers import MakeEdits, assert_holds, moments, random_edits, state, tiny_model
from tokenizers.processors import TemplateProcessing

from fastedit import Editor, ModelError


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
