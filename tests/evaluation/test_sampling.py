"""Samples of requests: what is drawn, what is said of it, and how often its intervals hold the truth."""

from __future__ import annotations

import random
from typing import Any

import pytest
from helpers import random_edits, tiny_model

from fastedit import ConfigError, Editor
from fastedit.evaluation.report import evaluate
from fastedit.evaluation.sampling import draw, interval

EDITS = random_edits(30, 2)


def test_a_sample_is_drawn_once_in_order_and_by_its_seed() -> None:
    drawn = draw(EDITS, 10)
    assert len({id(edit) for edit in drawn}) == 10
    assert drawn == [edit for edit in EDITS if edit in drawn]
    assert drawn == draw(EDITS, 10) != draw(EDITS, 10, seed=1)
    assert drawn != EDITS[:10]
    assert draw(EDITS, 30) == draw(EDITS, 31) == draw(EDITS, None) == EDITS
    with pytest.raises(ConfigError, match="sample is 0"):
        draw(EDITS, 0)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
def test_intervals_hold_the_share_of_all_nineteen_times_of_twenty(share: float) -> None:
    rng = random.Random(0)
    everything = [float(i < 1000 * share) for i in range(1000)]
    for n in (40, 500):
        limits = [interval(rng.sample(everything, n), 1000) for _ in range(2000)]
        held = sum(low <= share <= high for low, high in filter(None, limits)) / 2000
        assert 0.92 <= held <= 0.99


def test_intervals_at_the_edge() -> None:
    assert interval([1.0] * 100, 10**9) == pytest.approx((0.963, 1), abs=1e-3)
    low, high = interval([0.0] * 100, 10**9) or (1, 0)
    assert (low, high) == pytest.approx((0, 0.037), abs=1e-3)
    assert interval([None, 0.5], 2) == (0.5, 0.5)
    assert interval([None], 9) is None
    wide, narrow = interval([0.5] * 10, 1000) or (0, 0), interval([0.5] * 10, 12) or (0, 0)
    assert narrow[1] - narrow[0] < wide[1] - wide[0]


def test_the_report_says_that_it_is_of_a_sample(tokenizer: Any) -> None:
    model = tiny_model("llama")
    report = evaluate(model, tokenizer, EDITS, sample=12)
    assert [row["id"] for row in report.rows] == [edit.id for edit in draw(EDITS, 12)]
    content = report.to_dict()
    assert content["sample"] == {"measured": 12, "of": 30}
    values = [row["reliability"]["teacher_forced"] for row in report.rows]
    assert content["intervals"]["reliability"]["teacher_forced"] == interval(values, 30)
    assert content["intervals"]["es"] is content["intervals"]["first_token"] is None
    low, high = content["intervals"]["reliability"]["generated"]
    assert "A sample: 12 of 30 requests" in str(report)
    assert f"{report.metrics['reliability']['generated']:.1%} [{low:.0%}, {high:.0%}]" in str(report)

    whole = evaluate(model, tokenizer, EDITS[:12], sample=12)
    assert whole.of is whole.intervals is None
    assert "sample" not in whole.to_dict()
    assert "sample" not in str(whole)


def test_the_editor_measures_a_sample_before_and_after(tokenizer: Any) -> None:
    editor = Editor(tiny_model("llama"), tokenizer, layer=2, lr=1e-2, batch_size=8, epochs=2)
    editor.edit(EDITS)
    report = editor.evaluate(EDITS, generate=False, sample=5)
    assert (len(report.rows), report.of) == (5, 30)
    assert report.before is not None
    assert editor.evaluate(EDITS, generate=False, sample=5).to_dict() == report.to_dict()
