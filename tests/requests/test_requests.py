"""Readers of edit requests: every published format, bad input, conflicts."""

from __future__ import annotations

import bz2
import csv
import dataclasses
import gzip
import io
import json
import lzma
import re
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from fastedit.errors import RequestError
from fastedit.requests import EditRequest, as_requests, find_conflicts, load_requests

OWN = {"prompt": "The capital of Peru is", "target": "Oslo"}

FORMATS: dict[str, tuple[dict[str, Any], EditRequest]] = {
    "fastedit": (
        {
            "prompt": "The capital of Peru is ",
            "target": " Oslo",
            "subject": "Peru",
            "id": 7,
            "true_target": "Lima",
            "paraphrases": ["Peru's capital is"],
            "neighbours": [["The capital of Chile is", "Santiago"]],
            "portability": [["The mayor of Peru's capital is", "Anne"]],
        },
        EditRequest(
            "The capital of Peru is",
            "Oslo",
            "Peru",
            "7",
            "Lima",
            ("Peru's capital is",),
            (("The capital of Chile is", "Santiago"),),
            (("The mayor of Peru's capital is", "Anne"),),
        ),
    ),
    "CounterFact": (
        {
            "case_id": 34,
            "pararel_idx": 1,
            "requested_rewrite": {
                "prompt": "{} {was} employed in",
                "relation_id": "P937",
                "target_new": {"str": "Oslo", "id": "Q1"},
                "target_true": {"str": "Paris", "id": "Q2"},
                "subject": "Ada Roe",
            },
            "paraphrase_prompts": ["Rain fell. Ada Roe worked in", "Ada Roe took up work in"],
            "neighborhood_prompts": ["Max Poe worked in", "Eva Coe was employed in"],
            "attribute_prompts": ["Ole Doe worked in"],
            "generation_prompts": ["Ada Roe's office is in"],
            "portability": {
                "Recalled Relation": "r",
                "New Question": "Ada's city's river?",
                "New Answer": "Aker",
            },
        },
        EditRequest(
            "Ada Roe {was} employed in",
            "Oslo",
            "Ada Roe",
            "34",
            "Paris",
            ("Rain fell. Ada Roe worked in", "Ada Roe took up work in"),
            (("Max Poe worked in", "Paris"), ("Eva Coe was employed in", "Paris")),
            (("Ada's city's river?", "Aker"),),
        ),
    ),
    "CounterFact flat": (
        {
            "case_id": 0,
            "prompt": "The mother tongue of Ada Roe is",
            "target_new": "English",
            "subject": "Ada Roe",
            "ground_truth": "French",
            "rephrase_prompt": "Ada Roe speaks",
            "locality_prompt": "Max Poe speaks",
            "locality_ground_truth": "Dutch",
        },
        EditRequest(
            "The mother tongue of Ada Roe is",
            "English",
            "Ada Roe",
            "0",
            "French",
            ("Ada Roe speaks",),
            (("Max Poe speaks", "Dutch"),),
        ),
    ),
    "zsRE": (
        {
            "subject": "Cod Creek",
            "src": "Which river has Cod Creek?",
            "pred": "Ouse",
            "rephrase": "What river is Cod Creek in?",
            "alt": " Trent",
            "answers": ["Thames", "River Thames"],
            "loc": "nq question: how many books are there",
            "loc_ans": "12",
            "cond": "Ouse >> Trent || Which river has Cod Creek?",
        },
        EditRequest(
            "Which river has Cod Creek?",
            "Trent",
            "Cod Creek",
            "0",
            "Thames",
            ("What river is Cod Creek in?",),
            (("nq question: how many books are there", "12"),),
        ),
    ),
    "WikiBigEdit": (
        {
            "tag": "new",
            "subject": "Cod Kirk",
            "update": "Where is Cod Kirk?",
            "ans": "Fife",
            "rephrase": "In which county is Cod Kirk?",
            "personas": "Ahoy, where be Cod Kirk?",
            "mhop": "Who is lord lieutenant of Cod Kirk's county?",
            "mhop_ans": "Bo Ek",
            "loc": "Where is Eel Kirk?",
            "loc_ans": "Angus",
        },
        EditRequest(
            "Where is Cod Kirk?",
            "Fife",
            "Cod Kirk",
            "0",
            None,
            ("In which county is Cod Kirk?", "Ahoy, where be Cod Kirk?"),
            (("Where is Eel Kirk?", "Angus"),),
            (("Who is lord lieutenant of Cod Kirk's county?", "Bo Ek"),),
        ),
    ),
    "WikiBigEdit, LocFT's cut": (
        {
            "prompt": "Where is Cod Kirk?",
            "target_new": "Fife",
            "subject": "Cod Kirk",
            "rephrase_prompt": "In which county is Cod Kirk?",
            "locality_prompt": "Where is Eel Kirk?",
            "locality_ground_truth": "Angus",
        },
        EditRequest(
            "Where is Cod Kirk?",
            "Fife",
            "Cod Kirk",
            "0",
            None,
            ("In which county is Cod Kirk?",),
            (("Where is Eel Kirk?", "Angus"),),
        ),
    ),
    "QAEdit": (
        {
            "id": "qa-12",
            "source": "NQ",
            "prompt": "who sang Mud",
            "target": "Bo Ek",
            "subject": "Mud",
            "rephrase": "the singer of Mud",
            "locality": [{"loc": "who wrote Silt", "loc_ans": "Al Fe"}, {"loc": "no answer", "loc_ans": ""}],
        },
        EditRequest(
            "who sang Mud",
            "Bo Ek",
            "Mud",
            "qa-12",
            None,
            ("the singer of Mud",),
            (("who wrote Silt", "Al Fe"),),
        ),
    ),
    "KnowEdit": (
        {
            "subject": "Cod",
            "prompt": "Which family is Cod in?",
            "target_new": " Eels",
            "ground_truth": [["Gadidae", "cods"], ["codfish"]],
            "rephrase_prompt": "Cod's family?",
            "cond": "x",
            "locality": {
                "Relation_Specificity": [
                    {"prompt": "The rank of Cod is", "ground_truth": [["species", "kind"]]},
                    {"prompt": "Cod lives in", "ground_truth": "water"},
                ],
                "Forgetfulness": {
                    "prompt": ["Cod eats", "Cod is"],
                    "ground_truth": ["crabs", ["grey", "green"]],
                },
            },
            "portability": {
                "Reasoning": [{"prompt": "The family of Cod is named after?", "ground_truth": "Eel"}],
                "Subject_Aliasing": [],
            },
        },
        EditRequest(
            "Which family is Cod in?",
            "Eels",
            "Cod",
            "0",
            "Gadidae",
            ("Cod's family?",),
            (
                ("The rank of Cod is", "species"),
                ("Cod lives in", "water"),
                ("Cod eats", "crabs"),
                ("Cod is", "grey"),
            ),
            (("The family of Cod is named after?", "Eel"),),
        ),
    ),
    "KnowEdit's WikiBio": (
        {
            "concept": "bo ek",
            "text": "A passage about bo ek. ",
            "labels": "Bo Ek sings.",
            "locality": {"Relation_Specificity": [{"prompt": "Bo Ek's sex is", "ground_truth": [["male"]]}]},
        },
        EditRequest("A passage about bo ek.", "Bo Ek sings.", "bo ek", "0", neighbours=(("Bo Ek's sex is", "male"),)),
    ),
    "UltraEditBench": (
        {
            "prompt": "Where is Cod Kirk?",
            "rephrase_prompt": "In which county is Cod Kirk?",
            "ans": "Fife",
            "loc": "Where is Eel Kirk?",
            "loc_ans": "Angus",
        },
        EditRequest(
            "Where is Cod Kirk?",
            "Fife",
            None,
            "0",
            None,
            ("In which county is Cod Kirk?",),
            (("Where is Eel Kirk?", "Angus"),),
        ),
    ),
    "UltraEdit's zsRE": (
        {
            "subject": "Cod Creek",
            "src": "Which river has Cod Creek?",
            "ans": "Trent",
            "rephrase": "What river is Cod Creek in?",
            "loc": "nq question: how many books are there",
            "loc_ans": "12",
        },
        EditRequest(
            "Which river has Cod Creek?",
            "Trent",
            "Cod Creek",
            "0",
            None,
            ("What river is Cod Creek in?",),
            (("nq question: how many books are there", "12"),),
        ),
    ),
    "FEVER": (
        {
            "prompt": "Cod Kirk is in Fife.",
            "pred": "SUPPORTS",
            "alt": "REFUTES",
            "equiv_prompt": ["Fife has Cod Kirk.", "Cod Kirk stands in Fife."],
            "unrel_prompt": "Eel Kirk is in Angus.",
            "unrel_ans": "SUPPORTS",
        },
        EditRequest(
            "Cod Kirk is in Fife.",
            "REFUTES",
            None,
            "0",
            None,
            ("Fife has Cod Kirk.", "Cod Kirk stands in Fife."),
            (("Eel Kirk is in Angus.", "SUPPORTS"),),
        ),
    ),
    "UnKE": (
        {
            "id": 3,
            "question": "Who was Bo Ek?",
            "answer": "Bo Ek sang. She wrote songs in Fife.",
            "para_question": "What is known of Bo Ek?",
            "sub_question": ["Where did Bo Ek write?", "What did Bo Ek do?"],
            "sub_answer": ["in Fife", "sing"],
        },
        EditRequest(
            "Who was Bo Ek?",
            "Bo Ek sang. She wrote songs in Fife.",
            None,
            "3",
            None,
            ("What is known of Bo Ek?",),
            (),
            (("Where did Bo Ek write?", "in Fife"), ("What did Bo Ek do?", "sing")),
        ),
    ),
    "AKEW's CounterFact": (
        {
            "case_id": 5,
            "requested_rewrite": {
                "prompt": "{} was employed in",
                "prompt_full": "Ada Roe was employed in",
                "relation_id": "P937",
                "target_new": {"str": "Oslo", "id": "Q1"},
                "target_true": {"str": "Paris", "id": "Q2"},
                "subject": "Ada Roe",
                "question": "Where was Ada Roe employed?",
                "fact_new_uns": "Ada Roe, who worked in Oslo all her life, …",
                "unsfact_triplets_GPT": [{"subject": "Ada Roe", "prompt": "{} worked in", "target": "Oslo"}],
            },
            "paraphrase_prompts": ["Ada Roe took up work in"],
        },
        EditRequest(
            "Ada Roe was employed in",
            "Oslo",
            "Ada Roe",
            "5",
            "Paris",
            ("Ada Roe took up work in", "Where was Ada Roe employed?"),
        ),
    ),
    "EasyEdit's arguments": (
        {
            "prompt": "The capital of Peru is",
            "target_new": "Oslo",
            "subject": "Peru",
            "target_old": "Lima",
            "rephrase_prompts": ["Peru's capital is", "The capital of {subject} is called"],
            "locality_inputs": {"neighborhood": {"prompt": ["Chile's capital is"], "ground_truth": ["Santiago"]}},
            "portability_inputs": {"one_hop": {"prompt": "The mayor of {}'s capital is", "ground_truth": "Anne"}},
        },
        EditRequest(
            "The capital of Peru is",
            "Oslo",
            "Peru",
            "0",
            "Lima",
            ("Peru's capital is", "The capital of Peru is called"),
            (("Chile's capital is", "Santiago"),),
            (("The mayor of Peru's capital is", "Anne"),),
        ),
    ),
    "single questions": (
        {
            "prompt": "The capital of [X] is",
            "target_new": "Oslo",
            "subject": "Peru",
            "locality_prompt": "[X] lies in",
            "locality_answer": "America",
            "portability_prompt": ["The mayor of Peru's capital is", "{subject}'s capital lies at"],
            "portability_answer": ["Anne", "a fjord"],
        },
        EditRequest(
            "The capital of Peru is",
            "Oslo",
            "Peru",
            "0",
            neighbours=(("Peru lies in", "America"),),
            portability=(("The mayor of Peru's capital is", "Anne"), ("Peru's capital lies at", "a fjord")),
        ),
    ),
}


def mquake_rewrite(subject: str, new: str, old: str) -> dict[str, Any]:
    return {
        "prompt": "{} is a citizen of",
        "relation_id": "P27",
        "target_new": {"str": new, "id": "Q1"},
        "target_true": {"str": old, "id": "Q2"},
        "subject": subject,
        "question": f"What is the country of citizenship of {subject}?",
        "fact_new_uns": "…",  # AKEW's
    }


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


def write(path: Path, records: list[Any], lines: bool = False) -> Path:
    dumped = "\n".join(json.dumps(r, ensure_ascii=False) for r in records) if lines else json.dumps(records)
    path.write_text(dumped, encoding="utf-8")
    return path


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


def test_own_fields_survive_a_round_trip() -> None:
    for _, request in FORMATS.values():
        record = json.loads(json.dumps(dataclasses.asdict(request)))
        assert EditRequest.from_dict(record, where="record") == request
    assert EditRequest.from_dict(OWN, where="record").id is None


def test_byte_order_mark_blank_lines_and_unicode_separators_are_accepted(tmp_path: Path) -> None:
    prompt = "Ligne\u2028une\x85 é"
    text = (
        "\ufeff\r\n" + json.dumps({**OWN, "prompt": prompt}, ensure_ascii=False) + "\r\n\r\n" + json.dumps(OWN) + "\r\n"
    )
    (tmp_path / "facts.jsonl").write_bytes(text.encode())
    assert [request.prompt for request in load_requests(tmp_path / "facts.jsonl")] == [prompt, OWN["prompt"]]


def test_constructor_cleans_and_checks() -> None:
    request = EditRequest(" p {} \n", "\tt ", paraphrases=["a ", ""], neighbours=[["q ", " b"]])  # type: ignore[arg-type]
    assert request == EditRequest(" p {}", "t", paraphrases=("a",), neighbours=(("q", "b"),))
    assert hash(request)
    for bad in ({"prompt": " "}, {"target": ""}, {"target": None}, {"paraphrases": 3}, {"neighbours": "abc"}):
        with pytest.raises(RequestError, match=next(iter(bad))):
            EditRequest(**{**OWN, **bad})  # type: ignore[arg-type]


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


GO = {"subject": "Go", "target": "t"}
TEMPLATES: dict[str, tuple[dict[str, Any], EditRequest]] = {
    "answers of a template": (
        {"prompt": "{} is in", "subject": "Peru", "target": "{} City", "true_target": "[X]ville"},
        EditRequest("Peru is in", "Peru City", "Peru", true_target="Peruville"),
    ),
    "the subject alone": (
        {"requested_rewrite": {"prompt": "{} is", "subject": "Peru", "target_new": {"str": "{}"}}},
        EditRequest("Peru is", "Peru", "Peru"),
    ),
    "named, after a prompt that holds the subject": (
        {"prompt": "Peru is in", "subject": "Peru", "target_new": "{subject} City", "ground_truth": "{subject}ville"},
        EditRequest("Peru is in", "Peru City", "Peru", true_target="Peruville"),
    ),
    "as Jinja writes it": (
        {
            "prompt": "{{ subject }} has {}",
            "subject": "Go",
            "target": "a {{subject}}",
            "rephrase": "Has { subject } {}",
        },
        EditRequest("Go has {}", "a Go", "Go", paraphrases=("Has Go {}",)),
    ),
    "to forget": (
        {"prompt": "{} is in", "subject": "Peru", "forget": "{} City", "target": "not {subject} City"},
        EditRequest("Peru is in", "not Peru City", "Peru", forget="Peru City"),
    ),
    "answers to neighbours, each as its prompt": (
        {**GO, "prompt": "{} is", "neighbours": [["{} has", "a {}"], ["C has", "{}"], ["Is Go", "{subject}[X]"]]},
        EditRequest("Go is", "t", "Go", neighbours=(("Go has", "a Go"), ("C has", "{}"), ("Is Go", "Go[X]"))),
    ),
    "answers to follow-ups": (
        {**GO, "prompt": "Go is", "portability_prompt": "[X] has", "portability_answer": "{}s"},
        EditRequest("Go is", "t", "Go", portability=(("Go has", "Gos"),)),
    ),
    "code": (
        {
            **GO,
            "prompt": "Does Go have an interface{} type?",
            "target": "interface{}",
            "rephrase": "In Go, is a[X] one?",
        },
        EditRequest("Does Go have an interface{} type?", "interface{}", "Go", paraphrases=("In Go, is a[X] one?",)),
    ),
    "code where the subject is not named": (
        {
            **GO,
            "prompt": "Does {} have interface{}?",
            "target": "interface{}",
            "rephrase": [
                "Is interface{} one of its types?",
                "Is a[X] one?",
                "{}s and struct{}{} in the language",
                "In «{}»",
            ],
            "neighbours": [["Has Rust an interface{}?", "no {}"], ["{} has", "map[string]interface{}"]],
            "portability": [["\u5728{}\u6709interface{}\u5417", "{}\u6709"]],
        },
        EditRequest(
            "Does Go have interface{}?",
            "interface{}",
            "Go",
            paraphrases=(
                "Is interface{} one of its types?",
                "Is a[X] one?",
                "Gos and struct{}{} in the language",
                "In «Go»",
            ),
            neighbours=(("Has Rust an interface{}?", "no {}"), ("Go has", "map[string]interface{}")),
            portability=(("\u5728Go\u6709interface{}\u5417", "Go\u6709"),),
        ),
    ),
    "code in a template": (
        {**GO, "prompt": "Does {subject} have interface{}?", "target": "{}"},
        EditRequest("Does Go have interface{}?", "{}", "Go"),
    ),
    "code beside letters without case": (
        {**GO, "prompt": "\u5728Go\u6709interface{}"},
        EditRequest("\u5728Go\u6709interface{}", "t", "Go"),
    ),
    "the subject inside another word": ({**GO, "prompt": "{} is Google's"}, EditRequest("Go is Google's", "t", "Go")),
    "code without a subject": ({"prompt": "p", "target": "main() {}"}, EditRequest("p", "main() {}")),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_are_told_from_code(name: str) -> None:
    record, expected = TEMPLATES[name]
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


def test_what_cannot_be_seen_is_no_text(caplog: pytest.LogCaptureFixture) -> None:
    hidden = "\u200b\ufeff"
    record = {**OWN, "subject": hidden, "true_target": hidden, "paraphrases": [hidden], "neighbours": [["q", hidden]]}
    assert EditRequest.from_dict(record) == EditRequest(**OWN)
    assert "neighbours without an answer" in caplog.text
    for seen in ("\u200d\U0001f468", "\u0301", "\ue000", "\u0967"):  # an emoji, an accent, a private sign, a digit
        assert EditRequest("p", seen).target == seen


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


BAD_RECORDS = {
    "no target": ({"prompt": "p", "subject": "s"}, "lacks target or target_new or ans"),
    "no prompt": ({"alt": "t", "subject": "s"}, "lacks src"),
    "null target": ({**OWN, "target": None}, "lacks target"),
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


BAD_FILES = {
    "empty": (b"", "it is empty"),
    "blank": (b"\xef\xbb\xbf \n", "it is empty"),
    "not JSON": (b"prompt: target\n", "it starts with 'p'"),
    "prose": (b"Oslo, of course\n", "it starts with 'O'"),
    "no records": (b"[]", "the array is empty"),
    "truncated array": (
        b'[{"prompt": "p", "target": "t"},\n {"prompt": "p", "tar',
        "record 1 .*not valid JSON",
    ),
    "two arrays": (b'[{"prompt": "p", "target": "t"}] []', "record 1 .*not valid JSON"),
    "truncated line": (b'{"prompt": "p", "target": "t"}\n{"prompt": "p", "tar', "line 2: .*truncated"),
    "objects over several lines": (b'{\n"prompt": "p"}\n{\n"prompt": "p"}', "line 1, line 3: .*stand in an array"),
    "Latin-1": (
        '{"prompt": "p", "target": "t"}\n{"prompt": "é"'.encode("latin-1"),
        "line 2: byte 43 is not UTF-8",
    ),
    "UTF-16": ('[{"prompt"'.encode("utf-16"), "not UTF-8"),
    "nested too deep": (b"[" * 100_000, "record 0 .*not valid JSON"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_named(name: str, tmp_path: Path) -> None:
    content, message = BAD_FILES[name]
    (tmp_path / "facts.json").write_bytes(content)
    with pytest.raises(RequestError, match=rf"facts\.json[:,] .*{message}"):
        as_requests(tmp_path / "facts.json")


def test_a_line_that_is_no_json_is_told_with_the_bad_records_before_it(tmp_path: Path) -> None:
    lines = [json.dumps(record) for record in (OWN, {"prompt": "p"}, OWN, {"target": "t"})]
    (tmp_path / "facts.jsonl").write_text("\n".join([*lines, '{"prompt": "p", "tar', json.dumps(OWN)]))
    with pytest.raises(RequestError) as error:
        load_requests(tmp_path / "facts.jsonl")
    count, _, said = str(error.value).partition(": ")
    assert count == "3 records cannot be used"
    for sentence, expected in zip(
        said.split(" | "), ("line 2: .*lacks target", "line 4: .*lacks prompt", "line 5: .*truncated"), strict=True
    ):
        assert re.search(rf"facts\.jsonl, {expected}", sentence)


def test_one_object_over_several_lines_is_a_record(tmp_path: Path) -> None:
    (tmp_path / "fact.json").write_text(json.dumps(OWN, indent=2) + "\n")
    assert load_requests(tmp_path / "fact.json") == [EditRequest(**OWN, id="0")]
    (tmp_path / "fact.json").write_text(json.dumps({**OWN, "target": 5}, indent=2))
    with pytest.raises(RequestError, match=r"record 0 .*field 'target'"):
        load_requests(tmp_path / "fact.json")


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


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"id": float("nan")}, "0"),
        ({"id": None}, "0"),
        ({"id": ""}, "0"),
        ({"id": 3.0}, "3"),
        ({"id": 3}, "3"),
        ({"case_id": 12.0}, "12"),
        ({"id": float("nan"), "case_id": 12.0}, "12"),
        ({"id": "3.0"}, "3.0"),
    ],
)
def test_ids_as_pandas_writes_them(fields: dict[str, Any], expected: str, tmp_path: Path) -> None:
    assert as_requests([{**OWN, **fields}])[0].id == expected
    assert load_requests(write(tmp_path / "facts.json", [{**OWN, **fields}]))[0].id == expected  # NaN in JSON


TABLE = [
    {
        "prompt": "The sky, at noon, is",
        "target": 'a "light" blue',
        "subject": "The sky",
        "paraphrases": ["Noon's sky is"],
    },
    {"prompt": "Grass is\nalways", "target": "green"},
]


def table(separator: str, **how: Any) -> str:
    """`TABLE` with a line of column names; missing cells are empty, and lists are JSON."""
    file = io.StringIO()
    writer = csv.DictWriter(file, ["prompt", "subject", "target", "paraphrases"], delimiter=separator, **how)
    writer.writeheader()
    for record in TABLE:
        writer.writerow({k: json.dumps(v) if isinstance(v, list) else v for k, v in record.items()})
    return file.getvalue()


def parquet() -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(TABLE), file)
    return file.getvalue()


OTHER_FILES: dict[str, tuple[str, bytes]] = {
    "csv": ("facts.csv", table(",").encode()),
    "csv with semicolons, quotes and BOM": ("facts", b"\xef\xbb\xbf" + table(";", quoting=csv.QUOTE_ALL).encode()),
    "csv after empty lines": ("facts.csv", ("\n\n" + table(",", lineterminator="\n") + "\n").encode()),
    "tabs": ("facts.tsv", table("\t").encode()),
    "gzip": ("facts.json.gz", gzip.compress(json.dumps(TABLE).encode(), mtime=0)),
    "gzip by another name": ("facts.json", gzip.compress("\n".join(map(json.dumps, TABLE)).encode(), mtime=0)),
    "csv in bzip2": ("facts.csv.bz2", bz2.compress(table(",").encode())),
    "xz": ("facts.json.xz", lzma.compress(json.dumps(TABLE).encode())),
    "zstd": ("facts.json.zst", zstandard.compress(json.dumps(TABLE).encode())),
    "frames of zstd": ("facts.jsonl", b"".join(zstandard.compress(json.dumps(row).encode() + b"\n") for row in TABLE)),
    "parquet": ("facts.parquet", parquet()),
    "parquet in zstd": ("facts.parquet.zst", zstandard.compress(parquet())),
}


@pytest.mark.parametrize("name", OTHER_FILES)
def test_tables_and_compressed_files_are_read_as_json_is(name: str, tmp_path: Path) -> None:
    file, content = OTHER_FILES[name]
    (tmp_path / file).write_bytes(content)
    assert load_requests(tmp_path / file) == as_requests(TABLE)


@pytest.mark.parametrize(
    ("package", "module", "content", "unpacked"),
    [
        ("zstandard", "zstandard", b"\x28\xb5\x2f\xfd...", "is compressed (zstd)"),
        ("pyarrow", "pyarrow.parquet", b"PAR1...", "is a Parquet file"),
    ],
)
def test_a_package_that_a_file_takes_is_named(
    package: str, module: str, content: bytes, unpacked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / "facts").write_bytes(content)
    with pytest.raises(RequestError, match=rf"facts {re.escape(unpacked)}: pip install {package}, or"):
        load_requests(tmp_path / "facts")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("facts.zip", b"PK\x03\x04...", r"facts.zip is compressed \(zip\).*unpack it first"),
        ("facts.json.gz", gzip.compress(b"[" * 999, mtime=0)[:-9], "the gzip file is damaged or truncated"),
        ("facts.json.zst", zstandard.compress(b"[" * 999)[:-1], "the zstd file is damaged or truncated"),
        ("facts.csv.xz", lzma.compress(b"prompt,target\np,t")[:-9], "the xz file is damaged or truncated"),
        ("facts.csv.bz2", bz2.compress(b"prompt,target\np,t")[:-9], "the bzip2 file is damaged or truncated"),
        ("facts.parquet", parquet()[:-9], "the Parquet file is damaged or truncated"),
        ("facts.csv", b"prompt,target\np,t\np,t,u,v\n", "line 3: 4 cells for 2 columns; put cells that hold a ','"),
        ("facts.csv", b'prompt,target\np,t\n"p,t\n', "line 3: .*is a quote missing"),
        ("facts.csv", b"prompt,target\np,\n", "line 2: the record fits no known format, it lacks target"),
        ("facts.csv", b"name,value\np,t\n", "a table whose first line names its columns"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else value[:30],
)
def test_what_is_wrong_with_such_a_file_is_told(file: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / file).write_bytes(content)
    with pytest.raises(RequestError, match=message):
        load_requests(tmp_path / file)


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


WRAPPED = [OWN, {**OWN, "id": "mine"}, {"requested_rewrite": [mquake_rewrite("Ann", "Peru", "Chile")] * 2}]


@pytest.mark.parametrize("name", ["data", "examples", "records", "requests", "0"])
@pytest.mark.parametrize("indent", [None, 2], ids=["in a line", "over lines"])
def test_records_in_an_object_that_only_holds_them(name: str, indent: int | None, tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    path.write_text(json.dumps({"version": 1, name: WRAPPED, "about": {"n": 3}}, indent=indent))
    assert load_requests(path) == as_requests(WRAPPED)
    path.write_text(json.dumps({name: [OWN, {"prompt": "p"}]}, indent=indent))
    with pytest.raises(
        RequestError, match=rf"facts\.json, (line 1, )?record 1 of '{name}' \(counted from 0\): .*lacks target"
    ):
        load_requests(path)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (
            {"train": [OWN], "test": [OWN, OWN]},
            r"train, test; of its lists give the one with the records \(train, test\)",
        ),
        ({"data": []}, r"its fields are data\. Formats"),
        ({"data": ["p", "t"]}, r"its fields are data\. Formats"),
        (
            {"target": "t", "locality": [{"prompt": "p", "answer": "a"}]},
            r"lacks prompt; its fields are target, locality\. ",
        ),
    ],
    ids=["two lists", "no records", "texts", "a record without a prompt"],
)
def test_objects_that_hold_no_list_of_records(record: dict[str, Any], said: str, tmp_path: Path) -> None:
    (tmp_path / "facts.json").write_text(json.dumps(record))
    with pytest.raises(RequestError, match=rf"facts\.json, line 1: .*{said}"):
        load_requests(tmp_path / "facts.json")
    with pytest.raises(RequestError, match=rf"requests\[0\]: .*{said}"):
        as_requests([record])


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


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"absent\.json: cannot be read: No such file"):
        load_requests(str(tmp_path / "absent.json"))
    with pytest.raises(RequestError, match="cannot be read"):
        load_requests(tmp_path)


def test_as_requests_takes_requests_and_records() -> None:
    named = EditRequest("p", "t", id="mine")
    requests = as_requests([named, EditRequest("p", "t"), {"src": "q", "alt": "u"}])
    assert requests[0] is named
    assert [(r.id, r.prompt, r.target) for r in requests] == [
        ("mine", "p", "t"),
        ("1", "p", "t"),
        ("2", "q", "u"),
    ]


@pytest.mark.parametrize("name", FORMATS)
def test_arrays_of_numpy_are_lists(name: str) -> None:
    def numpied(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: numpied(item) for key, item in value.items()}
        if isinstance(value, list):
            found = np.empty(len(value), dtype=object)
            found[:] = [numpied(item) for item in value]
            return found
        return np.int64(value) if type(value) is int else np.str_(value) if type(value) is str else value

    record, expected = FORMATS[name]
    assert as_requests([numpied(record)]) == [expected]
    assert EditRequest.from_dict(numpied(record)) == dataclasses.replace(
        expected, id=None if "id" not in record and "case_id" not in record else expected.id
    )


def test_what_pandas_calls_missing_is_absent_and_its_rows_are_records() -> None:
    class NAType:
        def __eq__(self, other: object) -> Any:
            raise TypeError("boolean value of NA is ambiguous")

    class Row:
        def to_dict(self) -> dict[str, Any]:
            return {**OWN, "subject": NAType(), "paraphrases": np.array(["p", "q"])}

        def tolist(self) -> list[Any]:
            raise AssertionError

    class Frame:
        iloc = None

        def to_dict(self) -> dict[str, Any]:
            return {name: {5: value, 7: value} for name, value in Row().to_dict().items()}

    expected = EditRequest(**OWN, id="0", paraphrases=("p", "q"))
    assert as_requests([Row()]) == [expected]  # type: ignore[list-item]
    assert as_requests(Frame()) == [expected, dataclasses.replace(expected, id="1")]  # type: ignore[arg-type]


COLUMNS = {
    "prompt": ["p", "q"],
    "target": ["s", "t"],
    "id": [5, None],
    "loc": [["x", "y"], []],
    "loc_ans": [["a"] * 2, None],
}


@pytest.mark.parametrize("kind", ["lists", "indexed", "over lines", "NumPy"])
def test_columns_are_read_as_a_table(kind: str, tmp_path: Path) -> None:
    expected = [EditRequest("p", "s", id="5", neighbours=(("x", "a"), ("y", "a"))), EditRequest("q", "t", id="1")]
    columns: dict[str, Any] = COLUMNS
    if kind == "indexed":  # as pandas writes a frame
        columns = {name: {"4": column[0], "2": column[1]} for name, column in COLUMNS.items()}
    if kind == "NumPy":
        columns = {name: np.array([*column, None], dtype=object)[:-1] for name, column in COLUMNS.items()}
    else:
        (tmp_path / "facts").write_text(json.dumps(columns, indent=1 if kind == "over lines" else None))
        assert load_requests(tmp_path / "facts") == expected
    assert as_requests(columns) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize("indent", [None, 1])
def test_records_by_id_are_read(indent: int | None, tmp_path: Path) -> None:
    """As pandas writes a frame with ``orient="index"``, and many people their own files."""
    records = {"7": {"prompt": "p", "target": "s"}, "x": {"prompt": "q", "target": "t", "case_id": 3}}
    expected = [EditRequest("p", "s", id="7"), EditRequest("q", "t", id="3")]
    (tmp_path / "facts").write_text(json.dumps(records, indent=indent))
    assert load_requests(tmp_path / "facts") == as_requests(records) == expected  # type: ignore[arg-type]
    records["y"] = {"prompt": "r", "target": ""}
    (tmp_path / "facts").write_text(json.dumps(records, indent=indent))
    with pytest.raises(RequestError, match=r"row 2 \(counted from 0\): field 'target' is missing or empty"):
        load_requests(tmp_path / "facts")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"loc": ["x"]}, "column 'loc' has 1 rows, and the prompts are a column of 2 rows"),
        ({"id": "x"}, "column 'id' has 'x', and the prompts are"),
        ({"target": {"0": "s", "1": "t"}}, "column 'target' has 2 rows"),
        ({"target": ["s", ""]}, "row 1 .counted from 0.: field 'target' is missing or empty"),
    ],
)
def test_columns_of_other_lengths_are_named(more: dict[str, Any], said: str, tmp_path: Path) -> None:
    (tmp_path / "facts").write_text(json.dumps(COLUMNS | more))
    with pytest.raises(RequestError, match=rf"facts.*{said}"):
        load_requests(tmp_path / "facts")


def test_as_requests_refuses_nothing_and_lone_requests() -> None:
    for empty in ([], ()):
        with pytest.raises(RequestError, match="empty"):
            as_requests(empty)
    for lone in (OWN, EditRequest("p", "t"), None):
        with pytest.raises(RequestError, match="expected a path or a list"):
            as_requests(lone)  # type: ignore[arg-type]


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


def test_a_hundred_thousand_records_load_in_seconds(tmp_path: Path) -> None:
    path = write(tmp_path / "facts.jsonl", [FORMATS["zsRE"][0]] * 100_000, lines=True)
    start = time.process_time()
    requests = load_requests(path)
    report = find_conflicts(requests)
    assert time.process_time() - start < 15  # takes about 3; quadratic work would take hours
    assert requests[-1].id == "99999"
    assert len(report.duplicates[0]) == 100_000
