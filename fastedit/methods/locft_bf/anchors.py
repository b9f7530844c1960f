"""Anchors: the edits' prompts with other subjects, where the edited model must predict what the unedited one does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastedit.methods.base import Edit
from fastedit.models import Span

_LIKELIEST = 256  # likeliest tokens that are kept of each prediction; all others count as one


def anchor_prompts(
    edits: Sequence[Edit],
    spans: Sequence[Sequence[Span]],
    count: int,
    *,
    seed: int,
    subjects: Sequence[str] | None = None,
) -> list[tuple[int, str, int]]:
    """Put other subjects into the edits' prompts: (place of the edit, prompt, where its subject ends).

    Each edit has at most `count` of them; edits whose subject is not in the prompt have none.

    Args:
        spans: places of each edit's subject in its prompt; the last one is replaced.
        seed: seed for the choice of subjects.
        subjects: subjects to choose from; None is those of the other edits. A subject is not put into a prompt if that
            makes the prompt of an edit.
    """
    generator = torch.Generator().manual_seed(seed)
    parts = [_parts(edit.prompt, *some[-1:]) for edit, some in zip(edits, spans, strict=True)]
    asked: dict[tuple[str, str], set[str]] = {}
    for before, subject, after in parts:
        asked.setdefault((before, after), set()).add(subject)
    pool = list(dict.fromkeys([subject for _, subject, _ in parts if subject] if subjects is None else subjects))
    prompts: list[tuple[int, str, int]] = []
    for place, (before, subject, after) in enumerate(parts):
        if not subject:
            continue
        taken = asked[before, after]
        # draw more, because some are taken
        drawn = torch.randint(len(pool), (4 * (count + len(taken)),), generator=generator).tolist()
        others = [other for other in dict.fromkeys(pool[i] for i in drawn) if other not in taken]
        prompts += [(place, before + other + after, len(before + other)) for other in others[:count]]
    return prompts


def _parts(prompt: str, subject: Span | None = None) -> tuple[str, str, str]:
    """The text before the subject, the subject, and the text after it; all empty without a subject."""
    if subject is None:
        return "", "", ""
    start, end = subject
    return prompt[:start], prompt[start:end], prompt[end:]


@dataclass(frozen=True)
class Anchors:
    """The anchors in a training set; they follow the samples that are trained on.

    Attributes:
        first: place of the first anchor among the samples.
        by_edit: the anchors of each edit, counted from the first one.
    """

    first: int
    by_edit: Sequence[list[int]]

    def __len__(self) -> int:
        return sum(map(len, self.by_edit))

    def draw(self, edits: Sequence[int], generator: torch.Generator) -> Tensor:
        """Draw one anchor [K] of each of these edits; edits without anchors have none."""
        groups = [self.by_edit[edit] for edit in edits if self.by_edit[edit]]
        numbers = torch.rand(len(groups), generator=generator).tolist() if groups else []
        chosen = [group[int(number * len(group))] for group, number in zip(groups, numbers, strict=True)]
        return torch.tensor(chosen, dtype=torch.int64)


@dataclass(frozen=True)
class Reference:
    """The predictions of a model at A places: the k likeliest tokens, and their log-probabilities.

    Attributes:
        tokens: [A, k] int64.
        logp: [A, k] fp32.
    """

    tokens: Tensor
    logp: Tensor

    @classmethod
    def of(cls, logits: Tensor) -> Reference:
        """The predictions of fp32 logits [A, V]."""
        logp, tokens = logits.log_softmax(-1).topk(min(_LIKELIEST, logits.shape[-1]), -1)
        return cls(tokens, logp)

    @classmethod
    def joined(cls, parts: Sequence[Reference]) -> Reference:
        """The predictions of all parts, one after the other."""
        return cls(torch.cat([part.tokens for part in parts]), torch.cat([part.logp for part in parts]))

    def divergence(self, places: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """KL(reference ‖ model) in nats at some places [Q], and its gradient in the model's logits [Q, V].

        All tokens that were not kept count as one, so this is a lower bound. It is 0 only if the kept tokens have the
        reference's probabilities. The gradient overwrites the logits, fp32.
        """
        tokens, logp = self.tokens[places], self.logp[places]  # [Q, k]
        logq = logits.gather(1, tokens) - logits.logsumexp(-1, keepdim=True)
        p, q = logp.exp(), logq.exp()
        others_p, others_q = ((1 - x.sum(-1)).clamp(min=1e-8) for x in (p, q))  # [Q]
        loss = (p * (logp - logq)).sum(-1) + others_p * (others_p / others_q).log()
        gradient = torch.softmax(logits, -1, out=logits)
        gradient *= (1 - others_p / others_q)[:, None]
        return loss, gradient.scatter_(1, tokens, q - p)
