"""RippleEdits: its sentences are parted into prompt, subject and target, and its tests become pairs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastedit import RequestError
from fastedit.requests import EditRequest, as_requests, load_requests


def query(prompt: str, *answers: str, ids: tuple[str, ...] = ("Q9",), **more: Any) -> dict[str, Any]:
    """A query of a test in RippleEdits."""
    known = [{"value": answer, "aliases": [f"{answer}o"]} for answer in answers]
    return {"prompt": prompt, "answers": known, "query_type": "regular", "target_ids": [*ids], "phrase": None, **more}


def case(*queries: dict[str, Any], condition: str = "OR") -> dict[str, Any]:
    asked = [query("The gender of Max Poe is", "male")]
    return {"test_queries": [*queries], "test_condition": condition, "condition_queries": asked}


def ripple(sentence: str, relation: str, old: str | None = None, **more: Any) -> dict[str, Any]:
    fact = {"prompt": sentence, "subject_id": "Q1", "relation": relation, "target_id": "Q2"}
    before = {} if old is None else {"previous_fact": {**fact, "prompt": old, "target_id": "Q3"}}
    lists = ("Logical_Generalization", "Subject_Aliasing", "Compositionality_I", "Compositionality_II", "Forgetfulness")
    return {"example_type": "popular", "edit": fact | before, **{name: [] for name in lists}, **more}


def read(content: Any, folder: Path) -> list[EditRequest]:
    (folder / "facts").write_text(json.dumps(content))
    return load_requests(folder / "facts")


CITIZEN = "The name of the country of citizenship of Ada Is Roe is"
RIPPLES: dict[str, tuple[dict[str, Any], EditRequest]] = {
    "counterfactual": (
        ripple(
            f"{CITIZEN} United Kingdom.",
            "COUNTRY_OF_CITIZENSHIP",
            f"{CITIZEN} United States of America.",
            Relation_Specificity=[case(query("The name of the mother of Ada Is Roe is", "Eva Roe"))],
            Forgetfulness=[case(query("Ada Is Roe's country, which is not United Kingdom, is", "Peru", "Mali"))],
            Logical_Generalization=[
                case(query("The continent of Ada is", "Europe"), query("The mayor is", "Max")),
                case(query("The first is", "a"), query("The second is", "b"), condition="AND"),
            ],
            Compositionality_I=[
                case(query("The capital of Ada's is", "London", query_type="two_hop", second_hop_target_ids=["Q4"]))
            ],
        ),
        EditRequest(
            CITIZEN,
            "United Kingdom",
            "Ada Is Roe",
            "0",
            "United States of America",
            (),
            (
                ("The name of the mother of Ada Is Roe is", "Eva Roe"),
                ("Ada Is Roe's country, which is not United Kingdom, is", "Peru"),
            ),
            (
                ("The continent of Ada is", "Europe"),
                ("The first is", "a"),
                ("The second is", "b"),
                ("The capital of Ada's is", "London"),
            ),
        ),
    ),
    "one list of tests": (
        ripple(
            "The name of the position held by Ada is chair.",
            "POSITION_HELD",
            Relation_Specifity=[case(query("Eva is", "old"))],
        ),
        EditRequest("The name of the position held by Ada is", "chair", "Ada", "0", neighbours=(("Eva is", "old"),)),
    ),
    "a target with a verb, named by a test": (
        ripple(
            "The name of the author of Peru is What is Art.",
            "AUTHOR",
            Subject_Aliasing=[
                case(query("By P. is", "is What is Art")),
                case(query("P. is", "What is Art", ids=("Q2",))),
            ],
        ),
        EditRequest(
            "The name of the author of Peru is",
            "What is Art",
            "Peru",
            "0",
            portability=(("By P. is", "is What is Art"), ("P. is", "What is Art")),
        ),
    ),
    "followed": (
        ripple("Peru is followed by Mali.", "FOLLOWED_BY"),
        EditRequest("Peru is followed by", "Mali", "Peru", "0"),
    ),
    "extended": (
        {
            "edit": {
                "fact_prompt": "The mother tongue of Ada is",
                "subject_label": "Ada",
                "target_label": "What is",
                "original_fact": {"target_label": "Thai", "prompt": "The mother tongue of Ada is Thai."},
            },
            "Subject_Aliasing": [],
        },
        EditRequest("The mother tongue of Ada is", "What is", "Ada", "0", "Thai"),
    ),
}
_WHICH = "The name of the {} which Ada is {} is"
RIPPLE_PROMPTS = {
    "SEX_OR_GENDER": "The gender of Ada is",
    "NUMBER_OF_CHILDREN": "The number of children Ada has is",
    "NATIVE_LANGUAGE": "The mother tongue of Ada is",
    "SIBLING": "The names of the siblings of Ada are",
    "CAST_MEMBER": "The names of the cast members of Ada are",
    "CAPITAL": "The name of the capital city of Ada is",
    "CURRENCY": "The name of the currency in Ada is",
    "AWARD_RECEIVED": "The name of the award Ada won is",
    "LEAGUE": "The name of the league which Ada plays in is",
    "MEMBER_OF_SPORTS_TEAM": _WHICH.format("sports team", "a member of"),
    "RELIGION": _WHICH.format("religion", "associated with"),
    "CONTINENT": _WHICH.format("continent", "part of"),
    "CAPITAL_OF": _WHICH.format("country", "the capital of"),
    "FOLLOWS": "Ada follows",
}


@pytest.mark.parametrize("name", RIPPLES)
def test_ripple_edits_are_read(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    record, expected = RIPPLES[name]
    for array in (False, True):
        assert read([record] if array else record, tmp_path) == [expected]
    assert not caplog.text


@pytest.mark.parametrize("relation", RIPPLE_PROMPTS)
def test_ripple_edits_name_their_subjects(relation: str) -> None:
    prompt = RIPPLE_PROMPTS[relation]
    (found,) = as_requests([ripple(f"{prompt} Mali.", relation, f"{prompt} Peru.")])
    assert (found.prompt, found.target, found.subject, found.true_target) == (prompt, "Mali", "Ada", "Peru")


def test_a_sentence_that_does_not_show_its_target_is_named() -> None:
    with pytest.raises(RequestError, match=r"RippleEdits, whose 'edit\.prompt' does not .* give 'edit\.fact_prompt'"):
        as_requests([ripple("The name of the author of What is Art is Leo.", "AUTHOR")])
    with pytest.raises(RequestError, match=r"field 'edit\.prompt': expected a string, got NoneType"):
        as_requests([{"edit": {}, "Forgetfulness": []}])
    with pytest.raises(RequestError, match="field 'Forgetfulness': expected RippleEdits' tests"):
        as_requests([{"edit": {}, "Forgetfulness": ["x"]}])
