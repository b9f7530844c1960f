"""Anchors: the edits' prompts with other subjects, where the edited model is held to what the unedited one predicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastedit.methods.base import Edit
from fastedit.methods.subjects import subject_ends

_LIKELIEST = 256  # tokens whose probabilities are kept of each prediction; the others count as one


def anchor_prompts(
    edits: Sequence[Edit], count: int, *, seed: int, subjects: Sequence[str] | None = None
) -> list[tuple[int, str, int]]:
    """Put other subjects into the edits' prompts: (place of the edit, prompt, where its subject ends).

    There are `count` of each edit, or fewer.

    Edits whose subject is unknown or does not stand in the prompt have none.

    Args:
        seed: of the choice of subjects.
        subjects: to choose from; None is those of the other edits. A subject that some edit asks about in the same
            words is not put there.
    """
    generator = torch.Generator().manual_seed(seed)
    parts = [_parts(edit) for edit in edits]
    asked: dict[tuple[str, str], set[str]] = {}
    for before, subject, after in parts:
        asked.setdefault((before, after), set()).add(subject)
    pool = list(dict.fromkeys([subject for _, subject, _ in parts if subject] if subjects is None else subjects))
    prompts: list[tuple[int, str, int]] = []
    for place, (before, subject, after) in enumerate(parts):
        if not subject:
            continue
        taken = asked[before, after]
        # as many more as are taken: enough of them are left
        drawn = torch.randint(len(pool), (4 * (count + len(taken)),), generator=generator).tolist()
        others = [other for other in dict.fromkeys(pool[i] for i in drawn) if other not in taken]
        prompts += [(place, before + other + after, len(before + other)) for other in others[:count]]
    return prompts


def _parts(edit: Edit) -> tuple[str, str, str]:
    """What stands before the subject, the subject, and what stands after it; empty without a subject."""
    ends = subject_ends(edit)
    if not ends:
        return "", "", ""
    subject = str(edit.subject)
    return edit.prompt[: ends[-1] - len(subject)], subject, edit.prompt[ends[-1] :]


@dataclass(frozen=True)
class Anchors:
    """The anchors among the samples of a training set, which stand behind those that are trained on.

    Attributes:
        first: place of the first one among the samples.
        of: the anchors of each edit, counted from there.
    """

    first: int
    of: Sequence[list[int]]

    def __len__(self) -> int:
        return sum(map(len, self.of))

    def draw(self, edits: Sequence[int], generator: torch.Generator) -> Tensor:
        """Draw one anchor of each of these edits [K], none of an edit without anchors."""
        groups = [self.of[edit] for edit in edits if self.of[edit]]
        numbers = torch.rand(len(groups), generator=generator).tolist() if groups else []
        chosen = [group[int(number * len(group))] for group, number in zip(groups, numbers, strict=True)]
        return torch.tensor(chosen, dtype=torch.int64)


@dataclass(frozen=True)
class Reference:
    """What a model predicts at A places: the k likeliest tokens, and their log-probabilities.

    Attributes:
        tokens: [A, k] int64.
        logp: [A, k] fp32.
    """

    tokens: Tensor
    logp: Tensor

    @classmethod
    def of(cls, logits: Tensor) -> Reference:
        """The predictions whose logits are [A, V], fp32."""
        logp, tokens = logits.log_softmax(-1).topk(min(_LIKELIEST, logits.shape[-1]), -1)
        return cls(tokens, logp)

    @classmethod
    def joined(cls, parts: Sequence[Reference]) -> Reference:
        """The predictions of all parts, one after the other."""
        return cls(torch.cat([part.tokens for part in parts]), torch.cat([part.logp for part in parts]))

    def divergence(self, places: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """KL(reference ‖ model) in nats at some places [Q], and its gradient in the model's logits [Q, V].

        The tokens that were not kept count as one, so that this is a lower bound; it is 0 only if the kept ones
        have their probabilities. The gradient is written over the logits, fp32.
        """
        tokens, logp = self.tokens[places], self.logp[places]  # [Q, k]
        found = logits.gather(1, tokens) - logits.logsumexp(-1, keepdim=True)
        p, q = logp.exp(), found.exp()
        rest, rest_q = ((1 - x.sum(-1)).clamp(min=1e-8) for x in (p, q))  # [Q]
        loss = (p * (logp - found)).sum(-1) + rest * (rest / rest_q).log()
        gradient = torch.softmax(logits, -1, out=logits)
        gradient *= (1 - rest / rest_q)[:, None]
        return loss, gradient.scatter_(1, tokens, q - p)
