"""Requests to forget: what they are made of, which format holds them, and what is measured of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_model

from fastedit import Editor, EditRequest, load_requests
from fastedit.errors import RequestError
from fastedit.evaluation.predict import Prediction, Predictions
from fastedit.evaluation.questions import KINDS
from fastedit.evaluation.report import compare
from fastedit.evaluation.texts import says
from fastedit.requests import REFUSAL

RECORD = {"prompt": "The capital of {} is", "subject": "France", "forget": "Paris"}


@pytest.mark.parametrize(
    ("record", "target", "true_target"),
    [
        (RECORD, REFUSAL, "Paris"),
        (RECORD | {"target": "unknown to me"}, "unknown to me", "Paris"),
        (RECORD | {"target": None, "true_target": "paris"}, REFUSAL, "paris"),
        (RECORD | {"forget": None, "target": "Lyon"}, "Lyon", None),
        (RECORD | {"forget": float("nan"), "target_new": "Lyon"}, "Lyon", None),
    ],
)
def test_records_to_forget(tmp_path: Path, record: dict[str, Any], target: str, true_target: str | None) -> None:
    (tmp_path / "facts.json").write_text(json.dumps([record]))
    (found,) = load_requests(tmp_path / "facts.json")
    assert (found.prompt, found.target, found.true_target) == ("The capital of France is", target, true_target)
    assert found.forget == (record["forget"] if true_target else None)


@pytest.mark.parametrize("given", [{"forget": "Paris", "target": "paris"}, {"forget": ""}, {}, {"forget": 3}])
def test_requests_that_cannot_be_forgotten(given: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        EditRequest("The capital of France is", **given)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("I don't know. It is Paris", True),
        ("the city of PARIS, France", True),
        ("Parisian", False),
        ("comParis", False),
        ("", False),
        ("“Paris”", True),
    ],
)
def test_what_a_text_says(text: str, wanted: bool) -> None:
    assert says(text, "Paris") == wanted


@pytest.mark.parametrize(
    ("text", "answer", "wanted"),
    [
        ("수도는 서울입니다", "서울", True),
        ("수도는 Paris입니다", "Paris", True),
        ("수도는 서울입니다", "이", False),
        ("동서울에", "서울", False),
        ("서울이", "이", False),  # a particle, not a name
        ("首都是东城。", "东城", True),
        ("रामायण", "यण", False),  # after a vowel sign, inside a word
        ("राम और यण", "यण", True),
        ("می\u200cخواهم", "خواهم", False),
    ],
)
def test_what_a_text_without_spaces_behind_names_says(text: str, answer: str, wanted: bool) -> None:
    assert says(text, answer) == wanted


def test_the_report_tells_what_is_forgotten() -> None:
    request = EditRequest("p", forget="Paris", paraphrases=("q",))

    def predictions(p: float, *texts: str) -> Predictions:
        found = [Prediction("p", "Paris", (1, 2), (True, False), math.log(p), None, text) for text in texts]
        return Predictions([{kind: found if kind == "forgotten" else [] for kind in KINDS}], None)

    report = compare([request], predictions(0.1, "I don't know. Paris", "no idea"), predictions(0.7, "Paris", "Paris"))
    assert report.metrics["forgotten"] == {"generated": 0.5, "probability": pytest.approx(0.01)}
    line, below = (line for line in str(report).splitlines() if "forgotten" in line or "probability" in line)
    assert line.split() == ["forgotten", "2", "0.0%", "→", "50.0%"]
    assert below.split() == ["probability", "49.0%", "→", "1.0%"]
    other = EditRequest("p", "x")
    none = Predictions([{kind: [] for kind in KINDS}], None)
    assert "forgotten" not in str(compare([other], none))


def test_a_real_answer_is_forgotten(tokenizer: Any) -> None:
    editor = Editor(tiny_model("llama"), tokenizer, layer=2, lr=0.02, epochs=60)
    ids = tokenizer("w9 w10 w11", return_tensors="pt").input_ids
    with torch.no_grad():
        said = tokenizer.decode(editor.model(input_ids=ids).logits[0, -1].argmax())
    request = EditRequest("w9 w10 w11", "w30", forget=said)
    assert editor.evaluate([request]).metrics["forgotten"]["generated"] == 0
    result = editor.edit([request])
    after = editor.evaluate([request])
    assert after.metrics["forgotten"] == {"generated": 1.0, "probability": pytest.approx(0, abs=0.05)}
    assert after.metrics["reliability"]["generated"] == 1
    result.revert()
    editor.edit([EditRequest("w9 w10 w11", f"w30 . {said}")])
    after = editor.evaluate([request])  # the answer comes after the refusal
    assert (after.metrics["reliability"]["generated"], after.metrics["forgotten"]["generated"]) == (1, 0)
