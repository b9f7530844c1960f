"""Prompts that are templates, and those that only hold braces, such as code."""

from __future__ import annotations

from typing import Any

import pytest

from fastedit.requests import EditRequest

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
