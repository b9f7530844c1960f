"""Requests of rome, memit, EMMET and AlphaEdit: their forms, and those that cannot be used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from helpers import same
from memit_calls import Case, hparams

from fastedit import EditRequest, RequestError
from fastedit.compat.requests import upstream_edits
from fastedit.models import joined

FORMS: dict[str, Callable[[EditRequest, str], dict[str, Any]]] = {
    "template, mapping": lambda e, t: {"prompt": t, "subject": e.subject, "target_new": {"str": f" {e.target}"}},
    "template, text": lambda e, t: {"prompt": t, "subject": e.subject, "target_new": e.target},
    "subject inside": lambda e, _: {"prompt": e.prompt, "subject": e.subject, "target_new": e.target},
    "EasyEdit's": lambda e, _: {
        "prompt": e.prompt, "subject": e.subject, "target_new": e.target, "ground_truth": "w9", "portability": {},
        "locality": {},
    },
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_requests_of_all_forms_are_the_same_edits(form: str, case: Case) -> None:
    requests = [FORMS[form](e, r["prompt"]) for e, r in zip(case.edits, case.requests, strict=True)]
    model, _ = case.call("memit", requests)
    assert same(model, case.wanted("memit"))


def test_a_template_says_where_the_subject_is(case: Case) -> None:
    request = {"prompt": "w30 {} w31 w40", "subject": "w40", "target_new": "w50"}
    model, _ = case.call("memit", [request])
    elsewhere = case.wanted("memit", [EditRequest("w30 w40 w31 w40", "w50", "w40")])
    assert not same(model, elsewhere)  # as found by the last occurrence
    assert upstream_edits([request])[0].subject_end == len("w30 w40")


def test_texts_are_those_that_are_tokenized_there() -> None:
    for prompt, target, text in [
        ("{} is", "Paris", "X is Paris"),
        ("{} is", " Paris", "X is Paris"),
        ("{} is ", "Paris ", "X is  Paris "),
        ("{}的首都是", "东京", "X的首都是 东京"),
    ]:
        (edit,) = upstream_edits([{"prompt": prompt, "subject": "X", "target_new": target}])
        assert joined(edit.prompt, edit.target) == text


def test_requests_that_cannot_be_used_are_all_named(case: Case) -> None:
    good = {"prompt": "{} w9", "subject": "w10", "target_new": "w11"}
    bad = [good | {"target_new": {"text": "w11"}}, good | {"prompt": "{} and {}"}, good | {"subject": ""}, "w9"]
    with pytest.raises(RequestError) as raised:
        case.call("memit", [good, *bad])
    assert [*raised.value.sentences] == [
        "requests[1]: target_new is None, expected a text",
        "requests[2]: the prompt '{} and {}' is a template and there is 2 places for it, expected one",
        "requests[3]: the prompt '{} w9' is a template and there is no subject to put there",
        "requests[4]: it is a str, expected a mapping with prompt and target_new",
    ]
    with pytest.raises(RequestError, match="is not in the prompt"):
        case.call("memit", [good | {"prompt": "w9 w9"}])
    for requests, kind in ((good, "dict"), ("facts.json", "str"), (hparams(), "SimpleNamespace")):
        with pytest.raises(RequestError, match=f"requests is a {kind}, expected a list of mappings"):
            case.call("memit", requests)
    assert same(case.model, case.before)
