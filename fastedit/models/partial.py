"""Passes that run a part of the model: up to what a module sees, or without tokens that nothing can change."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from fastedit.models.past import Past
from fastedit.models.prefix import (
    Override,
    PrefixCache,
    at_rows,
    forwards,
    in_passes,
    pass_tokens,
    pruned,
    resume,
    run_blocks,
)
from fastedit.models.tokens import Rows, Samples, pack, ragged
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


def at_tokens(topology: Topology, rows: Rows, layer: int) -> list[Override]:
    """Overrides that run the linear maps of blocks ``layer`` … n-1 at tokens alone, not at pads."""
    tokens = rows.token_rows.to(rows.index.device)
    linear = (m for i in range(layer, topology.n_blocks) for m in topology.rowwise(i) + topology.attended(i))
    return [(module, at_rows(module, tokens)) for module in linear]


class BlockCalls:
    """How the backbone calls its blocks from ``layer`` on for some rows, to call them so again.

    ``resume`` of this class is that of the package. The first one goes through the backbone and keeps the
    arguments of each block (masks, rotary embeddings) and the modules behind the last one; later ones call these
    directly. That saves the backbone's own work, and on a GPU a wait: recent transformers look at the positions.
    """

    def __init__(
        self,
        topology: Topology,
        rows: Rows,
        layer: int,
        overrides: Sequence[Override] = (),
        past: Past | None = None,
    ) -> None:
        self._topology, self._rows, self._layer = topology, rows, layer
        self._overrides, self._past = list(overrides), past
        self._calls: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = []

    def resume(self, hidden: Tensor) -> Tensor:
        """Hidden states [M, h] at the target rows, from the input [B, R, h] of block ``layer``."""
        if not self._calls:
            return self._record(hidden)
        with forwards(self._again), eval_mode(self._topology.backbone), self._attention():
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
            with self._attention():
                states = resume(topology, hidden, rows, self._layer, self._overrides, self._past)
        finally:
            for handle in handles:
                handle.remove()
        first = next(i for i, (module, _, _) in enumerate(called) if module is running[0])
        self._calls = called[first:]
        self._again = [*self._overrides, *pruned(topology, rows)]
        return states

    def _attention(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._past is None else self._past.attention()


class _Recorder(DynamicCache):  # type: ignore[misc]  # transformers is not typed
    """Notes keys and values [K, heads, width] of the tokens at some flat places; nothing stands in front."""

    mask = None

    def __init__(self, places: Tensor) -> None:
        super().__init__()
        self.places = places
        self.seen: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        key, value = (x.transpose(1, 2).flatten(0, 1).index_select(0, self.places) for x in (keys, values))
        self.seen[layer_idx] = key, value
        return keys, values


class HeldTokens:
    """Tokens whose states in the blocks behind a prefix cache stay what they are: others read their keys and values.

    Such are the tokens in front of the first one that a loop changes, since attention is causal. ``record`` runs
    them and keeps what each block's attention reads; ``rest`` is what then remains to run, without them.

    Args:
        counts: [N] int64, how many tokens at the beginning of each sample are held.
    """

    def __init__(self, topology: Topology, cache: PrefixCache, samples: Samples, counts: Tensor) -> None:
        self._topology, self._cache, self._samples, self._counts = topology, cache, samples, counts
        self._tokens = torch.empty(0, dtype=torch.int64)  # [K] in the flat buffers, and
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}  # what each block's attention reads of them
        self.supported = True
        """False once a block was seen whose attention asks no cache: ``rest`` is then all."""

    @property
    def nbytes(self) -> int:
        """Bytes of the recorded keys and values; what ``rest`` lays out takes about as much again."""
        return sum(kept.nbytes for pair in self._kept.values() for kept in pair)

    @torch.no_grad()
    def record(self, select: Tensor) -> None:
        """Run the tokens of these samples that are held."""
        select = select[self._counts[select] > 0]
        passes = in_passes(self._counts[select], pass_tokens(self._topology.device))
        seen = [self._seen(select[some.start : some.stop]) for some in passes]
        if not self.supported:
            return
        for block in seen[0][1] if seen else ():
            new = [recorded[block] for _, recorded in seen]
            old = [self._kept[block]] if block in self._kept else []
            keys, values = (torch.cat(parts) for parts in zip(*old, *new, strict=True))
            self._kept[block] = keys, values
        self._tokens = torch.cat([self._tokens, *(tokens for tokens, _ in seen)])

    def _seen(self, select: Tensor) -> tuple[Tensor, dict[int, tuple[Tensor, Tensor]]]:
        """The held tokens [K] of these samples, and the keys and values of each block."""
        topology, layer = self._topology, self._cache.layer
        rows = pack(self._samples, select, packed=False, stop=self._counts[select]).to(topology.device)
        recorder = _Recorder(rows.token_rows.to(topology.device))
        resume(topology, self._cache.hidden(rows), rows, layer, at_tokens(topology, rows, layer), recorder)
        self.supported = self.supported and recorder.seen.keys() == set(range(layer, topology.n_blocks))
        return rows.host_index.view(-1)[rows.token_rows], recorder.seen

    def rest(self, select: Tensor) -> tuple[Rows, Past | None]:
        """The rows of the tokens of these samples that are not held, on the CPU, and what stands in front.

        Recorded tokens of other samples are forgotten.
        """
        if not self.supported:
            return pack(self._samples, select, packed=False), None
        counts = self._counts[select]
        rows = pack(self._samples, select, packed=False, start=counts)
        owner, within = ragged(counts)
        tokens = self._samples.offsets[select][owner] + within
        ordered, order = self._tokens.sort()
        known = order[torch.searchsorted(ordered, tokens)]
        self._tokens = tokens
        n, width = len(counts), int(counts.max())
        total = width + rows.index.shape[1]
        places = owner * total + width - counts[owner] + within  # next to the rows: pads come first
        ours = (self._samples.lengths[select] - 1 - counts)[:, None]
        masks = torch.arange(-width, 0) >= -counts[:, None], torch.arange(rows.index.shape[1]) < ours
        known, places, mask = (x.to(self._topology.device) for x in (known, places, torch.cat(masks, 1)))
        held = {}
        for block, kept in self._kept.items():
            key, value = self._kept[block] = kept[0].index_select(0, known), kept[1].index_select(0, known)
            held[block] = _laid_out(key, places, n, total), _laid_out(value, places, n, total)
        return rows, Past(held, mask, width)


def _laid_out(kept: Tensor, places: Tensor, n: int, width: int) -> Tensor:
    """Keys or values [K, heads, d] at flat places of n rows: [n, heads, width, d], zeros elsewhere."""
    flat = kept.new_zeros(n * width, *kept.shape[1:]).index_copy(0, places, kept)
    return flat.view(n, width, *kept.shape[1:]).transpose(1, 2).contiguous()
