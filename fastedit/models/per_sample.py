"""A batch in which every token meets the weights of its own edit, none of which is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastedit.models.hooks import hooked

Factors = tuple[Tensor, Tensor]
"""left [N, out, k] and right [N, k, in] of N edits of a linear map: edit e adds ``left[e] @ right[e]`` to y = W x."""


@contextmanager
def per_sample_updates(updates: Mapping[nn.Module, Factors], owner: Tensor) -> Iterator[None]:
    """Let linear maps add ``left[e] @ (right[e] @ x)`` to what they make of a token x of edit e.

    The sum is fp32 (fp64 in a model of fp64) and rounded once more to the model's dtype; edits that are written are
    rounded with the weights. What runs inside must show the maps all tokens: no `resume`, nor a `run_from_tokens` that
    prunes.

    Args:
        updates: linear map (a Conv1D too) -> factors, on any device.
        owner: [O] int64 on the CPU: the edit of each of O equal pieces of a map's flattened input. Pieces are
            tokens, where samples of several edits share a row, or whole rows.

    Raises:
        ValueError: a pass over a number of tokens that O does not divide.
    """
    edits, local = owner.unique(return_inverse=True)  # [n], [O]
    with hooked(m.register_forward_hook(_adding(*factors, edits, local)) for m, factors in updates.items()):
        yield


def _adding(left: Tensor, right: Tensor, edits: Tensor, local: Tensor) -> Callable[..., Tensor]:
    """The hook of a map; one product with all edits of the batch is quicker than a small one for each."""
    lefts, rights = (factor.index_select(0, edits.to(factor.device)) for factor in (left, right))
    n, out, k = lefts.shape
    lefts, rights = lefts.transpose(1, 2).reshape(n * k, out), rights.reshape(n * k, -1)
    others = local[:, None] != torch.arange(n).repeat_interleave(k)  # [O, n k]

    def add(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        nonlocal lefts, rights, others
        wide = torch.promote_types(output.dtype, torch.float32)
        lefts, rights, others = lefts.to(output.device, wide), rights.to(output.device, wide), others.to(output.device)
        x = args[0].reshape(-1, rights.shape[1])  # [T, in]
        if len(x) % len(others):
            raise ValueError(f"a pass over {len(x)} tokens does not divide among {len(others)} owners")
        seen = (x.to(wide) @ rights.T).masked_fill(others.repeat_interleave(len(x) // len(others), 0), 0)  # [T, n k]
        total: Tensor = output.to(wide) + (seen @ lefts).view_as(output)
        return total.to(output.dtype)

    return add
