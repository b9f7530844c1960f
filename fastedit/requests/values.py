"""Values of a record's fields: texts, answers and questions, in the forms that all formats use."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from fastedit.errors import RequestError

Pair = tuple[str, str]
# The fields of one question in a group such as `locality`.
_QUESTION = ("prompt", "loc", "New Question")
_ANSWER = ("answer", "ground_truth", "loc_ans", "New Answer")
_BESIDE = ("Recalled Relation", "relation", "relation_id")  # other fields of a question, which are not read
# Placeholders of the subject: in any text, and in a template.
_NAME = r"\{\{ *subject *\}\}|\{ *subject *\}"
# "{}" and "[X]" are part of the word or the code before them, as in interface{}, struct{}{} and a[X]
_WITHIN = r"(?<![A-Za-z0-9_\u00c0-\u058f\u10a0-\u10ff)\]}])"  # scripts with upper and lower case
_NAMED, _ALONE = re.compile(_NAME), re.compile(rf"{_WITHIN}(?:\{{\}}|\[X\])")
_MARKS = re.compile(rf"{_ALONE.pattern}|{_NAME}")
_UNSEEN = {"Cc", "Cf", "Zl", "Zp", "Zs"}  # categories of invisible characters
# Other invisible characters: fillers, the Braille blank, variation selectors.
_FILLERS = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0\u180b-\u180f\ufe00-\ufe0f\U000e0100-\U000e01ef]"
)


def plain_data(value: Any) -> Any:
    """A value of a record as JSON has it: lists for NumPy's arrays, Python's numbers for its scalars, and None for what
    pandas calls missing; a row of pandas is an object."""
    if type(value).__name__ in ("NAType", "NaTType"):
        return None
    if hasattr(value, "tolist"):
        return plain_data(value.to_dict() if hasattr(value, "to_dict") else value.tolist())
    if isinstance(value, Mapping):
        return {name: plain_data(item) for name, item in value.items()}
    return [plain_data(item) for item in value] if isinstance(value, (list, tuple)) else value


def absent(value: Any) -> bool:
    """Whether a field holds nothing."""
    # pandas exports NaN for a missing text; only NaN is not equal to itself
    return value is None or (isinstance(value, float) and value != value)


def empty(value: Any) -> bool:
    """Whether a field is absent or empty, so that nothing is lost if it is not read."""
    return absent(value) or (isinstance(value, (str, list, tuple, Mapping)) and not value)


def get(record: Mapping[str, Any], field: str) -> Any:
    """The value of `field` ("a.b": field b of the object a), None when it is absent."""
    if "." not in field:
        return record.get(field)
    outer, _, inner = field.partition(".")
    value = record.get(outer)
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise wrong_type(value, outer, "an object")
    return value.get(inner)


def wrong_type(value: Any, field: str, expected: str) -> RequestError:
    return RequestError(f"field '{field}': expected {expected}, got {type(value).__name__} {value!r:.40}")


def text(value: Any, field: str) -> str:
    """A string that a tokenizer can take."""
    if not isinstance(value, str):
        raise wrong_type(value, field, "a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # "\ud800" is legal JSON, but no tokenizer takes it
        raise RequestError(f"field '{field}': half a surrogate pair at character {error.start}") from None
    return value


def blank(text: str) -> bool:
    """Whether a text is invisible: spaces and characters without width only."""
    if "!" <= text.lstrip()[:1] <= "~":  # fast path for almost all texts
        return False
    return all(unicodedata.category(c) in _UNSEEN or _FILLERS.match(c) for c in text)


def required(value: Any, field: str) -> str:
    """A text that is not empty. Raises RequestError otherwise."""
    content = "" if absent(value) else text(value, field)
    if blank(content):
        raise RequestError(f"field '{field}' is missing or empty; an edit needs a prompt and a target")
    return content


def unwrap(value: Any) -> Any:
    """The text of an answer that is written {"str": …, "id": …}, as in CounterFact; else the value itself."""
    return value["str"] if isinstance(value, Mapping) and "str" in value else value


def answer(value: Any, field: str) -> str | None:
    """An optional text; the first one of a list, nested or not."""
    while isinstance(value, (list, tuple)):
        value = value[0] if value else None
    value = unwrap(value)
    return None if absent(value) or blank(content := text(value, field)) else content.strip()


def first_answer(
    record: Mapping[str, Any],
    fields: Sequence[str],
    left_out: set[str],
    said: Callable[[Any, str], Any] = lambda response, _: response,
) -> str | None:
    """The answer of the first field that has one. Fields with a different answer are added to `left_out`.

    `said` makes the text from an answer and the name of its field.
    """
    first: str | None = None
    for name in fields:
        response = said(answer(get(record, name), name), name)
        if first is None:
            first = response
        elif response is not None and response != first:
            left_out.add(name)
    return first


def identifier(value: Any, field: str) -> str | None:
    """An id as a string. In a column with gaps, pandas turns integers into floats and gaps into NaN."""
    if absent(value):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, (str, int)):
        raise wrong_type(value, field, "a string or an integer")
    return str(value) or None


def prompts(value: Any, field: str) -> Iterator[str]:
    """The non-empty texts of a string or a list of strings."""
    for item in value if isinstance(value, (list, tuple)) else (value,):
        if not absent(item) and not blank(prompt := text(item, field)):
            yield prompt.rstrip()


def marks_of(prompt: str, subject: str | None) -> re.Pattern[str]:
    """The pattern of placeholders for the subject in a prompt and its answer.

    It is "{subject}" ("{{ subject }}" in other templates); if the prompt is a template, also "{}" and "[X]". A template
    has one of these two, not right after a word as in "interface{}", and does not name the subject otherwise.
    """
    if ("{}" not in prompt and "[X]" not in prompt) or not _ALONE.search(prompt):
        return _NAMED
    return _NAMED if subject and (_NAMED.search(prompt) or _stands_in(subject, prompt)) else _MARKS


def _stands_in(subject: str, prompt: str) -> bool:
    """Whether a subject is in a prompt, and not inside a word of a script with upper and lower case."""
    pieces = prompt.split(subject)
    around = (f"{before[-1:]}{after[:1]}" for before, after in pairwise(pieces))
    return any(not any(c.isdigit() or c.lower() != c.upper() for c in beside) for beside in around)


def fill(text: str, marks: re.Pattern[str], subject: str | None, field: str) -> str:
    """A prompt or an answer with the subject in place of each of `marks`."""
    if "{" not in text and "[" not in text:
        return text
    match = marks.search(text)
    if not match:
        return text
    if subject is None:
        raise RequestError(
            f"field '{field}' has '{match[0]}' for the subject, but the record names no subject; give it"
        )
    return marks.sub(lambda _: subject, text)


def fill_prompt(prompt: str, subject: str | None, field: str) -> str:
    """A prompt with the subject in place of each placeholder; see `marks_of`."""
    marks = marks_of(prompt, subject)
    if marks is _MARKS and subject is not None and "[X]" in prompt and "[Y]" in prompt:
        raise RequestError(f"field '{field}' has '[Y]' for the answer; a prompt is the text in front of the answer")
    return fill(prompt, marks, subject, field)


def gather(
    record: Mapping[str, Any], sources: Iterable[str | tuple[str, ...]], subject: str | None, left_out: set[str]
) -> Iterator[Pair]:
    """The questions of all sources, with the subject in their prompts and answers.

    A source is a field of questions, or a field of prompts followed by those that may hold the answers. Prompts without
    an answer and answers without a prompt are left out.
    """
    for source in sources:
        if isinstance(source, str):
            name = source
            pairs = questions(record.get(name), name, left_out)
        else:
            name, *fields = source
            pairs = pair_fields(record, name, fields, left_out)
        for prompt, response in pairs:
            said = fill(response, marks_of(prompt, subject), subject, f"answer to {name}")
            yield fill_prompt(prompt, subject, name), said


def pair_fields(record: Mapping[str, Any], name: str, fields: Sequence[str], left_out: set[str]) -> Iterator[Pair]:
    """The questions from a field of prompts and the first field that has answers."""
    asked = record.get(name)
    held = [(field, value) for field in fields if not empty(value := get(record, field))]
    left_out.update(field for field, value in held[1:] if value != held[0][1])
    known = held[0][1] if held else None
    if not empty(asked):
        yield from pair_up(asked, known, name, left_out)
    elif held and "." not in held[0][0]:  # an answer inside another object belongs to something else
        left_out.add(f"{held[0][0]} without {name}")


def questions(value: Any, field: str, left_out: set[str], *, listed: bool = False) -> Iterator[Pair]:
    """Flatten an object of a question and its answer, lists of these and of [prompt, answer], or objects of lists.

    `listed` says that the value is an item of a list; outside a list, two texts may also be two prompts.
    """
    if isinstance(value, Mapping):
        question = next((name for name in _QUESTION if name in value), None)
        response = next((name for name in _ANSWER if name in value), None)
        if question is None:
            for name, group in value.items():
                yield from questions(group, f"{field}.{name}", left_out)
        elif response is None:
            raise RequestError(f"field '{field}': a question without an answer (one of {', '.join(_ANSWER)})")
        else:
            if len(value) > 2:
                others = value.keys() - {question, response, *_BESIDE}
                left_out.update(f"{field}.{name}" for name in others if not empty(value[name]))
            yield from pair_up(value[question], value[response], f"{field}.{question}", left_out)
    elif isinstance(value, (list, tuple)):
        if not listed and len(value) == 2 and all(isinstance(item, str) for item in value):
            raise RequestError(
                f"field '{field}': two texts, which may be a prompt and its answer or two prompts; write a list of "
                "pairs, [[prompt, answer]]"
            )
        if len(value) == 2 and isinstance(value[0], str):
            yield from pair_up(value[0], value[1], field, left_out)
        else:
            for item in value:
                yield from questions(item, field, left_out, listed=True)
    elif not absent(value) and value != "":
        raise wrong_type(value, field, "[prompt, answer] pairs or objects with 'prompt' and 'answer'")


def pair_up(prompts: Any, answers: Any, field: str, left_out: set[str]) -> Iterator[Pair]:
    """Yield a prompt with its answer (the first of several), or prompts with one answer each or one for all."""
    if not isinstance(prompts, (list, tuple)):
        prompts, answers = [prompts], [answers]
    elif not isinstance(answers, (list, tuple)):
        answers = [answers] * len(prompts)
    if len(prompts) != len(answers):
        raise RequestError(f"field '{field}': {len(prompts)} prompts but {len(answers)} answers")
    for prompt, response in zip(prompts, answers, strict=True):
        asked = "" if absent(prompt) or blank(asked := text(prompt, field)) else asked.rstrip()
        known = answer(response, f"answer to {field}")
        if asked and known:
            yield asked, known
        elif asked or known:
            left_out.add(f"{field} without an answer" if asked else f"answer to {field} without a prompt")
