"""Turn requests of other editing code into edits with the texts that it would tokenize."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastedit.errors import Problem, RequestError
from fastedit.models import joined
from fastedit.requests.values import blank

_PLACE = "{}"


@dataclass(frozen=True)
class UpstreamEdit:
    """A `fastedit.methods.base.Edit` with its texts as they were given.

    `subject_end` is the place in the prompt, in characters, where the subject ends, if the prompt was a template.
    """

    prompt: str
    target: str
    subject: str | None = None
    id: str | None = None
    subject_end: int | None = None


def upstream_edits(requests: Sequence[Mapping[str, Any]]) -> list[UpstreamEdit]:
    """Make edits from records with `prompt`, `target_new`, and optionally `subject` and `case_id`.

    A prompt is a template with one "{}" for the subject, or contains the subject. A target is a text, or a mapping
    with "str"; one space is put between prompt and target.

    Raises:
        RequestError: some records cannot be used; names all of them.
    """
    if isinstance(requests, Mapping | str) or not isinstance(requests, Iterable):
        raise RequestError(f"requests is a {type(requests).__name__}, expected a list of mappings")
    if not (requests := list(requests)):
        raise RequestError("there are no requests; give at least one")
    edits, problems = [], []
    for place, request in enumerate(requests):
        try:
            edits.append(_edit(request))
        except RequestError as error:
            problems.append(Problem(f"requests[{place}]", str(error)))
    if problems:
        raise RequestError.of(problems, "requests")
    return edits


def _edit(request: Mapping[str, Any]) -> UpstreamEdit:
    if not isinstance(request, Mapping):
        raise RequestError(f"it is a {type(request).__name__}, expected a mapping with prompt and target_new")
    target, subject = request.get("target_new"), request.get("subject")
    prompt = _text(request.get("prompt"), "prompt")
    target = _text(target.get("str") if isinstance(target, Mapping) else target, "target_new")
    if subject is not None and not isinstance(subject, str):
        raise RequestError(f"subject is {subject!r}, expected a text")
    end = None
    if _PLACE in prompt:
        before, *after = prompt.split(_PLACE)
        if not subject or len(after) > 1:
            what = "no subject to put there" if not subject else f"{len(after)} places for it, expected one"
            raise RequestError(f"the prompt {prompt!r:.80} is a template and there is {what}")
        prompt, end = before + subject + after[0], len(before) + len(subject)
    id_ = request.get("case_id")
    return UpstreamEdit(prompt, _spaced(prompt, target), subject, None if id_ is None else str(id_), end)


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str) or blank(value):
        raise RequestError(f"{name} is {value!r}, expected a text")
    return value


def _spaced(prompt: str, target: str) -> str:
    """The target in a form that has one space before it when it is joined to the prompt, whatever its script."""
    target = target.removeprefix(" ")
    return target if joined(prompt, target) != prompt + target else f" {target}"
