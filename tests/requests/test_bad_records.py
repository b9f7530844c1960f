"""Records that cannot be used: how they are named, counted and skipped."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from formats import OWN, mquake_rewrite, write

from fastedit.errors import RequestError
from fastedit.requests import EditRequest, as_requests, load_requests


def test_what_cannot_be_seen_is_no_text(caplog: pytest.LogCaptureFixture) -> None:
    hidden = "\u200b\ufeff"
    record = {**OWN, "subject": hidden, "true_target": hidden, "paraphrases": [hidden], "neighbours": [["q", hidden]]}
    assert EditRequest.from_dict(record) == EditRequest(**OWN)
    assert "neighbours without an answer" in caplog.text
    for seen in ("\u200d\U0001f468", "\u0301", "\ue000", "\u0967"):  # an emoji, an accent, a private sign, a digit
        assert EditRequest("p", seen).target == seen


BAD_RECORDS = {
    "no target": ({"prompt": "p", "subject": "s"}, "lacks target or target_new or ans"),
    "no prompt": ({"alt": "t", "subject": "s"}, "lacks src"),
    "null target": ({**OWN, "target": None}, "field 'target' is missing or empty"),
    "null prompt": ({**OWN, "prompt": None}, "field 'prompt' is missing or empty"),
    "unknown format": (
        {"query": "p", "response": "t"},
        r"query, response\. Formats.*zsRE.*\(src, alt\)",
    ),
    "empty object": ({}, "its fields are none"),
    "empty target": ({**OWN, "target": " \n"}, "field 'target' is missing or empty"),
    **{
        f"target of {hidden!a}": ({**OWN, "target": hidden}, "field 'target' is missing or empty")
        for hidden in ("\u200b", "\u2060", " \ufeff\n", "\u00ad\u3164", "\x00", "\u2800\ufe0f")
    },
    "prompt of no width": ({"src": "\u200b", "alt": "t"}, "field 'src' is missing or empty"),
    "empty prompt": ({"src": "", "alt": "t"}, "field 'src' is missing or empty"),
    "nested empty target": (
        {"requested_rewrite": {"prompt": "p", "target_new": {"str": ""}}},
        r"field 'requested_rewrite\.target_new' is missing or empty",
    ),
    "not an object": ([OWN], "expected an object"),
    "text for an object": ("prompt", "expected an object"),
    "number for a text": ({**OWN, "target": 5}, "field 'target': expected a string, got int 5"),
    "list for a target": ({**OWN, "target": ["a", "b"]}, "field 'target': expected a string, got list"),
    "text for a rewrite": ({"requested_rewrite": "p"}, "field 'requested_rewrite': expected an object"),
    "number in paraphrases": ({**OWN, "paraphrases": ["a", 1]}, "field 'paraphrases'"),
    "number for an answer": ({**OWN, "true_target": 3}, "field 'true_target'"),
    "object for an id": ({**OWN, "id": {}}, "field 'id'"),
    "text for questions": ({**OWN, "neighbours": "p"}, "field 'neighbours'"),
    "lone prompt": ({**OWN, "neighbours": ["p"]}, "field 'neighbours'"),
    **{
        f"two texts in {field}": (
            {**OWN, **fields},
            rf"field '{field}': two texts, which may be .*\[\[prompt, answer\]\]",
        )
        for field, fields in {
            "neighbours": {"neighbours": ["p", "q"]},
            "neighbors": {"neighbors": ["p", "q"]},
            "locality_inputs.neighborhood": {"locality_inputs": {"neighborhood": ["p", "q"]}},
            "portability": {"portability": ("p", "q")},
        }.items()
    },
    "question without answer field": (
        {**OWN, "locality": {"g": [{"prompt": "p"}]}},
        r"field 'locality\.g': a question",
    ),
    "uneven answers": (
        {**OWN, "locality": {"g": {"prompt": ["p", "q"], "ground_truth": ["a"]}}},
        "2 prompts but 1 answers",
    ),
    "half a number for an id": ({**OWN, "id": 1.5}, "field 'id': expected a string or an integer"),
    "no rewrites": ({"requested_rewrite": []}, "field 'requested_rewrite': the list has no edit"),
    "one bad rewrite of two": (
        {"requested_rewrite": [mquake_rewrite("Ann", "Peru", "Chile"), mquake_rewrite("Bo", "", "Togo")]},
        r"edit 1: field 'requested_rewrite\.target_new' is missing",
    ),
    "one bad language": (
        {"en": {"src": "q", "alt": "t"}, "de": {"src": "q", "alt": ""}},
        "edit de: field 'alt' is missing",
    ),
    "answer in the template": (
        {**OWN, "prompt": "[X] is in [Y].", "subject": "S"},
        r"'\[Y\]' for the answer",
    ),
    **{
        f"{mark} in {field} without subject": (
            {**OWN, **fields},
            rf"field '{field}' has '{re.escape(mark)}' for the subject, but the record names no subject",
        )
        for mark in ("{}", "{subject}", "[X]")
        for field, fields in {
            "prompt": {"prompt": f"{mark} is"},
            "rephrase": {"rephrase": [f"{mark} is"]},
            "neighbours": {"neighbours": [[f"{mark} is", "a"]]},
            "loc": {"loc": f"{mark} is", "loc_ans": "a"},
            "portability": {"portability": {"group": [{"prompt": f"{mark} is", "answer": "a"}]}},
            "mhop": {"mhop": f"{mark} is", "mhop_ans": "a"},
        }.items()
    },
    **{
        f"{{subject}} in {name} without subject": (
            {**OWN, **fields},
            rf"field '{name}' has '{{subject}}' for the subject, but the record names no subject",
        )
        for name, fields in {
            "target": {"target": "{subject} City"},
            "forget": {"forget": "{subject} City"},
            "ground_truth": {"ground_truth": ["{subject} City"]},
            "answer to loc": {"loc": "q", "loc_ans": "{subject}"},
        }.items()
    },
    "half a surrogate pair": ({**OWN, "target": "\ud800"}, "field 'target': half a surrogate"),
}


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_a_bad_record_is_named(name: str, tmp_path: Path) -> None:
    record, message = BAD_RECORDS[name]
    path = tmp_path / "facts"
    path.write_text(json.dumps([OWN, OWN, record]))
    with pytest.raises(RequestError, match=rf"facts, record 2 \(counted from 0\): .*{message}"):
        load_requests(path)
    path.write_text("\n".join([json.dumps(OWN), "", json.dumps(record)]))
    with pytest.raises(RequestError, match=rf"facts, line 3: .*{message}"):
        load_requests(path)
    with pytest.raises(RequestError, match=rf"^requests\[1\]: .*{message}"):
        as_requests([OWN, record])  # type: ignore[list-item]


def test_all_bad_records_are_counted_and_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "facts.jsonl", [{**OWN, "target": i} for i in range(14)] + [OWN] * 3, lines=True)
    with pytest.raises(RequestError) as error:
        load_requests(path)
    assert str(error.value).startswith("14 records cannot be used: ")
    assert str(error.value).endswith("line 10: field 'target': expected a string, got int 9 | and 4 more")
    assert [re.findall(r"line (\d+)", said)[0] for said in error.value.sentences] == [str(i) for i in range(1, 15)]


def test_one_cause_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    records = [{"query": "p", f"answer {i % 2}": "t"} for i in range(24)]
    path = write(tmp_path / "facts.jsonl", [*records, {**OWN, "target": ""}], lines=True)
    path.write_text(path.read_text() + '\n{"prompt": "p", "tar')
    with pytest.raises(RequestError) as error:
        load_requests(path)
    said = str(error.value)
    assert f"26 records cannot be used: {path}, line 1, line 3, line 5, " in said
    assert "line 19 and 2 more: the record fits no known format, it lacks " in said
    assert (said.count("fits no known"), said.count("Formats, "), said.count("facts.jsonl"), said.count(" | ")) == (
        *(2, 1, 4),
        3,
    )
    assert said.endswith("have to stand in an array")
    path.write_text(path.read_text() + "\n" + json.dumps(OWN))
    assert len(load_requests(path, skip_bad=True)) == 1
    assert caplog.messages[0].count("fits no known") == 2


@pytest.mark.parametrize("lines", [False, True], ids=["array", "lines"])
def test_bad_records_are_skipped_when_asked_and_listed(
    lines: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Published zsRE has records whose "alt" is empty."""
    good, bad = {"src": "q", "alt": "t", "note": 1}, {"src": "q", "alt": "", "hint": 1}
    path = write(tmp_path / "facts", [good, bad, {"prompt": "p"}, good], lines)
    if lines:
        path.write_text(path.read_text() + '\n{"src": "q", "al')
    requests = load_requests(path, skip_bad=True)
    assert [request.id for request in requests] == ["0", "3"]  # their positions in the file
    skipped, unread = caplog.messages
    assert f"facts: {3 if lines else 2} of {5 if lines else 4} records are left out: " in skipped
    assert "line 2: field 'alt' is missing" in skipped if lines else "record 1 (counted from 0): field 'alt'" in skipped
    assert "lacks target" in skipped
    assert ("line 5: not a whole JSON object" in skipped) == lines
    assert "not read: note (2 records);" in unread  # nothing of a record that is left out
    assert "hint" not in unread
    with pytest.raises(RequestError, match="records cannot be used"):
        load_requests(path)


def test_skipping_leaves_something_or_is_an_error(tmp_path: Path) -> None:
    bad = {"src": "q", "alt": ""}
    with pytest.raises(RequestError, match="2 records cannot be used"):
        load_requests(write(tmp_path / "facts.json", [bad, bad]), skip_bad=True)
    (tmp_path / "facts.json").write_bytes(b'[{"prompt": "p", "target": "t"}, {"prompt": "p", "tar')
    with pytest.raises(RequestError, match=r"record 1 .*truncated"):  # who knows how much is missing
        load_requests(tmp_path / "facts.json", skip_bad=True)
