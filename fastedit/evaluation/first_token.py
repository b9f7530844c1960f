"""The first token of an answer: its probabilities from hidden states, and how far those of two models diverge."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from fastedit.models import Topology, plain_state
from fastedit.tensorfile import checksums

LOGITS = 2**25  # elements of logits alive at once


class Head:
    """The head of a model as it was when this object was made.

    Logits are computed from kept states when they are needed: for 10,000 places states take megabytes, logits
    gigabytes.

    Args:
        keep: copy the head, for an edit that changes the head itself.
    """

    def __init__(self, topology: Topology, *, keep: bool = False) -> None:
        self._topology = topology
        self._head = deepcopy(topology.head).requires_grad_(False) if keep else None
        self._sums = None if keep else checksums(dict(topology.head.named_parameters()))

    @property
    def stands(self) -> bool:
        """Whether the head can still be used: it was copied, or has not changed."""
        return self._sums is None or self._sums == checksums(dict(self._topology.head.named_parameters()))

    @property
    def rows(self) -> int:
        """How many states may have their logits in memory at once."""
        return max(1, LOGITS // int(self._topology.config.vocab_size))

    def log_probabilities(self, states: Tensor) -> Tensor:
        """Log-probabilities of the next token [M, V], fp32, for states [M, h] after the final norm."""
        states = states.to(self._topology.device)
        return self._topology.logits(states, self._head).float().log_softmax(-1)


@plain_state
@torch.no_grad()
def divergences(
    before: Head, after: Head, states_before: Sequence[Tensor], states_after: Sequence[Tensor]
) -> list[float]:
    """KL(before ‖ after) in nats of the next token's distribution, for each pair of states [h].

    Equal pairs are computed once.
    """
    places: dict[tuple[int, int], int] = {}
    pairs = list(zip(states_before, states_after, strict=True))
    indices = [places.setdefault((id(b), id(a)), len(places)) for b, a in pairs]
    unique = {i: pair for i, pair in zip(indices, pairs, strict=True)}
    kl: list[float] = []
    for first in range(0, len(unique), before.rows):
        chunk = [unique[i] for i in range(first, min(first + before.rows, len(unique)))]
        old, new = (
            head.log_probabilities(torch.stack(states))
            for head, states in zip((before, after), zip(*chunk, strict=True), strict=True)
        )
        kl += kl_div(new, old, reduction="none", log_target=True).sum(-1).clamp_(min=0).tolist()
    return [kl[i] for i in indices]
