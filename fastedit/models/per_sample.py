"""Run a batch in which every token uses its own edit's weights, without writing these to the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastedit.errors import TensorError
from fastedit.models.hooks import hooked

Factors = tuple[Tensor, Tensor]
"""left [N, out, k] and right [N, k, in] of N edits of a linear map y = W x: edit e adds ``left[e] @ right[e]`` to W."""


@contextmanager
def per_sample_updates(updates: Mapping[nn.Module, Factors], owner: Tensor) -> Iterator[None]:
    """Let linear maps add ``left[e] @ (right[e] @ x)`` to their output for a token x of edit e.

    The sum is in fp32 (fp64 in an fp64 model) and rounded once more to the model's dtype, whereas a written edit is
    rounded with the weights. All tokens must pass through the maps inside the block: do not use `resume` there, or
    `run_from_tokens` with `prune`.

    Args:
        updates: linear map (nn.Linear or Conv1D) -> factors, on any device.
        owner: [O] int64 on the CPU: the edit of each of O equal pieces of a map's flattened input. Pieces are
            tokens, if samples of several edits share a row, or else whole rows.

    Raises:
        TensorError: O does not divide the number of tokens of a pass.
    """
    edits, local = owner.unique(return_inverse=True)  # [n], [O]
    with hooked(m.register_forward_hook(_adding(*factors, edits, local)) for m, factors in updates.items()):
        yield


def _adding(left: Tensor, right: Tensor, edits: Tensor, local: Tensor) -> Callable[..., Tensor]:
    """The hook of a map. One product with all edits of the batch is faster than a small one for each edit."""
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
            raise TensorError(f"a pass over {len(x)} tokens does not divide among {len(others)} owners")
        seen = (x.to(wide) @ rights.T).masked_fill(others.repeat_interleave(len(x) // len(others), 0), 0)  # [T, n k]
        total: Tensor = output.to(wide) + (seen @ lefts).view_as(output)
        return total.to(output.dtype)

    return add
