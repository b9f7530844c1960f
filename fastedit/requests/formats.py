"""The record formats that the field publishes.

A format is told by the two fields that hold its prompt and its target (`_FORMATS`). The other fields mean the
same wherever they appear, so one set of tables reads them for every format.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastedit.errors import RequestError, listed
from fastedit.requests.values import answers, fill_subject, gather, get, identifier, prompts, required, unwrap

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
_OPTIONAL = (*_SUBJECT, *_ID, *_TRUE_TARGET, *_PARAPHRASES, *_NEIGHBOURS, *_PORTABILITY)
PUBLISHED = {(field if isinstance(field, str) else field[0]).partition(".")[0] for field in _OPTIONAL}
"""Names of the optional fields of all formats."""


def read_record(record: Any) -> dict[str, Any]:
    """The arguments of an `EditRequest` from a record of any known format.

    Raises:
        RequestError: not a record; unknown format; prompt or target missing or empty; a field of a wrong type.
    """
    if not isinstance(record, Mapping):
        raise RequestError(f"expected an object, the fields of an edit, got {record!r:.40}")
    prompt, target = _prompt_and_target(record)
    subject = next(answers(record, _SUBJECT), None)
    paraphrases = [(name, text) for name in _PARAPHRASES for text in prompts(get(record, name), name)]
    return {
        "prompt": fill_subject(required(get(record, prompt), prompt), subject, prompt),
        "target": required(unwrap(get(record, target)), target),
        "subject": subject,
        "id": next((identifier(record[n], n) for n in _ID if record.get(n) is not None), None),
        "true_target": next(answers(record, _TRUE_TARGET), None),
        "paraphrases": tuple(fill_subject(text, subject, name) for name, text in paraphrases),
        "neighbours": tuple(gather(record, _NEIGHBOURS)),
        "portability": tuple(gather(record, _PORTABILITY)),
    }


def _prompt_and_target(record: Mapping[str, Any]) -> tuple[str, str]:
    """The names of the fields that hold the prompt and the target of a record."""
    lacking = []
    for _, *fields in _FORMATS:
        missing = [name for name in fields if get(record, name) is None]
        if not missing:
            return fields[0], fields[1]
        lacking += missing if len(missing) == 1 else []
    known = "; ".join(f"{name} ({prompt}, {target})" for name, prompt, target in _FORMATS)
    raise RequestError(
        f"the record fits no known format, it lacks {' or '.join(lacking) or 'both prompt and target'}; its "
        f"fields are {listed(list(map(str, record))) or 'none'}. Formats, their prompt and target: {known}"
    )
