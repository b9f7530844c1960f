"""Measures of an unedited model are taken once, and are the same from the cache."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_model

from fastedit import EditRequest
from fastedit.evaluation import baseline as module_under_test
from fastedit.evaluation.baseline import predict_unedited
from fastedit.evaluation.predict import Predictions, predict
from fastedit.evaluation.report import compare
from fastedit.models import Model

TEXT = ["w20 w21 w22 w23 w24 w25 w26 w27"]


@pytest.fixture
def model(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Model:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Model.of(tiny_model("llama", dtype=torch.bfloat16), tokenizer)


@pytest.fixture
def edits(make_edits: Callable[..., list[EditRequest]]) -> list[EditRequest]:
    found = make_edits(5)
    return [*found, replace(found[0], id="again")]  # equal questions share a state


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each time that a model was measured."""
    found: list[int] = []

    def counted(*args: Any, **options: Any) -> Predictions:
        found.append(1)
        return predict(*args, **options)

    monkeypatch.setattr(module_under_test, "predict", counted)
    return found


def files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").rglob("measured/*.safetensors"))


def same(one: Predictions, other: Predictions) -> bool:
    firsts = [[p.first for answers in found.answers for p in answers["neighbour"]] for found in (one, other)]
    states = all(torch.equal(a, b) for a, b in zip(*firsts, strict=True))  # type: ignore[arg-type]
    return one.answers == other.answers and one.perplexity == other.perplexity and states


def test_what_was_measured_once_is_the_same_from_the_cache(
    model: Model, edits: list[EditRequest], passes: list[int], tmp_path: Path
) -> None:
    plain = predict(model, edits, text=TEXT)
    assert same(predict_unedited(model, edits, text=TEXT), plain)
    assert len(passes) == 1
    again = predict_unedited(model, edits, text=TEXT, keep_head=True)
    assert len(passes) == 1
    assert same(again, plain)
    with torch.no_grad():  # the head too, which is compared with later
        next(iter(model.topology.head.parameters())).mul_(1.5)
    after = predict(model, edits, text=TEXT)
    wanted = compare(edits, after, replace(plain, head=again.head))
    assert wanted.metrics["kl"] is not None
    assert compare(edits, after, again).to_dict() == wanted.to_dict()
    (file,) = files(tmp_path)
    assert len(module_under_test.load_tensors(file, ("fastedit-predictions-2",), "it")[0]["first"]) == 10


@pytest.mark.parametrize(
    "change", ["weight", "buffer", "requests", "order", "text", "generate", "kinds", "config", "tokenizer"]
)
def test_another_question_is_asked(
    model: Model, edits: list[EditRequest], passes: list[int], tmp_path: Path, change: str
) -> None:
    options: dict[str, Any] = {"text": TEXT, "generate": False}
    predict_unedited(model, edits, **options)
    if change == "weight":  # a single bit, which no sample of values would show
        next(model.network.parameters()).data.view(torch.int16)[3, 5] ^= 1
    elif change == "buffer":
        next(model.network.buffers()).mul_(1.01)
    elif change == "tokenizer":
        other = deepcopy(model.tokenizer)
        other.add_tokens(["another"])
        model = Model.of(model.network, other)
    elif change == "config":
        model.topology.config.rms_norm_eps *= 2
    elif change == "requests":
        edits = [replace(edits[0], target="w20"), *edits[1:]]
    elif change == "order":
        edits = edits[::-1]
    else:
        options |= {
            "text": {"text": ["w30 w31 w32"]},
            "generate": {"generate": True},
            "kinds": {"kinds": ("rewrite",)},
        }[change]
    found = predict_unedited(model, edits, **options)
    assert len(passes) == 2
    assert same(found, predict(model, edits, **options))
    assert len(files(tmp_path)) == 2


def test_a_damaged_file_is_measured_and_written_anew(
    model: Model, edits: list[EditRequest], passes: list[int], tmp_path: Path
) -> None:
    predict_unedited(model, edits, generate=False)
    (file,) = files(tmp_path)
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    predict_unedited(model, edits, generate=False)
    assert len(passes) == 2
    predict_unedited(model, edits, generate=False)
    assert len(passes) == 2


def test_a_cache_that_cannot_be_written_is_done_without(
    model: Model, edits: list[EditRequest], passes: list[int], tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("a file")
    for n in (1, 2):
        assert same(predict_unedited(model, edits, generate=False), predict(model, edits, generate=False))
        assert len(passes) == n


def test_few_files_are_kept_and_no_large_ones(
    model: Model, edits: list[EditRequest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(10):
        predict_unedited(model, edits, text=[f"w20 w21 w{22 + n}"], generate=False)
    assert len(files(tmp_path)) == 8
    newest = {file.name for file in files(tmp_path)}
    monkeypatch.setattr(module_under_test, "_MOST_BYTES", 100)
    predict_unedited(model, edits, text=TEXT, generate=False)
    assert {file.name for file in files(tmp_path)} == newest
