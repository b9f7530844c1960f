"""Find the facts that a prompt is near to, by the inputs of the edited projection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.nn.functional import normalize

from fastedit.ledger.records import Fact
from fastedit.methods.batch import Batch
from fastedit.methods.keys import KeyWalk
from fastedit.methods.subjects import subject_spans
from fastedit.models import Model, plain_state
from fastedit.requests import EditRequest


@dataclass(frozen=True)
class Likeness:
    """How near a prompt is to a fact.

    Attributes:
        fact: the fact.
        cosine: cosine of the two keys.
        at: the subject at which the prompt's key was read; None is the prompt's last token.
    """

    fact: Fact
    cosine: float
    at: str | None


@plain_state
def likenesses(
    model: Model, config: Mapping[str, Any], facts: Sequence[Fact], prompt: str, subject: str | None
) -> list[Likeness]:
    """The likeness of a prompt to each fact, the nearest first.

    A key is the input of the lowest edited module. A fact's key is read at the last token of its subject, or of its
    prompt if the subject is not in it. The prompt's keys are read at its last token and at each fact's subject that it
    contains; the nearest one counts. The edits do not change these keys.

    Args:
        config: configuration of the edit that the model holds.
        subject: read the prompt only at this subject.
    """
    layers = config.get("layers") or config["layer"]
    layer = min(layers) if isinstance(layers, Sequence) else int(layers)
    known = dict.fromkeys(fact.request.subject for fact in facts if fact.request.subject)
    asked = [subject] if subject else [None, *(name for name in known if name in prompt)]
    requests = [EditRequest(prompt, "?", at, id="the prompt") for at in asked]
    requests += [f.request if subject_spans(f.request) else replace(f.request, subject=None) for f in facts]
    whole = [request if request.subject else replace(request, subject=request.prompt) for request in requests]
    with KeyWalk(Batch(model, whole), layer) as walk:
        keys: Tensor = normalize(walk.keys(config["module"]).double(), dim=1)
    cosines, nearest = (keys[len(asked) :] @ keys[: len(asked)].T).max(1)
    triples = zip(facts, cosines.tolist(), nearest.tolist(), strict=True)
    return sorted((Likeness(fact, cosine, asked[at]) for fact, cosine, at in triples), key=lambda like: -like.cosine)
