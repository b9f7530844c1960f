"""Values of a record's fields: texts, answers and questions, however a format writes them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from fastedit.errors import RequestError

Pair = tuple[str, str]
# The fields of one question in a group such as `locality`.
_QUESTION = ("prompt", "loc", "New Question")
_ANSWER = ("answer", "ground_truth", "loc_ans", "New Answer")


def absent(value: Any) -> bool:
    """Whether a field holds nothing."""
    # Tables exported by pandas hold NaN if a text is missing; NaN is the one value unlike itself.
    return value is None or (isinstance(value, float) and value != value)


def get(record: Mapping[str, Any], field: str) -> Any:
    """The value of `field` ("a.b": field b of the object a), None when it is absent."""
    outer, _, inner = field.partition(".")
    value = record.get(outer)
    if value is None or not inner:
        return value
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


def required(value: Any, field: str) -> str:
    """A text that is not empty."""
    found = "" if absent(value) else text(value, field)
    if not found.strip():
        raise RequestError(f"field '{field}' is missing or empty; an edit needs a prompt and a target")
    return found


def unwrap(value: Any) -> Any:
    """CounterFact writes an answer as {"str": …, "id": …}."""
    return value["str"] if isinstance(value, Mapping) and "str" in value else value


def answer(value: Any, field: str) -> str | None:
    """An optional text; of a list, nested or not, the first."""
    while isinstance(value, (list, tuple)):
        value = value[0] if value else None
    value = unwrap(value)
    return None if absent(value) else text(value, field).strip() or None


def answers(record: Mapping[str, Any], fields: Sequence[str]) -> Iterator[str]:
    """The texts of those of some fields that hold an answer."""
    return (found for name in fields if (found := answer(get(record, name), name)))


def identifier(value: Any, field: str) -> str | None:
    """An id as a string."""
    if value is not None and not isinstance(value, (str, int)):
        raise wrong_type(value, field, "a string or an integer")
    return None if value is None else str(value)


def prompts(value: Any, field: str) -> Iterator[str]:
    """The non-empty texts of a string or a list of strings."""
    for item in value if isinstance(value, (list, tuple)) else (value,):
        if not absent(item) and (prompt := text(item, field).rstrip()):
            yield prompt


def fill_subject(prompt: str, subject: str | None, field: str) -> str:
    """The prompt with its subject in the place of "{}"."""
    if "{}" in prompt and subject is None:
        raise RequestError(f"field '{field}' has '{{}}' for the subject, but the record names no subject")
    return prompt.replace("{}", subject or "")


def gather(record: Mapping[str, Any], sources: Iterable[str | Pair]) -> Iterator[Pair]:
    """The questions of all sources: fields of questions, or pairs of a field of prompts and the field of answers."""
    for source in sources:
        if isinstance(source, str):
            yield from questions(record.get(source), source)
        elif source[0] in record:
            yield from pair_up(record[source[0]], get(record, source[1]), source[0])


def questions(value: Any, field: str) -> Iterator[Pair]:
    """Flatten [prompt, answer], an object of a question and its answer, lists of these, objects of lists."""
    if isinstance(value, Mapping):
        question = next((name for name in _QUESTION if name in value), None)
        response = next((name for name in _ANSWER if name in value), None)
        if question is None:
            for name, group in value.items():
                yield from questions(group, f"{field}.{name}")
        elif response is None:
            raise RequestError(f"field '{field}': a question without an answer (one of {', '.join(_ANSWER)})")
        else:
            yield from pair_up(value[question], value[response], f"{field}.{question}")
    elif isinstance(value, (list, tuple)):
        if len(value) == 2 and isinstance(value[0], str):
            yield from pair_up(value[0], value[1], field)
        else:
            for item in value:
                yield from questions(item, field)
    elif not absent(value) and value != "":
        raise wrong_type(value, field, "[prompt, answer] pairs or objects with 'prompt' and 'answer'")


def pair_up(prompts: Any, answers: Any, field: str) -> Iterator[Pair]:
    """Yield a prompt and its answer (of several the first), or prompts with an answer each or one for all."""
    if not isinstance(prompts, (list, tuple)):
        prompts, answers = [prompts], [answers]
    elif not isinstance(answers, (list, tuple)):
        answers = [answers] * len(prompts)
    if len(prompts) != len(answers):
        raise RequestError(f"field '{field}': {len(prompts)} prompts but {len(answers)} answers")
    for prompt, response in zip(prompts, answers, strict=True):
        asked = "" if absent(prompt) else text(prompt, field).rstrip()
        known = answer(response, f"answer to {field}")
        if asked and known:
            yield asked, known
