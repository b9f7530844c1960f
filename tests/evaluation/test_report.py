"""The report that is made of measures: shares, scores, locality, and its file."""

from __future__ import annotations

import errno
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from asking import TWO, answers, measured, said, some_requests
from helpers import tiny_model

from fastedit.errors import FastEditError, RequestError
from fastedit.evaluation.predict import Predictions
from fastedit.evaluation.report import compare
from fastedit.requests import EditRequest


def test_shares_are_means_over_requests() -> None:
    rephrased = [said("10"), said("0", "y"), said("0", "y"), said("00")]
    one = answers(rewrite=[said("1100")], paraphrase=rephrased)
    two = answers(rewrite=[said("1", "y")], paraphrase=[said("1")], portability=[said("10", "The X.")])
    report = compare(TWO, Predictions([one, two], 7.0))
    assert report.metrics["reliability"] == {"teacher_forced": 0.75, "generated": 0.5}
    assert report.metrics["generalization"] == {"teacher_forced": (1 / 8 + 1) / 2, "generated": 0.75}
    assert report.metrics["portability"] == {"teacher_forced": 0.5, "generated": 1.0}
    assert (report.metrics["perplexity"], report.before, report.n["paraphrase"]) == (7.0, None, 5)
    assert [(row["id"], row["reliability"]["generated"]) for row in report.rows] == [("one", 1), ("two", 0)]


def test_what_begins_with_the_answer_counts_beside_the_strict_match() -> None:
    more = [said(text="X, and y"), said(text="xy"), said(text=None)]
    one = answers(rewrite=[said(text="x of y")], paraphrase=more, neighbour=[said(text="y x")])
    two = answers(rewrite=[said(text="y")], portability=[said(text="The X")])
    report = compare(TWO, Predictions([one, two], None), Predictions([two, one], None))
    begins = {"reliability": 0.5, "generalization": 0.5, "portability": 1, "neighbour_accuracy": 0}
    assert report.metrics["generated_begins"] == begins
    assert report.before is not None
    assert report.before["generated_begins"] == begins
    assert report.metrics["reliability"]["generated"] == report.metrics["generalization"]["generated"] == 0
    assert [row["generated_begins"]["reliability"] for row in report.rows] == [1, 0]
    lines = [line.split() for line in str(report).splitlines()]
    assert [line[3:] for line in lines if line[:3] == ["begins", "with", "it"]] == [
        ["50.0%", "→", "50.0%"], ["50.0%", "→", "50.0%"], ["100.0%", "→", "100.0%"], ["0.0%", "→", "0.0%"]
    ]  # fmt: skip


def test_scores() -> None:
    def report(es: float | None, ps: float | None, ns: list[float | None]) -> Any:
        neighbours = [said(other=x) for x in ns]
        both = answers(rewrite=[said(other=es)], paraphrase=[said(other=ps)], neighbour=neighbours)
        return compare([EditRequest("p", "x")], Predictions([both], None))

    found = report(-1.5, -3.0, [-2.0, -0.5, -1.0, None]).metrics  # a tie is no preference
    assert (found["es"], found["ps"], found["ns"]) == (1, 1, pytest.approx(1 / 3))
    assert found["score"] == pytest.approx(3 / (1 + 1 + 3))
    assert report(-1.5, -0.5, [-2.0]).metrics["score"] == 0
    absent = report(None, -2.0, [-2.0])
    assert (absent.metrics["es"], absent.metrics["score"]) == (None, None)
    assert (absent.n["es"], absent.n["ps"], absent.n["ns"]) == (0, 1, 1)


def test_an_answer_does_not_compete_with_itself() -> None:
    request = EditRequest("ab", "sea", true_target="sea", neighbours=(("cd", "sea"), ("cd", "red")))
    found = measured(tiny_model("llama"), [request], generate=False).answers[0]
    assert found["rewrite"][0].other_logp is None
    assert [p.other_logp is None for p in found["neighbour"]] == [True, False]


def test_locality_is_agreement_with_the_model_before() -> None:
    one = answers(neighbour=[said("00", "Red sea.", (1, 2)), said("1", "y", (3,))])
    after = [one, answers(neighbour=[said("1", None, (4,))])]
    one = answers(neighbour=[said("11", "the red  sea", (9, 2)), said("1", "z", (3,))])
    before = [one, answers(neighbour=[said("0", "y", (8,))])]
    report = compare(TWO, Predictions(after, 8.0), Predictions(before, 6.5))
    assert report.metrics["locality"] == {"teacher_forced": (0.75 + 0) / 2, "generated": 0.5}
    assert report.metrics["neighbour_accuracy"]["teacher_forced"] == (0.5 + 1) / 2
    assert report.before is not None
    assert (report.before["neighbour_accuracy"]["teacher_forced"], report.before["perplexity"]) == (0.5, 6.5)
    assert "6.5 → 8" in str(report)
    assert "50.0% → 75.0%" in str(report)
    other = [answers(neighbour=[replace(p, prompt="q") for p in a["neighbour"]]) for a in before]
    with pytest.raises(RequestError, match="not of the same requests"):
        compare(TWO, Predictions(after, None), Predictions(other, None))


def test_the_same_model_before_and_after_is_local() -> None:
    model, requests = tiny_model("llama"), some_requests()[:3]
    before = measured(model, requests, kinds=("neighbour",))
    assert {kind for a in before.answers for kind, found in a.items() if found} == {"neighbour"}
    same = compare(requests, measured(model, requests), before)
    assert same.metrics["locality"] == {"teacher_forced": 1.0, "generated": 1.0}
    changed = compare(requests, measured(tiny_model("llama", seed=1), requests), before)
    assert changed.metrics["locality"]["teacher_forced"] < 0.5


def test_what_is_absent_is_a_dash() -> None:
    table = str(compare([EditRequest("p", "x")], Predictions([answers(rewrite=[said("10")])], None)))
    cells = {line.strip().split("  ")[0]: line.split()[-2:] for line in table.splitlines()[2:]}
    assert cells["reliability"] == ["50.0%", "100.0%"]
    assert all(cells[name] == ["—", "—"] for name in ("generalization", "locality", "neighbour accuracy"))
    assert all(cells[name][-1] == "—" for name in ("portability", "ES", "PS", "NS", "score", "perplexity"))


def test_the_saved_report_is_whole_or_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [answers(rewrite=[said()]), answers(rewrite=[said("0")])]
    report = compare(TWO, Predictions(found, 3.0))
    report.save(path := tmp_path / "report.json")
    saved = json.loads(path.read_text(encoding="utf-8"))
    assert [row["reliability"]["teacher_forced"] for row in saved.pop("requests")] == [1, 0]
    assert saved == report.to_dict() == json.loads(json.dumps(report.to_dict()))

    def full_disk(self: Path, text: str, **_: Any) -> int:
        with self.open("w") as file:
            file.write(text[:20])
        raise OSError(errno.ENOSPC, "No space left on device")

    whole = path.read_bytes()
    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(FastEditError, match=r"report\.json.*No space left"):
        report.save(path)
    assert path.read_bytes() == whole
    assert list(tmp_path.iterdir()) == [path]
