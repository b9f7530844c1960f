"""Published record formats.

A format is recognized by the two fields that hold its prompt and its target (`_FORMATS`). All other fields mean the
same in every format, so one set of tables reads them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from fastedit.errors import RequestError, listed
from fastedit.requests import ripple
from fastedit.requests.values import (
    empty,
    fill,
    fill_prompt,
    first_answer,
    gather,
    get,
    identifier,
    marks_of,
    prompts,
    required,
    unwrap,
)


@dataclass(frozen=True, slots=True, eq=False)
class _Format:
    """A format: its name, its fields for prompt and target, and its fields that an edit does not need."""

    name: str
    prompt: str
    target: str
    beside: tuple[str, ...] = ()


_REWRITE = "requested_rewrite"
_COUNTERFACT = (
    *("attribute_prompts", "generation_prompts", "distracting_neighborhood_prompts"),
    *("unrelated_relation", "alternative_subject"),
)
_MQUAKE = ("answer", "answer_alias", "new_answer_alias", "single_hops", "new_single_hops", "orig")
_AKEW = (
    *("prompt_full", "subject_id", "fact_new", "fact_true", "fact_new_uns", "fact_true_uns"),
    *("unsfact_triplets_GPT", "time_new", "time_true", "answer_new", "answer_true", "answer_GPT"),
)
# A record is read by the first row whose two fields it has.
_FORMATS = (
    _Format(
        "CounterFact, MQuAKE",
        f"{_REWRITE}.prompt",
        f"{_REWRITE}.target_new",
        (*_COUNTERFACT, *_MQUAKE, f"{_REWRITE}.relation_id", *(f"{_REWRITE}.{name}" for name in _AKEW)),
    ),
    _Format("fastedit, QAEdit", "prompt", "target"),
    _Format("CounterFact flat, KnowEdit, WikiBigEdit in LocFT's cut", "prompt", "target_new"),
    _Format("KnowEdit's WikiBio", "text", "labels"),
    _Format("zsRE in MEND's fields", "src", "alt", ("pred",)),
    _Format("WikiBigEdit", "update", "ans"),
    _Format("UltraEditBench", "prompt", "ans"),
    _Format("UltraEdit's zsRE", "src", "ans", ("pred",)),
    _Format("FEVER", "prompt", "alt", ("pred",)),
    _Format("UnKE, editevery", "question", "answer"),
)
# A record with the field `forget` is in this format, whatever else it has; its target is what to say instead.
_FORGET = _Format("fastedit, to forget", "prompt", "forget", ("target", "target_new"))
# The fields that may hold a part of a request. In brackets: a field of prompts, then those that may hold the answers.
_SUBJECT = ("subject", "concept", f"{_REWRITE}.subject")
ID = ("id", "case_id")
_TRUE_TARGET = ("true_target", "ground_truth", "answers", "target_old", "target_true", f"{_REWRITE}.target_true")
_PARAPHRASES = (
    *("paraphrases", "paraphrase_prompts", "rephrase", "rephrase_prompt", "rephrase_prompts", "personas"),
    *("equiv_prompt", "para_question", f"{_REWRITE}.question"),
)
_NEIGHBOURS = (
    *("neighbours", "neighbors", "locality", "locality_inputs"),
    ("loc", "loc_ans"),  # zsRE's prompts keep their "nq question: ", as in published measurements
    ("locality_prompt", "locality_ground_truth", "locality_answer"),
    ("neighborhood_prompts", f"{_REWRITE}.target_true"),
    ("unrel_prompt", "unrel_ans"),
)
_PORTABILITY = (
    *("portability", "portability_inputs"),
    ("mhop", "mhop_ans"),
    ("portability_prompt", "portability_ground_truth", "portability_answer"),
    ("questions", "new_answer"),
    ("sub_question", "sub_answer"),
)
# Fields of any format about the origin of a record, which an edit does not need.
_METADATA = ("pararel_idx", "relation", "relation_id", "source", "tag", "cond")

_PAIRED = {name for source in (*_NEIGHBOURS, *_PORTABILITY) if not isinstance(source, str) for name in source}
_WHOLE = {name for name in (*_NEIGHBOURS, *_PORTABILITY) if isinstance(name, str)}
_READ = frozenset((*_SUBJECT, *ID, *_TRUE_TARGET, *_PARAPHRASES, *_METADATA, _REWRITE)) | _PAIRED | _WHOLE
_PROMPTS = frozenset(form.prompt.partition(".")[0] for form in _FORMATS)
_Source = str | tuple[str, ...]
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z]+)?")


@dataclass(frozen=True, slots=True)
class _Fields:
    """The parts of the tables that apply to a record, given the names of its fields."""

    formats: tuple[_Format, ...]
    subject: tuple[str, ...]
    true_target: tuple[str, ...]
    paraphrases: tuple[str, ...]
    neighbours: tuple[_Source, ...]
    portability: tuple[_Source, ...]


@lru_cache(maxsize=1024)
def _fields(names: tuple[Any, ...]) -> _Fields:
    """Look up the tables once for all records with these fields; records of a file mostly have the same fields."""

    def there(source: _Source) -> bool:
        return any(name.partition(".")[0] in names for name in ((source,) if isinstance(source, str) else source))

    return _Fields(
        tuple(form for form in _FORMATS if there(form.prompt) and there(form.target)),
        tuple(filter(there, _SUBJECT)),
        tuple(filter(there, _TRUE_TARGET)),
        tuple(filter(there, _PARAPHRASES)),
        tuple(filter(there, _NEIGHBOURS)),
        tuple(filter(there, _PORTABILITY)),
    )


def read_record(record: Any, left_out: set[str]) -> dict[str, Any]:
    """The arguments of an `EditRequest` from a record of any known format; adds what is not read to `left_out`.

    Raises:
        RequestError: not a record; unknown format; prompt or target missing or empty; a field of a wrong type.
    """
    if not isinstance(record, Mapping):
        raise RequestError(f"expected an object, the fields of an edit, got {record!r:.40}")
    fields = _fields(tuple(record))
    form = _format_of(record, fields.formats) if empty(record.get(_FORGET.target)) else _FORGET
    target, forget = unwrap(get(record, form.target)), None
    if form is _FORGET:
        target, forget = next((unwrap(record[n]) for n in form.beside if not empty(record.get(n))), ""), target
    subject = first_answer(record, fields.subject, left_out)
    paraphrases = [(name, text) for name in fields.paraphrases for text in prompts(get(record, name), name)]
    left_out.update(_unread(record, form))
    prompt = required(get(record, form.prompt), form.prompt)
    marks = marks_of(prompt, subject)

    def said(answer: Any, field: str) -> Any:
        return fill(answer, marks, subject, field) if isinstance(answer, str) else answer

    return {
        "prompt": fill_prompt(prompt, subject, form.prompt),
        "target": said(target, "target") if forget else said(required(target, form.target), form.target),
        "subject": subject,
        "id": next((id_ for name in ID if (id_ := identifier(record.get(name), name)) is not None), None),
        "true_target": first_answer(record, fields.true_target, left_out, said),
        "paraphrases": tuple(fill_prompt(text, subject, name) for name, text in paraphrases),
        "neighbours": tuple(gather(record, fields.neighbours, subject, left_out)),
        "portability": tuple(gather(record, fields.portability, subject, left_out)),
        "forget": said(forget, _FORGET.target),
    }


def split(record: Any) -> list[tuple[str, Any]]:
    """Split a record into its edits: (suffix of the id, record of one edit). Most records are one edit, with "".

    RippleEdits' edits and tests get our names. MQuAKE has a list of rewrites; what belongs to the whole case goes with
    the last rewrite, because only then all are made. MzsRE has one record per language.
    """
    if not isinstance(record, Mapping):
        return [("", record)]
    if ripple.recognizes(record):
        return [("", ripple.renamed(record))]
    rewrites = record.get(_REWRITE)
    if isinstance(rewrites, list):
        if not rewrites:
            raise RequestError(f"field '{_REWRITE}': the list has no edit")
        ids = {name: record[name] for name in ID if name in record}
        parts = [{**ids, _REWRITE: rewrite} for rewrite in rewrites]
        parts[-1] = {**record, _REWRITE: rewrites[-1]}
        return [(str(number) if len(parts) > 1 else "", part) for number, part in enumerate(parts)]
    if record.keys().isdisjoint(_PROMPTS):
        languages = [name for name in record if _LANGUAGE.fullmatch(str(name)) and isinstance(record[name], Mapping)]
        shared = {name: value for name, value in record.items() if name not in languages}
        if languages:
            return [(name, {**shared, **record[name]}) for name in languages]
    return [("", record)]


def wrapped(record: Any) -> tuple[str, list[Any]] | None:
    """The field and list of an object that is not a record itself and has one list of records; None otherwise."""
    if not isinstance(record, Mapping) or not record.keys().isdisjoint(_PROMPTS) or ripple.recognizes(record):
        return None
    lists = _lists(record)
    return next(iter(lists.items())) if len(lists) == 1 else None


def table(record: Any) -> list[dict[str, Any]] | None:
    """The records of an object that has them by id, or that has their columns; None if it is neither.

    A column is a list or, as pandas writes it, an object by index.

    Raises:
        RequestError: a column that has not as many rows as the prompts.
    """
    if not isinstance(record, Mapping):
        return None
    if _has_records(record):
        return [item if any(name in item for name in ID) else {"id": key, **item} for key, item in record.items()]
    named = (form for form in (*_FORMATS, _FORGET) if "." not in form.prompt and form.target in record)
    prompts = next((record[form.prompt] for form in named if form.prompt in record), None)
    if not isinstance(prompts, (list, tuple, Mapping)):
        return None
    keys = [*prompts] if isinstance(prompts, Mapping) else range(len(prompts))
    for name, column in record.items():
        rows = (
            [*column]
            if isinstance(column, Mapping)
            else range(len(column))
            if isinstance(column, (list, tuple))
            else ()
        )
        if isinstance(column, Mapping) != isinstance(prompts, Mapping) or {*rows} != {*keys}:
            actual = f"{len(rows)} rows" if isinstance(column, (list, tuple, Mapping)) else f"{column!r:.40}"
            raise RequestError(f"column '{name}' has {actual}, and the prompts are a column of {len(keys)} rows")
    return [{name: column[key] for name, column in record.items()} for key in keys]


def _has_records(record: Mapping[str, Any]) -> bool:
    """Whether all values are records. The languages of an MzsRE record are one edit's (`split`)."""
    records = all(isinstance(item, Mapping) and not item.keys().isdisjoint(_PROMPTS) for item in record.values())
    fields = any(name in _READ or _LANGUAGE.fullmatch(str(name)) for name in record)
    return bool(record) and records and not fields


def _lists(record: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Lists of objects in fields that do not belong to a format."""
    return {
        str(name): value
        for name, value in record.items()
        if name not in _READ and isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value)
    }


def _format_of(record: Mapping[str, Any], formats: Sequence[_Format]) -> _Format:
    """The first of some formats whose prompt and target a record has. Raises RequestError if there is none."""
    for form in formats:
        if get(record, form.prompt) is not None and get(record, form.target) is not None:
            return form
    if formats:  # it has the fields, and nothing in one of them
        return next((form for form in formats if get(record, form.prompt) is not None), formats[0])
    lacking = []
    for form in _FORMATS:
        missing = [name for name in (form.prompt, form.target) if get(record, name) is None]
        lacking += missing if len(missing) == 1 else []
    known = "; ".join(f"{form.name} ({form.prompt}, {form.target})" for form in (*_FORMATS, _FORGET))
    lists = f"; of its lists give the one with the records ({listed(list(held))})" if (held := _lists(record)) else ""
    raise RequestError(
        f"the record fits no known format, it lacks {' or '.join(dict.fromkeys(lacking)) or 'both prompt and target'}; "
        f"its fields are {listed(list(map(str, record))) or 'none'}{lists}",
        advice=f"Formats, their prompt and target: {known}",
    )


def _unread(record: Mapping[str, Any], form: _Format) -> Iterator[str]:
    """Fields that are not empty and not read."""
    for name in _unknown(tuple(record), "", form):
        if not empty(record[name]):
            yield str(name)
    if form.prompt.startswith(_REWRITE):
        rewrite = record[_REWRITE]
        for name in _unknown(tuple(rewrite), f"{_REWRITE}.", form):
            if not empty(rewrite[name]):
                yield f"{_REWRITE}.{name}"


@lru_cache(maxsize=1024)
def _unknown(names: tuple[Any, ...], prefix: str, form: _Format) -> tuple[Any, ...]:
    """The fields of a record that its format does not have."""
    known = {*_READ, *form.beside, form.prompt, form.target}
    return tuple(name for name in names if f"{prefix}{name}" not in known)
