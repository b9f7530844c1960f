"""Which facts a prompt is near to, by what the edited projection reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.nn.functional import normalize

from fastedit.ledger.records import Fact
from fastedit.methods.locate_then_edit.batch import Batch
from fastedit.methods.locate_then_edit.keys import KeyWalk
from fastedit.methods.subjects import subject_ends
from fastedit.models import Model
from fastedit.requests import EditRequest


@dataclass(frozen=True)
class Likeness:
    """How near a prompt is to a fact.

    Attributes:
        fact: the fact.
        cosine: of the two keys.
        at: where the prompt's key was read: a subject in it, or its last token (None).
    """

    fact: Fact
    cosine: float
    at: str | None


def likenesses(
    model: Model, config: Mapping[str, Any], facts: Sequence[Fact], prompt: str, subject: str | None
) -> list[Likeness]:
    """The likeness of a prompt to each fact, the nearest first.

    A key is what the lowest edited module reads: of a fact at the last token of its subject, or of the prompt if no
    subject stands in it. The prompt is read at its last token and at each subject of a fact that stands in it, and its
    nearest key counts. What is read there does not depend on the edits.

    Args:
        config: of the edit that the model holds.
        subject: read the prompt there and nowhere else.
    """
    places = config.get("layers") or config["layer"]
    layer = min(places) if isinstance(places, Sequence) else int(places)
    known = dict.fromkeys(fact.request.subject for fact in facts if fact.request.subject)
    asked = [subject] if subject else [None, *(name for name in known if name in prompt)]
    requests = [EditRequest(prompt, "?", at, id="the prompt") for at in asked]
    requests += [f.request if subject_ends(f.request) else replace(f.request, subject=None) for f in facts]
    whole = [request if request.subject else replace(request, subject=request.prompt) for request in requests]
    with KeyWalk(Batch(model, whole), layer) as walk:
        keys: Tensor = normalize(walk.keys(config["module"]).double(), dim=1)
    cosines, nearest = (keys[len(asked) :] @ keys[: len(asked)].T).max(1)
    found = zip(facts, cosines.tolist(), nearest.tolist(), strict=True)
    return sorted((Likeness(fact, cosine, asked[at]) for fact, cosine, at in found), key=lambda like: -like.cosine)
