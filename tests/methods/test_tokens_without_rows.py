"""Tokens that a tokenizer has and the model's embedding has no rows for: refused by name, before the model runs."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from helpers import moments, random_edits, tiny_model

from fastedit import ConfigError, Editor, EditRequest, ModelError, RequestError
from fastedit.models import Model
from fastedit.statistics.collect import collect

METHODS: dict[str, dict[str, Any]] = {
    "locft-bf": {"layer": 1, "lr": 1e-3, "augment": 2},
    "rome": {},
    "memit": {},
    "emmet": {},
    "alphaedit": {},
}
FINE = random_edits(2, 0)
IN_PROMPT = EditRequest("w20 <Lumbria> w21", "w22", "w20", id="in prompt")
IN_TARGET = EditRequest("w20 w21", "<Lumbria> <Lumbria> <Other>", "w20", id="in target")
NAMED = r"embedding has 97 rows and none for '<Lumbria>' \(97\)"


@pytest.fixture
def larger(tokenizer: Any) -> Any:
    found = deepcopy(tokenizer)
    found.add_tokens(["<Lumbria>", "<Other>"])
    return found


def unread(tokenizer: Any, *args: Any, **config: Any) -> Editor:
    """An Editor whose model must not run from now on."""
    model, made = tiny_model("llama"), list[Editor]()

    def fail(*_: Any) -> None:
        if made:  # a model with a hook is measured when it is loaded
            raise AssertionError("the model runs")

    model.register_forward_pre_hook(fail)
    made.append(Editor(model, tokenizer, *args, **config))
    return made[0]


@pytest.mark.parametrize("method", METHODS)
def test_edits_with_such_tokens_are_named(method: str, larger: Any) -> None:
    editor = unread(larger, method, **METHODS[method])
    with pytest.raises(
        RequestError, match=f"^2 edits cannot be used: edit in prompt: .*{NAMED}; call .*resize"
    ) as error:
        editor.edit([*FINE, IN_PROMPT, IN_TARGET])
    assert error.value.edits == ("edit in prompt", "edit in target")
    assert "'<Lumbria>' (97), '<Other>' (98); call model.resize_token_embeddings" in str(error.value)


def test_questions_and_texts_with_such_tokens_are_named(larger: Any) -> None:
    editor = unread(larger)
    asked = EditRequest("w20", "w21", id="r", neighbours=(("w22 <Lumbria>", "w23"),))
    with pytest.raises(RequestError, match=f"^request r, neighbour: .*{NAMED}"):
        editor.evaluate([*FINE, asked])
    with pytest.raises(RequestError, match=f"^document 1 .*text for perplexity: .*{NAMED}"):
        editor.evaluate(FINE, text=["w20 w21", "w22 <Lumbria>"])
    with pytest.raises(RequestError, match=f"^document 1 .*{NAMED}"):
        collect(Model.of(tiny_model("llama"), larger), ["w20 w21", "w22 <Lumbria>"], [1])


def test_settings_with_such_tokens_are_named(larger: Any, tmp_path: Path) -> None:
    anchored = {"layer": 1, "lr": 1e-3, "preserve": "anchors", "anchor_subjects": ("<Lumbria>",)}
    with pytest.raises(ConfigError, match=f"^anchor_subjects: .*{NAMED}"):
        Editor(tiny_model("llama"), larger, **anchored).edit(FINE)
    moments(model := tiny_model("llama"), tmp_path, 0)
    with pytest.raises(RequestError, match=f"after the context '<Lumbria> {{}}': .*{NAMED}"):
        Editor(model, larger, "rome", contexts=["<Lumbria> {}"], layers=(1,), statistics=tmp_path).plan(FINE)
    larger.add_special_tokens({"eos_token": "<end>"})
    with pytest.raises(ModelError, match=r"EOS token cannot be trained: .*'<end>' \(99\)"):
        Editor(tiny_model("llama"), larger, layer=1, lr=1e-3).edit(FINE)


def test_a_larger_tokenizer_does_no_harm(larger: Any, tokenizer: Any) -> None:
    options: dict[str, Any] = {"layer": 1, "lr": 1e-3, "epochs": 2, "tokens": "all", "preserve": "none"}
    wanted, found = (Editor(tiny_model("llama"), some, **options) for some in (tokenizer, larger))
    assert found.edit(FINE).losses == wanted.edit(FINE).losses
    assert found.evaluate(FINE).to_dict() == wanted.evaluate(FINE).to_dict()
