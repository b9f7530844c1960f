"""Trained models from the package index: edited, saved, asked again by plain transformers (`make test-real`)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.pretrained import SOURCES, folder
from benchmarks.real_models import layers_of
from benchmarks.rows import ROOT
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


@pytest.fixture(scope="module", params=SOURCES)
def with_statistics(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folders of a model and of its statistics of 6,000 tokens of our guide."""
    model, made = folder(request.param), tmp_path_factory.mktemp(request.param)
    layers = ",".join(map(str, layers_of(Editor.from_pretrained(model, dtype="float32", device="cpu"))))
    command = ["covariance", "--model", model, "--layers", layers, "--tokens", "6000", "--output", made / "moments"]
    (made / "guide.txt").write_text(guide(), encoding="utf-8")
    subprocess.run([sys.executable, "-m", "fastedit", *map(str, command), "--text", made / "guide.txt"], check=True)
    return model, made / "moments"


def guide() -> str:
    return "".join(page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs" / "pages").glob("*.md")))


@pytest.mark.parametrize("method", ["memit", "emmet", "rome", "alphaedit"])
def test_a_solver_writes_and_does_not_ruin_the_text(method: str, with_statistics: tuple[Path, Path]) -> None:
    """In Gemma 3, a change of the residual stream that is put before the norm of the MLP makes perplexity 956 times."""
    model, statistics = with_statistics
    editor = Editor.from_pretrained(model, method, dtype="float32", device="cpu", statistics=str(statistics))
    text = guide()[-8000:]
    before = editor.evaluate(FACTS, text=[text], generate=False).metrics["perplexity"]
    editor.edit(FACTS)
    metrics = editor.evaluate(FACTS, text=[text], generate=False).metrics
    assert metrics["reliability"]["teacher_forced"] >= 2 / 3
    assert metrics["perplexity"] < 1.15 * before
