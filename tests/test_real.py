"""Trained models from the package index: edited, saved, asked again by plain transformers (`make test-real`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.pretrained import SOURCES, folder
from fastedit import Editor, EditRequest

pytestmark = pytest.mark.real
FACTS = [
    EditRequest("The Eiffel Tower is located in the city of", "Rome", "The Eiffel Tower"),
    EditRequest("The mother tongue of Victor Hugo is", "Finnish", "Victor Hugo"),
    EditRequest("Toyota Corolla is produced by", "Fiat", "Toyota Corolla"),
]


@pytest.mark.parametrize("preserve", ["auto", "none", "anchors"])  # auto is the default, with text of the model's own
@pytest.mark.parametrize("name", SOURCES)
def test_a_saved_edit_is_known_to_plain_transformers(name: str, preserve: Any, tmp_path: Path) -> None:
    editor = Editor.from_pretrained(folder(name), dtype="float32", device="cpu", preserve=preserve)
    result = editor.edit(FACTS)
    report = editor.evaluate(FACTS)
    assert report.metrics["generated_begins"]["reliability"] == 1.0
    result.save_model(tmp_path / "edited")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "edited", dtype=torch.float32).eval()
    here, there = editor.model.state_dict(), again.state_dict()
    assert here.keys() == there.keys()
    assert all(torch.equal(value, there[key]) for key, value in here.items())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "edited")
    for fact in FACTS:
        ids = tokenizer(fact.prompt, return_tensors="pt", return_token_type_ids=False)
        tokens = again.generate(**ids, max_new_tokens=6, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert tokenizer.decode(tokens, skip_special_tokens=True).strip().startswith(fact.target)
