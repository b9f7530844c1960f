"""Edits on top of one another: measured against the model before all of them, and taken back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from editing import argmax_of_answers, share_that_agrees
from helpers import MakeEdits, assert_holds, state, tiny_model

from fastedit import Editor, EditResult, ModelError
from fastedit import editor as editor_module


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
