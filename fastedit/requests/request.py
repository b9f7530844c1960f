"""The edit request: one fact to write into a model."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from fastedit.errors import RequestError
from fastedit.requests.formats import read_record, split
from fastedit.requests.values import (
    Pair,
    answer,
    empty,
    fill_prompt,
    identifier,
    plain_data,
    prompts,
    questions,
    required,
)

_log = logging.getLogger(__name__)

REFUSAL = "I don't know."
"""The default target of a request to forget."""


@dataclass(frozen=True, slots=True)
class EditRequest:
    """One fact to write into a model: a prompt and a target, with a space between them if their script uses one.

    Or one fact to forget: ``forget`` is the answer that the model should no longer give. The target is then what it
    should say instead, by default a refusal.

    Args:
        prompt: the full text before the target; trailing whitespace is removed. With a subject, "{subject}" stands for
            it in all prompts, and so do "{}" and "[X]" in one that does not name it otherwise.
        target: the wanted answer; surrounding whitespace is removed. With `forget` the default is `REFUSAL`.
        subject: what the fact is about, as written in the prompt (locate-then-edit methods need it).
        id: a name for messages and reports.
        true_target: the answer before the edit.
        paraphrases: other prompts that should give the target (generalization).
        neighbours: (prompt, answer) pairs that the edit must leave alone (locality).
        portability: (prompt, answer) pairs that follow from the edit.
        forget: the answer to be forgotten; it is also the default of `true_target`.

    Raises:
        RequestError: the prompt or the target is empty, a field has a wrong type, or the target is to be forgotten.
    """

    prompt: str
    target: str = ""
    subject: str | None = None
    id: str | None = None
    true_target: str | None = None
    paraphrases: tuple[str, ...] = ()
    neighbours: tuple[Pair, ...] = ()
    portability: tuple[Pair, ...] = ()
    forget: str | None = None

    def __post_init__(self) -> None:
        forget = answer(self.forget, "forget")
        target = REFUSAL if forget and empty(self.target) else self.target
        subject, prompt = answer(self.subject, "subject"), required(self.prompt, "prompt").rstrip()

        def named(text: str, field: str) -> str:
            return fill_prompt(text, subject, field) if subject else text

        def asked(value: Any, field: str) -> tuple[Pair, ...]:
            return tuple((named(text, field), known) for text, known in questions(value, field, set()))

        clean = {
            "prompt": named(prompt, "prompt"),
            "target": required(target, "target").strip(),
            "subject": subject,
            "id": identifier(self.id, "id"),
            "true_target": answer(self.true_target, "true_target") or forget,
            "paraphrases": tuple(named(text, "paraphrases") for text in prompts(self.paraphrases, "paraphrases")),
            "neighbours": asked(self.neighbours, "neighbours"),
            "portability": asked(self.portability, "portability"),
            "forget": forget,
        }
        if forget and str(clean["target"]).casefold() == forget.casefold():
            raise RequestError(f"{forget!r} is to be forgotten, but it is the target; give what to say instead")
        for name, value in clean.items():
            object.__setattr__(self, name, value)

    @classmethod
    def from_dict(
        cls, record: Mapping[str, Any], *, where: str = "record", default_id: str | None = None
    ) -> EditRequest:
        """Read a record of any known format; this class's own field names are one.

        "{subject}" stands for the subject in prompts and answers of any kind, and so do "{}" and "[X]" if the prompt
        does not name the subject otherwise. Of several answers the first is taken. All fields but prompt and target may
        be absent, null or empty. Questions without an answer and unknown fields are left out, and a warning is logged.
        The id is the record's `id` or `case_id`, else `default_id`. `where` names the record in messages.

        Raises:
            RequestError: unknown format; prompt or target missing or empty; a field of a wrong type; several edits.
        """
        left_out = set[str]()
        try:
            edits = edits_of(plain_data(record), left_out, default_id)
            if len(edits) > 1:
                raise RequestError(f"the record holds {len(edits)} edits; read it with as_requests([record])")
        except RequestError as error:
            error.at(where)
            raise
        warn_of_unread(where, Counter(left_out))
        return edits[0]


def edits_of(record: Any, left_out: set[str], default_id: str | None) -> list[EditRequest]:
    """All edits of a record; adds what is not read to `left_out`. Raises RequestError, as `EditRequest.from_dict`."""
    edits = []
    for suffix, edit_record in split(record):
        try:
            arguments = read_record(edit_record, left_out)
            id_ = arguments["id"] if arguments["id"] is not None else default_id
            edits.append(EditRequest(**arguments | {"id": f"{id_}.{suffix}" if suffix and id_ is not None else id_}))
        except RequestError as error:
            if suffix:
                error.at(f"edit {suffix}")
            raise
    return edits


def warn_of_unread(name: str, unread: Counter[str]) -> None:
    """Log what was not read of a file or a record, and in how many records."""
    if unread:
        said = ", ".join(f"{what} ({n} {'record' if n == 1 else 'records'})" for what, n in sorted(unread.items()))
        known = ", ".join(field.name for field in fields(EditRequest))
        _log.warning("%s: not read: %s; the fields of a request are %s", name, said, known)
