"""Edit requests: one class, and readers for the record formats that the field publishes.

A format is told by the two fields that hold its prompt and its target (`_FORMATS`). The other fields mean the
same wherever they appear, so one set of tables reads them for every format.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastedit.errors import RequestError

Pair = tuple[str, str]
AnyPath = str | os.PathLike[str]

# Name, field of the prompt, field of the target; the first row whose two fields are present reads a record.
_FORMATS = (
    ("CounterFact", "requested_rewrite.prompt", "requested_rewrite.target_new"),
    ("fastedit, QAEdit", "prompt", "target"),
    ("CounterFact flat, KnowEdit, WikiBigEdit in LocFT's cut", "prompt", "target_new"),
    ("KnowEdit's WikiBio", "text", "labels"),
    ("zsRE in MEND's fields", "src", "alt"),
    ("WikiBigEdit", "update", "ans"),
    ("UltraEditBench", "prompt", "ans"),
)
# The fields that may hold a part of a request. A pair: a field of prompts and the field of their answers.
_SUBJECT = ("subject", "concept", "requested_rewrite.subject")
_ID = ("id", "case_id")
_TRUE_TARGET = ("true_target", "ground_truth", "answers", "requested_rewrite.target_true")
_PARAPHRASES = ("paraphrases", "paraphrase_prompts", "rephrase", "rephrase_prompt", "personas")
_NEIGHBOURS = (
    *("neighbours", "neighbors", "locality"),
    ("loc", "loc_ans"),  # zsRE's prompts keep their "nq question: ", as in published measurements
    ("locality_prompt", "locality_ground_truth"),
    ("neighborhood_prompts", "requested_rewrite.target_true"),
)
_PORTABILITY = ("portability", ("mhop", "mhop_ans"))
# The fields of one question in a group such as `locality`.
_QUESTION = ("prompt", "loc", "New Question")
_ANSWER = ("answer", "ground_truth", "loc_ans", "New Answer")

_log = logging.getLogger(__name__)
_SHOWN = 10  # items that a message lists before it only counts the rest


@dataclass(frozen=True, slots=True)
class EditRequest:
    """One fact to write into a model: the text `prompt + " " + target`.

    Args:
        prompt: the full text in front of the target, taken literally; trailing whitespace is removed.
        target: the wanted answer; surrounding whitespace is removed.
        subject: what the fact is about, as it stands in the prompt (locate-then-edit methods need it).
        id: a name for messages and reports.
        true_target: the answer before the edit.
        paraphrases: other prompts that should give the target (generalization).
        neighbours: (prompt, answer) pairs that the edit must leave alone (locality).
        portability: (prompt, answer) pairs that follow from the edit.

    Raises:
        RequestError: the prompt or the target is empty, or a field has a wrong type.
    """

    prompt: str
    target: str
    subject: str | None = None
    id: str | None = None
    true_target: str | None = None
    paraphrases: tuple[str, ...] = ()
    neighbours: tuple[Pair, ...] = ()
    portability: tuple[Pair, ...] = ()

    def __post_init__(self) -> None:
        clean = {
            "prompt": _required(self.prompt, "prompt").rstrip(),
            "target": _required(self.target, "target").strip(),
            "subject": _answer(self.subject, "subject"),
            "id": _identifier(self.id, "id"),
            "true_target": _answer(self.true_target, "true_target"),
            "paraphrases": tuple(_prompts(self.paraphrases, "paraphrases")),
            "neighbours": tuple(_questions(self.neighbours, "neighbours")),
            "portability": tuple(_questions(self.portability, "portability")),
        }
        for name, value in clean.items():
            object.__setattr__(self, name, value)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any], *, where: str = "record") -> EditRequest:
        """Reads a record of any known format; this class's own field names are one.

        "{}" in the prompt and in paraphrases stands for the subject. Of several answers the first is taken.
        All but prompt and target may be absent, null or empty; questions whose answer is null or empty are
        left out. The id is the record's `id` or `case_id`, else None. `where` names the record in messages.

        Raises:
            RequestError: unknown format; prompt or target missing or empty; a field of a wrong type.
        """
        return _read(record, where, None)


_OWN = [field.name for field in dataclasses.fields(EditRequest)]
_OPTIONAL = (*_SUBJECT, *_ID, *_TRUE_TARGET, *_PARAPHRASES, *_NEIGHBOURS, *_PORTABILITY)
_PUBLISHED = {(field if isinstance(field, str) else field[0]).partition(".")[0] for field in _OPTIONAL} - {*_OWN}


def _unread(record: Mapping[str, Any]) -> set[str]:
    """Unknown fields of a record in our own format; the published ones have more than an edit needs."""
    ours = "prompt" in record and "target" in record and _PUBLISHED.isdisjoint(record)
    return {str(name) for name in record if name not in _OWN} if ours else set()


def _warn(unread: set[str], where: str) -> None:
    if unread:
        _log.warning("%s: unknown and not read: %s; known: %s", where, _listed(sorted(unread)), ", ".join(_OWN))


def _read(record: Mapping[str, Any], where: str, default_id: str | None) -> EditRequest:
    try:
        if not isinstance(record, Mapping):
            raise RequestError(f"expected an object, the fields of an edit, got {record!r:.40}")
        prompt, target = _prompt_and_target(record)
        subject = next(_answers(record, _SUBJECT), None)
        paraphrases = [(name, text) for name in _PARAPHRASES for text in _prompts(_get(record, name), name)]
        return EditRequest(
            prompt=_fill(_required(_get(record, prompt), prompt), subject, prompt),
            target=_required(_unwrap(_get(record, target)), target),
            subject=subject,
            id=next((_identifier(record[n], n) for n in _ID if record.get(n) is not None), default_id),
            true_target=next(_answers(record, _TRUE_TARGET), None),
            paraphrases=tuple(_fill(text, subject, name) for name, text in paraphrases),
            neighbours=tuple(_gather(record, _NEIGHBOURS)),
            portability=tuple(_gather(record, _PORTABILITY)),
        )
    except RequestError as error:
        raise RequestError(f"{where}: {error}") from None


def _prompt_and_target(record: Mapping[str, Any]) -> tuple[str, str]:
    """The names of the fields that hold the prompt and the target of a record."""
    lacking = []
    for _, *fields in _FORMATS:
        missing = [name for name in fields if _get(record, name) is None]
        if not missing:
            return fields[0], fields[1]
        lacking += missing if len(missing) == 1 else []
    known = "; ".join(f"{name} ({prompt}, {target})" for name, prompt, target in _FORMATS)
    raise RequestError(
        f"the record fits no known format, it lacks {' or '.join(lacking) or 'both prompt and target'}; its "
        f"fields are {_listed(list(map(str, record))) or 'none'}. Formats, their prompt and target: {known}"
    )


def _absent(value: Any) -> bool:
    # Tables exported by pandas hold NaN where a text is missing; NaN is the one value unlike itself.
    return value is None or (isinstance(value, float) and value != value)


def _get(record: Mapping[str, Any], field: str) -> Any:
    """The value of `field` ("a.b": field b of the object a), None when it is absent."""
    outer, _, inner = field.partition(".")
    value = record.get(outer)
    if value is None or not inner:
        return value
    if not isinstance(value, Mapping):
        raise _wrong(value, outer, "an object")
    return value.get(inner)


def _wrong(value: Any, field: str, expected: str) -> RequestError:
    return RequestError(f"field '{field}': expected {expected}, got {type(value).__name__} {value!r:.40}")


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise _wrong(value, field, "a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # "\ud800" is legal JSON, but no tokenizer takes it
        raise RequestError(f"field '{field}': half a surrogate pair at character {error.start}") from None
    return value


def _required(value: Any, field: str) -> str:
    text = "" if _absent(value) else _text(value, field)
    if not text.strip():
        raise RequestError(f"field '{field}' is missing or empty; an edit needs a prompt and a target")
    return text


def _unwrap(value: Any) -> Any:
    """CounterFact writes an answer as {"str": …, "id": …}."""
    return value["str"] if isinstance(value, Mapping) and "str" in value else value


def _answer(value: Any, field: str) -> str | None:
    """An optional text; of a list, nested or not, the first."""
    while isinstance(value, (list, tuple)):
        value = value[0] if value else None
    value = _unwrap(value)
    return None if _absent(value) else _text(value, field).strip() or None


def _answers(record: Mapping[str, Any], fields: Sequence[str]) -> Iterator[str]:
    return (text for name in fields if (text := _answer(_get(record, name), name)))


def _identifier(value: Any, field: str) -> str | None:
    if value is not None and not isinstance(value, (str, int)):
        raise _wrong(value, field, "a string or an integer")
    return None if value is None else str(value)


def _prompts(value: Any, field: str) -> Iterator[str]:
    """The non-empty texts of a string or a list of strings."""
    for item in value if isinstance(value, (list, tuple)) else (value,):
        if not _absent(item) and (text := _text(item, field).rstrip()):
            yield text


def _fill(text: str, subject: str | None, field: str) -> str:
    if "{}" in text and subject is None:
        raise RequestError(f"field '{field}' has '{{}}' for the subject, but the record names no subject")
    return text.replace("{}", subject or "")


def _gather(record: Mapping[str, Any], sources: Iterable[str | Pair]) -> Iterator[Pair]:
    for source in sources:
        if isinstance(source, str):
            yield from _questions(record.get(source), source)
        elif source[0] in record:
            yield from _pair_up(record[source[0]], _get(record, source[1]), source[0])


def _questions(value: Any, field: str) -> Iterator[Pair]:
    """Flattens [prompt, answer], an object of a question and its answer, lists of these, objects of lists."""
    if isinstance(value, Mapping):
        question = next((name for name in _QUESTION if name in value), None)
        answer = next((name for name in _ANSWER if name in value), None)
        if question is None:
            for name, group in value.items():
                yield from _questions(group, f"{field}.{name}")
        elif answer is None:
            raise RequestError(f"field '{field}': a question without an answer (one of {', '.join(_ANSWER)})")
        else:
            yield from _pair_up(value[question], value[answer], f"{field}.{question}")
    elif isinstance(value, (list, tuple)):
        if len(value) == 2 and isinstance(value[0], str):
            yield from _pair_up(value[0], value[1], field)
        else:
            for item in value:
                yield from _questions(item, field)
    elif not _absent(value) and value != "":
        raise _wrong(value, field, "[prompt, answer] pairs or objects with 'prompt' and 'answer'")


def _pair_up(prompts: Any, answers: Any, field: str) -> Iterator[Pair]:
    """A prompt and its answer (of several the first), or prompts with an answer each or one for all."""
    if not isinstance(prompts, (list, tuple)):
        prompts, answers = [prompts], [answers]
    elif not isinstance(answers, (list, tuple)):
        answers = [answers] * len(prompts)
    if len(prompts) != len(answers):
        raise RequestError(f"field '{field}': {len(prompts)} prompts but {len(answers)} answers")
    for prompt, answer in zip(prompts, answers, strict=True):
        text = "" if _absent(prompt) else _text(prompt, field).rstrip()
        known = _answer(answer, f"answer to {field}")
        if text and known:
            yield text, known


def load_requests(path: AnyPath) -> list[EditRequest]:
    """Reads a UTF-8 file of edit requests: a JSON array of records, JSON Lines or one record, formats mixed at will.

    Unknown fields of records in this package's own format are logged as a warning, once for each name.
    The id of a record without one is its position in the list, counted from 0.

    Raises:
        RequestError: the file is missing, empty, truncated, not UTF-8 or not JSON, or a record cannot be used
            (see `EditRequest.from_dict`). The message names the file and the record: the position in an
            array, counted from 0, or the line of JSON Lines, counted from 1.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise RequestError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise RequestError(f"{path}, line {line}: byte {error.start} is not UTF-8; save as UTF-8") from None
    start = text.lstrip()[:1]
    if start not in ("[", "{"):
        found = f"it starts with {start!r}" if start else "it is empty"
        raise RequestError(f"{path}: expected a JSON array of records, or JSON Lines, but {found}")
    records = _array(text, path) if start == "[" else _lines(text, path)
    requests, unread = [], set[str]()
    for index, (where, record) in enumerate(records):
        requests.append(_read(record, where, str(index)))
        unread |= _unread(record)
    if not requests:
        raise RequestError(f"{path}: expected edit requests, but the array is empty")
    _warn(unread, str(path))
    return requests


def _array(text: str, path: AnyPath) -> Iterator[tuple[str, Any]]:
    try:
        records = json.loads(text)
    except (ValueError, RecursionError) as error:
        where = f"{path}, record {_whole_records(text)} (counted from 0)"
        raise RequestError(f"{where}: not valid JSON, is the file truncated? {error}") from error
    for index, record in enumerate(records):
        yield f"{path}, record {index} (counted from 0)", record


def _whole_records(text: str) -> int:
    """How many items at the head of a broken JSON array are whole."""
    decoder, position, count = json.JSONDecoder(), text.index("[") + 1, 0
    while between := re.compile(r"[\s,]*").match(text, position):
        try:
            _, position = decoder.raw_decode(text, between.end())
        except (ValueError, RecursionError):
            break
        count += 1
    return count


def _lines(text: str, path: AnyPath) -> Iterator[tuple[str, Any]]:
    try:
        alone = json.loads(text) if "\n" in text.strip() else None  # one object over several lines
    except (ValueError, RecursionError):
        alone = None
    if alone is not None:
        yield f"{path}, record 0 (counted from 0)", alone
        return
    # Not splitlines(): U+2028 and its like may stand in a JSON string as they are.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise RequestError(
                    f"{where}: not a whole JSON object: {error}. Is it truncated? Several objects over more than a "
                    "line each have to stand in an array"
                ) from error
            yield where, record


def as_requests(requests: AnyPath | Sequence[EditRequest | Mapping[str, Any]]) -> list[EditRequest]:
    """The requests of a file, or of a list of `EditRequest` and records of any known format.

    A request without an id gets its position in the list, counted from 0.

    Raises:
        RequestError: there are none, or one cannot be used (see `load_requests`).
    """
    if isinstance(requests, (str, os.PathLike)):
        return load_requests(requests)
    if isinstance(requests, (EditRequest, Mapping)) or not isinstance(requests, Iterable):
        raise RequestError(f"expected a path or a list of edit requests, got {type(requests).__name__}")
    result, unread = [], set[str]()
    for index, item in enumerate(requests):
        if not isinstance(item, EditRequest):
            record, item = item, _read(item, f"requests[{index}]", str(index))
            unread |= _unread(record)
        result.append(item if item.id is not None else replace(item, id=str(index)))
    if not result:
        raise RequestError("the list of edit requests is empty; give at least one")
    _warn(unread, "requests")
    return result


@dataclass(frozen=True, slots=True)
class RequestReport:
    """What `find_conflicts` found; `str()` shows the first ten groups of each kind.

    `conflicts` has for each prompt with several targets the positions of its requests in `requests`,
    `duplicates` the positions of equal edits (prompt and target), `unchanged` those whose target is their true target.
    """

    requests: Sequence[EditRequest]
    conflicts: tuple[tuple[int, ...], ...]
    duplicates: tuple[tuple[int, ...], ...]
    unchanged: tuple[int, ...] = ()

    @property
    def any(self) -> bool:
        """Whether there is something to report."""
        return bool(self.conflicts or self.duplicates or self.unchanged)

    def __str__(self) -> str:
        lines = []
        used = Counter(request.id for request in self.requests)
        names = [
            str(position) if r.id is None else r.id if used[r.id] == 1 else f"{r.id} of record {position}"
            for position, r in enumerate(self.requests)
        ]
        for groups, meaning in (
            (self.conflicts, "prompt(s) with more than one target; an edit can reach only one of them"),
            (self.duplicates, "edits are given more than once"),
        ):
            if groups:
                lines += [f"{len(groups)} {meaning}:", *(self._line(group, names) for group in groups[:_SHOWN])]
            if len(groups) > _SHOWN:
                lines.append(f"  and {len(groups) - _SHOWN} more")
        if self.unchanged:
            listed = _listed([names[position] for position in self.unchanged])
            lines.append(f"{len(self.unchanged)} edits have their true_target as target: id {listed}")
        if lines and any(count > 1 for id_, count in used.items() if id_ is not None):
            lines.append("(some ids are given more than once; records are counted from 0)")
        return "\n".join(lines) or f"no conflicts and no duplicates among {len(self.requests)} requests"

    def _line(self, group: tuple[int, ...], names: Sequence[str]) -> str:
        ids: defaultdict[str, list[str]] = defaultdict(list)
        for position in group:
            ids[self.requests[position].target].append(names[position])
        targets = [f"{target!r:.80} (id {_listed(found)})" for target, found in ids.items()]
        return f"  {self.requests[group[0]].prompt!r:.80}: {_listed(targets)}"


def find_conflicts(requests: Sequence[EditRequest]) -> RequestReport:
    """Finds prompts with several targets, edits (prompt and target) given more than once, and edits of nothing.

    Conflicts cap the reliability that any editor can reach. Prompts and targets are compared as exact text.
    """
    by_prompt: defaultdict[str, list[int]] = defaultdict(list)
    by_edit: defaultdict[Pair, list[int]] = defaultdict(list)
    for position, request in enumerate(requests):
        by_prompt[request.prompt].append(position)
        by_edit[request.prompt, request.target].append(position)
    conflicts = (tuple(same) for same in by_prompt.values() if len({requests[p].target for p in same}) > 1)
    duplicates = (tuple(same) for same in by_edit.values() if len(same) > 1)
    unchanged = (position for position, request in enumerate(requests) if request.target == request.true_target)
    return RequestReport(requests, tuple(conflicts), tuple(duplicates), tuple(unchanged))


def _listed(items: Sequence[str]) -> str:
    return ", ".join(items[:_SHOWN]) + (f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else "")
