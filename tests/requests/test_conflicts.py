"""Requests that contradict one another, or are given more than once."""

from __future__ import annotations

from fastedit.requests import EditRequest, find_conflicts


def test_conflicts_and_duplicates() -> None:
    edits = [("p", "a"), ("q", "a"), ("p", "b "), ("r", "c"), ("p", "a"), ("q", "a"), ("s", "c")]
    report = find_conflicts([EditRequest(p, t, id="mine" if i == 2 else None) for i, (p, t) in enumerate(edits)])
    assert report.conflicts == ((0, 2, 4),)
    assert report.duplicates == ((0, 4), (1, 5))
    assert "1 prompt(s) with more than one target" in str(report)
    assert "'p': 'a' (id 0, 4), 'b' (id mine)" in str(report)
    assert "'q': 'a' (id 1, 5)" in str(report)


def test_equal_ids_are_told_apart_and_true_targets_as_targets_are_named() -> None:
    edits = [EditRequest("p", t, id=i, true_target="b") for t, i in (("a", "0"), ("b", "0"), ("c", "mine"))]
    report = find_conflicts(edits)
    assert "'a' (id 0 of record 0), 'b' (id 0 of record 1), 'c' (id mine)" in str(report)
    assert "records are counted from 0" in str(report)
    assert report.unchanged == (1,)
    assert "1 edits have their true_target as target: id 0 of record 1" in str(report)
    assert report.any
    assert not find_conflicts(edits[:1]).any
    assert "records" not in str(find_conflicts(edits[1:]))


def test_report_is_capped_and_says_when_all_is_well() -> None:
    many = [EditRequest(f"prompt {n} " + "x" * 500, f"{t}") for n in range(13) for t in range(25)]
    text = str(find_conflicts(many))
    assert text.startswith("13 prompt(s)")
    assert "prompt 9 " in text
    assert "prompt 10 " not in text
    assert "'9' (id 9) and 15 more" in text
    assert "'10'" not in text
    assert text.endswith("and 3 more")
    assert max(map(len, text.splitlines())) < 400
    assert str(find_conflicts(many[:1])) == "no conflicts and no duplicates among 1 requests"
