"""The published formats of requests: which fields are read, and how unread ones are told."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from formats import FORMATS, OWN, mquake_rewrite, write

from fastedit.errors import RequestError
from fastedit.requests import EditRequest, as_requests, load_requests

# Records of several edits, and the requests they give.
SEVERAL: dict[str, tuple[dict[str, Any], list[EditRequest]]] = {
    "MQuAKE": (
        {
            "case_id": 7,
            "requested_rewrite": [mquake_rewrite("Ann", "Peru", "Chile"), mquake_rewrite("Bo", "Mali", "Togo")],
            "questions": ["Where is Ann's husband from?", "Whence is Ann's husband?"],
            "answer": "Togo",
            "answer_alias": ["Togolese Republic"],
            "new_answer": "Mali",
            "new_answer_alias": [],
            "single_hops": [{"question": "q", "cloze": "c", "answer": "a", "answer_alias": []}],
            "new_single_hops": [{"question": "q", "cloze": "c", "answer": "a", "answer_alias": []}],
            "orig": {"triples": [["Q1", "P1", "Q2"]]},
        },
        [
            EditRequest(
                "Ann is a citizen of", "Peru", "Ann", "7.0", "Chile", ("What is the country of citizenship of Ann?",)
            ),
            EditRequest(
                "Bo is a citizen of",
                "Mali",
                "Bo",
                "7.1",
                "Togo",
                ("What is the country of citizenship of Bo?",),
                (),
                (("Where is Ann's husband from?", "Mali"), ("Whence is Ann's husband?", "Mali")),
            ),
        ],
    ),
    "MQuAKE of one edit": (
        {"case_id": 8, "requested_rewrite": [mquake_rewrite("Ann", "Peru", "Chile")], "questions": [], "answer": "x"},
        [
            EditRequest(
                "Ann is a citizen of", "Peru", "Ann", "8", "Chile", ("What is the country of citizenship of Ann?",)
            )
        ],
    ),
    "MzsRE": (
        {
            "en": FORMATS["zsRE"][0],
            "zh-cn": {
                "subject": "\u9cd5\u9c7c\u6eaa",
                "src": "\u9cd5\u9c7c\u6eaa\u5728\u54ea\uff1f",
                "alt": "\u7279\u4f26\u7279",
                "answers": ["\u6cf0\u6668"],
            },
        },
        [
            dataclasses.replace(FORMATS["zsRE"][1], id="0.en"),
            EditRequest(
                "\u9cd5\u9c7c\u6eaa\u5728\u54ea\uff1f",
                "\u7279\u4f26\u7279",
                "\u9cd5\u9c7c\u6eaa",
                "0.zh-cn",
                "\u6cf0\u6668",
            ),
        ],
    ),
}


@pytest.mark.parametrize("lines", [False, True], ids=["array", "lines"])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_read_from_both_kinds_of_file(name: str, lines: bool, tmp_path: Path) -> None:
    record, expected = FORMATS[name]
    assert load_requests(write(tmp_path / "facts", [record], lines)) == [expected]


def test_formats_may_be_mixed_and_positions_serve_as_ids(tmp_path: Path) -> None:
    given_ids = {"fastedit": "7", "CounterFact": "34", "CounterFact flat": "0", "QAEdit": "qa-12"}
    given_ids |= {"UnKE": "3", "AKEW's CounterFact": "5"}
    loaded = load_requests(write(tmp_path / "facts.json", [record for record, _ in FORMATS.values()]))
    for position, (request, (name, (_, expected))) in enumerate(zip(loaded, FORMATS.items(), strict=True)):
        assert request == dataclasses.replace(expected, id=given_ids.get(name, str(position)))


@pytest.mark.parametrize("name", SEVERAL)
def test_records_of_several_edits_give_as_many_requests(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record, expected = SEVERAL[name]
    assert load_requests(write(tmp_path / "facts.json", [record])) == expected
    assert not caplog.messages
    if len(expected) > 1:
        with pytest.raises(RequestError, match=rf"^record: the record holds {len(expected)} edits"):
            EditRequest.from_dict(record)


def test_templates_take_the_subject_and_neighbours_either_spelling() -> None:
    record = {
        "prompt": "{} is",
        "target": "t",
        "subject": "S ",
        "rephrase": "So {} is",
        "neighbors": [["q", "b"]],
    }
    expected = EditRequest("S is", "t", "S", paraphrases=("So S is",), neighbours=(("q", "b"),))
    assert EditRequest.from_dict(record) == expected


def test_lists_of_two_texts_are_what_their_fields_say() -> None:
    """Prompts where prompts are, answers where answers are, pairs in a list of pairs."""
    record = {
        **OWN,
        "true_target": ["a", "b"],
        "rephrase": ["p", "q"],
        "loc": ["p", "q"],
        "loc_ans": ["a", "b"],
        "neighbours": [["p", "c"]],
        "portability": ["p", ["a", "b"]],
    }
    expected = EditRequest(**OWN, true_target="a", paraphrases=("p", "q"), portability=(("p", "a"),),
                           neighbours=(("p", "c"), ("p", "a"), ("q", "b")))  # fmt: skip
    assert EditRequest.from_dict(record) == expected


def test_questions_without_an_answer_are_left_out() -> None:
    record = {
        "update": "Where?",
        "ans": "Fife",
        "mhop": None,
        "mhop_ans": float("nan"),
        "loc": "x",
        "loc_ans": [],
        "locality": "",
    }
    assert EditRequest.from_dict(record) == EditRequest("Where?", "Fife")


def test_unread_fields_of_all_formats_are_told_once_with_their_counts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    records = [{**OWN, "paraphrase": "x", "note": 1}, {**OWN, "paraphrase": "y"}, {"src": "q", "alt": "t", "note": 2}]
    load_requests(write(tmp_path / "facts.json", records))
    assert len(caplog.messages) == 1
    assert "facts.json: not read: note (2 records), paraphrase (2 records); " in caplog.text
    assert "the fields of a request are prompt, target, subject, id, " in caplog.text
    as_requests(records)
    assert len(caplog.messages) == 2
    caplog.clear()
    load_requests(write(tmp_path / "facts.json", [record for record, _ in FORMATS.values()]))
    # the published formats have more than an edit needs; the one in QAEdit's record is a question without an answer
    assert [m.split("not read: ")[1].split(";")[0] for m in caplog.messages] == [
        "locality.loc without an answer (1 record)"
    ]


FLAT = {"prompt": "p", "target_new": "t"}
UNREAD: dict[str, tuple[dict[str, Any], str]] = {
    "unknown field of a flat record": ({**FLAT, "locality_question": "q"}, "locality_question"),
    "target of another format": ({**FLAT, "alt": "u"}, "alt"),
    "field that only another format has": ({**FLAT, "single_hops": ["x"]}, "single_hops"),
    "unknown field of a rewrite": (
        {"requested_rewrite": {"prompt": "p", "target_new": {"str": "t"}, "hint": "x"}},
        "requested_rewrite.hint",
    ),
    "unknown field of a question": (
        {**FLAT, "locality": {"group": [{"prompt": "q", "ground_truth": "a", "image": "x.png"}]}},
        "locality.group.image",
    ),
    "unknown field of a language": ({"en": {"src": "q", "alt": "t", "hint": "x"}}, "hint"),
    "prompt without an answer": ({**FLAT, "locality_prompt": "q"}, "locality_prompt without an answer"),
    "prompt with an empty answer": ({**FLAT, "loc": "q", "loc_ans": ""}, "loc without an answer"),
    "neighbours without a true target": (
        {"requested_rewrite": {"prompt": "p", "target_new": {"str": "t"}}, "neighborhood_prompts": ["q"]},
        "neighborhood_prompts without an answer",
    ),
    "pair with an empty answer": ({**FLAT, "neighbours": [["q", ""]]}, "neighbours without an answer"),
    "answer without a prompt": ({**FLAT, "locality_answer": "a"}, "locality_answer without locality_prompt"),
    "second answer": (
        {**FLAT, "locality_prompt": "q", "locality_ground_truth": "a", "locality_answer": "b"},
        "locality_answer",
    ),
    "second true target": ({**FLAT, "ground_truth": "a", "target_old": "b"}, "target_old"),
    "second subject": ({**FLAT, "subject": "s", "concept": "c"}, "concept"),
}


@pytest.mark.parametrize("name", UNREAD)
def test_nothing_is_dropped_without_a_word(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    record, told = UNREAD[name]
    load_requests(write(tmp_path / "facts.json", [record, record]))
    assert [message.split("; ")[0] for message in caplog.messages] == [
        f"{tmp_path / 'facts.json'}: not read: {told} (2 records)"
    ]
    caplog.clear()
    EditRequest.from_dict(record)
    assert [message.split("; ")[0] for message in caplog.messages] == [f"record: not read: {told} (1 record)"]


def test_fields_that_hold_nothing_and_metadata_are_no_loss(caplog: pytest.LogCaptureFixture) -> None:
    nothing = {"note": None, "extra": "", "more": [], "gap": float("nan"), "mhop": None, "mhop_ans": float("nan")}
    metadata = {"case_id": 3, "pararel_idx": 4, "relation_id": "P1", "source": "NQ", "tag": "new"}
    same = {"ground_truth": "a", "true_target": "a", "concept": "s", "subject": "s"}
    request = EditRequest.from_dict({**FLAT, **nothing, **metadata, **same})
    assert request == EditRequest("p", "t", "s", "3", "a")
    assert not caplog.messages
