"""The edit request: one fact to write into a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastedit.errors import RequestError
from fastedit.requests.formats import read_record
from fastedit.requests.values import Pair, answer, identifier, prompts, questions, required


@dataclass(frozen=True, slots=True)
class EditRequest:
    """One fact to write into a model: prompt and target, with a space between them where their script has one.

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
            "prompt": required(self.prompt, "prompt").rstrip(),
            "target": required(self.target, "target").strip(),
            "subject": answer(self.subject, "subject"),
            "id": identifier(self.id, "id"),
            "true_target": answer(self.true_target, "true_target"),
            "paraphrases": tuple(prompts(self.paraphrases, "paraphrases")),
            "neighbours": tuple(questions(self.neighbours, "neighbours")),
            "portability": tuple(questions(self.portability, "portability")),
        }
        for name, value in clean.items():
            object.__setattr__(self, name, value)

    @classmethod
    def from_dict(
        cls, record: Mapping[str, Any], *, where: str = "record", default_id: str | None = None
    ) -> EditRequest:
        """Read a record of any known format; this class's own field names are one.

        "{}" in the prompt and in paraphrases stands for the subject. Of several answers the first is taken.
        All but prompt and target may be absent, null or empty; questions whose answer is null or empty are
        left out. The id is the record's `id` or `case_id`, else `default_id`. `where` names the record in messages.

        Raises:
            RequestError: unknown format; prompt or target missing or empty; a field of a wrong type.
        """
        try:
            given = read_record(record)
            return cls(**given if given["id"] is not None else given | {"id": default_id})
        except RequestError as error:
            error.at(where)
            raise
