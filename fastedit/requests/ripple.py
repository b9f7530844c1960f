"""Records of RippleEdits (Evaluating the Ripple Effects of Knowledge Editing, arXiv 2307.12976).

An edit there is a whole sentence with the Wikidata ids of its subject and target, whose names are no fields, and six
lists of tests. An extended edition has the names too: `fact_prompt`, `subject_label`, `target_label`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from fastedit.errors import RequestError
from fastedit.requests.values import text

_EDIT = "edit"
# lists of tests, by what they are in a request; a test names in each query a prompt and its answers
_TESTS = {
    "neighbours": ("Relation_Specificity", "Relation_Specifity", "Forgetfulness"),
    "portability": ("Logical_Generalization", "Subject_Aliasing", "Compositionality_I", "Compositionality_II"),
}
_NAMES = {name for names in _TESTS.values() for name in names}
_VERB = re.compile(r" (?:is followed by|follows|is|are)(?= )")
# what stands around the subject in a prompt, for a relation in words; prompts begin with "The name of the" or the like
_WORDS = {"sex or gender": "gender", "native language": "mother tongue", "capital": "capital city"}
_AROUND = (
    r"The .*?\b{}s? (?:of|in) (.+) (?:is|are)",
    r"The name of the .* which (.+) (?:is|plays) (?:associated with|a member of|part of|the capital of|in) is",
    r"The (?:number of children (.+) has|name of the (?:position held by (.+)|award (.+) won)) is",
    r"(.+) (?:follows|is followed by)",
)


def recognizes(record: Mapping[str, Any]) -> bool:
    """Whether a record is one of RippleEdits."""
    return isinstance(record.get(_EDIT), Mapping) and not _NAMES.isdisjoint(record)


def renamed(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with the names of a request's fields. Queries that only say when a test counts are left out.

    Raises:
        RequestError: the edit has no sentence, or it does not show where the target begins.
    """
    edit: Mapping[str, Any] = record[_EDIT]
    old: Mapping[str, Any] = next(
        (edit[name] for name in ("previous_fact", "original_fact") if isinstance(edit.get(name), Mapping)), {}
    )
    names = {key: value for test in _tests(record, _NAMES) for query in _all(test) for key, value in _named(query)}
    sentences = edit.get("prompt"), old.get("prompt")
    prompt, target = edit.get("fact_prompt"), edit.get("target_label")
    if not prompt or not target:
        prompt, target = _parted(*sentences, names.get(str(edit.get("target_id"))))
    true = old.get("target_label")
    if not true and isinstance(was := old.get("prompt"), str) and was.startswith(f"{prompt} "):
        true = was.removeprefix(f"{prompt} ").removesuffix(".")
    others = {name: value for name, value in record.items() if name not in (_EDIT, "example_type", *_NAMES)}
    asked = {field: [*map(_pair, _queries(record, lists))] for field, lists in _TESTS.items()}
    subject = edit.get("subject_label") or _subject(prompt, edit.get("relation"))
    return {**others, "prompt": prompt, "target": target, "subject": subject, "true_target": true, **asked}


def _tests(record: Mapping[str, Any], lists: Any) -> Iterator[Mapping[str, Any]]:
    for name in lists:
        tests = record.get(name) or []
        if not isinstance(tests, list) or not all(isinstance(test, Mapping) for test in tests):
            raise RequestError(f"field '{name}': expected RippleEdits' tests, objects with test_queries")
        yield from tests


def _all(test: Mapping[str, Any], *fields: str) -> Iterator[Mapping[str, Any]]:
    for field in fields or ("test_queries", "condition_queries"):
        yield from (query for query in test.get(field) or [] if isinstance(query, Mapping))


def _queries(record: Mapping[str, Any], lists: Any) -> Iterator[Mapping[str, Any]]:
    """The queries of tests; of those that a test offers for choice the first."""
    for test in _tests(record, lists):
        yield from [*_all(test, "test_queries")][: None if test.get("test_condition") == "AND" else 1]


def _named(query: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The ids of a query's answers and their names."""
    ids = query.get("second_hop_target_ids" if query.get("query_type") == "two_hop" else "target_ids")
    answers = query.get("answers")
    if isinstance(ids, list) and isinstance(answers, list) and len(ids) == len(answers):
        yield from ((str(id_), str(_value(answer))) for id_, answer in zip(ids, answers, strict=True))


def _pair(query: Mapping[str, Any]) -> list[Any]:
    answers = query.get("answers")
    return [query.get("prompt"), _value(answers[0]) if isinstance(answers, list) and answers else None]


def _value(answer: Any) -> Any:
    return answer.get("value") if isinstance(answer, Mapping) else answer


def _parted(sentence: Any, other: Any, target: str | None) -> tuple[str, str]:
    """The prompt and the target of a sentence such as "The capital city of Peru is Oslo.".

    Args:
        other: the sentence with the true target, if there is one.
        target: the target, if it is known.
    """
    whole = text(sentence, f"{_EDIT}.prompt").removesuffix(".")
    if target and whole.endswith(f" {target}"):
        return whole.removesuffix(f" {target}"), target
    ends = [match.end() for match in _VERB.finditer(whole)]
    if isinstance(other, str):
        ends = [end for end in ends if other.startswith(whole[: end + 1])][-1:]
    if len(ends) != 1:
        raise RequestError(
            f"a record of RippleEdits, whose '{_EDIT}.prompt' does not show where the target begins: {whole!r:.80}; "
            f"give '{_EDIT}.fact_prompt', the text before the target, and '{_EDIT}.target_label'"
        )
    return whole[: ends[0]], whole[ends[0] + 1 :]


def _subject(prompt: str, relation: Any) -> str | None:
    """The subject in a prompt of RippleEdits' wordings, None if it is not of those."""
    words = str(relation).lower().replace("_", " ")
    for pattern in _AROUND:
        if match := re.fullmatch(pattern.replace("{}", re.escape(_WORDS.get(words, words))), prompt):
            return str(next(filter(None, match.groups())))
    return None
