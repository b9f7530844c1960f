"""Passes that run a part of the model: up to what a module sees, or without tokens that nothing can change."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastedit.models.prefix import Override, at_rows, forwards, pruned, resume, run_blocks
from fastedit.models.tokens import Rows
from fastedit.models.topology import Stopped, Topology, eval_mode


@torch.no_grad()
def observe(
    topology: Topology, hidden: Tensor, rows: Rows, layer: int, module: nn.Module, *, output: bool = False
) -> Tensor:
    """What enters ``module``, or leaves it, at the target rows; nothing behind it runs.

    Args:
        hidden: [B, R, h], the input of block ``layer`` (``PrefixCache.hidden``).
        module: a module of block ``layer`` or of a later one, or such a block itself.

    Returns:
        [M, width] at ``rows.target_rows``, in the model's dtype.
    """

    def leave(_: nn.Module, args: tuple[Any, ...], result: Any = None) -> None:
        seen = result if output else args
        raise Stopped(seen[0] if isinstance(seen, tuple) else seen)

    handle = (module.register_forward_hook if output else module.register_forward_pre_hook)(leave)
    try:
        states = run_blocks(topology, rows, layer, hidden)
    finally:
        handle.remove()
    return states.view(-1, states.shape[-1]).index_select(0, rows.target_rows)


class BlockCalls:
    """How the backbone calls its blocks from ``layer`` on for some rows, to call them so again.

    ``resume`` of this class is that of the package. The first one goes through the backbone and keeps the
    arguments of each block (masks, rotary embeddings) and the modules behind the last one; later ones call these
    directly. That saves the backbone's own work, and on a GPU a wait: recent transformers look at the positions.
    """

    def __init__(self, topology: Topology, rows: Rows, layer: int, overrides: Sequence[Override] = ()) -> None:
        self._topology, self._rows, self._layer, self._overrides = topology, rows, layer, list(overrides)
        self._calls: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = []

    def resume(self, hidden: Tensor) -> Tensor:
        """Hidden states [M, h] at the target rows, from the input [B, R, h] of block ``layer``."""
        if not self._calls:
            return self._record(hidden)
        with forwards(self._again), eval_mode(self._topology.backbone):
            for module, args, kwargs in self._calls:
                output = module(hidden, *args, **kwargs)
                hidden = output[0] if isinstance(output, tuple) else output
        return hidden.reshape(-1, hidden.shape[-1]).index_select(0, self._rows.target_rows)

    def _record(self, hidden: Tensor) -> Tensor:
        topology, rows = self._topology, self._rows
        called: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = []

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            others = {name: value for name, value in kwargs.items() if name != "hidden_states"}
            called.append((module, args[1:], others))

        running = list(topology.blocks[self._layer :])
        tail = [child for child in topology.backbone.children() if child is not topology.blocks]
        handles = [m.register_forward_pre_hook(note, with_kwargs=True) for m in (*running, *tail)]
        try:
            states = resume(topology, hidden, rows, self._layer, self._overrides)
        finally:
            for handle in handles:
                handle.remove()
        first = next(i for i, (module, _, _) in enumerate(called) if module is running[0])
        self._calls = called[first:]
        self._again = [*self._overrides, *pruned(topology, rows)]
        return states


class HeldTokens:
    """Tokens whose states in blocks ``layer`` … n-1 stay what they are: others only read their keys and values.

    Such are the tokens in front of the first one that a loop changes, since attention is causal. ``record``
    keeps what the projections to keys and values make of them; with ``overrides``, ``resume`` then runs all
    linear maps of these blocks at the remaining tokens alone. Attention itself and the norms are cheap and
    run at all tokens. ``supported`` is False where a block has been rebuilt: ``overrides`` is empty then.
    """

    def __init__(self, topology: Topology, layer: int) -> None:
        blocks = range(layer, topology.n_blocks)
        attended = [topology.attended(block) for block in blocks]
        self.supported = all(attended)
        self._attended = [module for modules in attended for module in modules] if self.supported else []
        self._rowwise = [m for block in blocks for m in topology.rowwise(block)] if self.supported else []
        self._tokens = torch.empty(0, dtype=torch.int64)  # [K] in the flat buffers, and
        self._kept: list[Tensor] = []  # what each module made of them, [K, out]

    @property
    def nbytes(self) -> int:
        """Bytes of the recorded keys and values; `overrides` hold about as much again."""
        return sum(kept.nbytes for kept in self._kept)

    @contextmanager
    def record(self, rows: Rows, places: Tensor) -> Iterator[None]:
        """Keep the tokens at these flat places [K] (on the CPU) of ``rows`` from the ``resume`` inside."""
        index = places.to(rows.index.device)
        seen: list[Tensor] = []

        def keep(_: nn.Module, __: Any, output: Tensor) -> None:
            seen.append(output.detach().reshape(-1, output.shape[-1]).index_select(0, index))

        handles = [module.register_forward_hook(keep) for module in self._attended]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        self._kept = [torch.cat(pair) for pair in zip(self._kept, seen, strict=True)] if self._kept else seen
        self._tokens = torch.cat([self._tokens, rows.host_index.view(-1)[places]])

    def overrides(self, rows: Rows, places: Tensor, running: Tensor) -> list[Override]:
        """What lets ``resume`` run on ``rows`` with the tokens at ``places`` [K] held and those at ``running`` [A].

        Both are flat places on the CPU; tokens at neither are pads, and target rows must be among those that
        run. Recorded tokens that are not among these are forgotten.
        """
        if not self.supported:
            return []
        device = rows.index.device
        tokens = rows.host_index.view(-1)[places]
        ordered, order = self._tokens.sort()
        known = order[torch.searchsorted(ordered, tokens)]
        self._tokens = tokens
        known, places, running = (x.to(device) for x in (known, places, running))
        self._kept = [kept.index_select(0, known) for kept in self._kept]
        overrides: list[Override] = [(module, at_rows(module, running)) for module in self._rowwise]
        for module, kept in zip(self._attended, self._kept, strict=True):
            held = kept.new_zeros(rows.index.numel(), kept.shape[1]).index_copy(0, places, kept)
            overrides.append((module, at_rows(module, running, held)))
        return overrides
