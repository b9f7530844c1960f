"""Tokens that a loop cannot change: their keys and values are recorded once, for the tokens after them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from fastedit.models.forward import at_tokens, in_passes, pass_tokens, resume
from fastedit.models.past import Past
from fastedit.models.prefix_cache import PrefixCache
from fastedit.models.token_states import Budget
from fastedit.models.tokens import Rows, Samples, pack, ragged
from fastedit.models.topology import Topology


class _Recorder(DynamicCache):  # type: ignore[misc]  # transformers is not typed
    """Recorder of keys and values [K, heads, width] of the tokens at some flat places; as a cache it is empty."""

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
    """Tokens whose states in the blocks after a prefix cache do not change; others only read their keys and values.

    These are the tokens before the first one that a loop changes, since attention is causal. ``record`` runs them and
    keeps the keys and values of each block; ``remaining`` gives the tokens that are left to run.

    Args:
        counts: [N] int64, how many tokens at the beginning of each sample are held.
    """

    def __init__(self, topology: Topology, cache: PrefixCache, samples: Samples, counts: Tensor) -> None:
        self._topology, self._cache, self._samples, self._counts = topology, cache, samples, counts
        self._hold(torch.empty(0, dtype=torch.int64))
        self._recorded: dict[int, tuple[Tensor, Tensor]] = {}  # what each block's attention reads of these tokens
        self.fits = True
        """False once the tokens did not fit into a budget."""
        self.supported = topology.replays_blocks
        """False if blocks cannot be replayed, once a block's attention did not use the cache, or once the tokens did
        not fit into a budget: ``remaining`` then gives all tokens."""

    @property
    def nbytes(self) -> int:
        """Bytes of the recorded keys and values; ``remaining`` needs about as much again."""
        return sum(recorded.nbytes for pair in self._recorded.values() for recorded in pair)

    @torch.no_grad()
    def record(self, select: Tensor, budget: Budget | None = None) -> None:
        """Run the held tokens of these samples and record their keys and values.

        If these do not fit into a budget, nothing is held: ``supported`` becomes false.
        """
        if not self.supported:
            return
        select = select[self._counts[select] > 0]
        seen, left = [], int(self._counts[select].sum())
        for some in in_passes(self._counts[select], pass_tokens(self._topology.device)):
            seen.append(self._seen(select[some.start : some.stop]))
            if budget is not None and some.start == 0:
                tokens, recorded = seen[0]
                size = sum(x.nbytes for pair in recorded.values() for x in pair) * left // len(tokens)
                self.fits = size <= budget.allows(self._topology.device)
                self.supported = self.supported and self.fits
            if not self.supported:
                return
        for block in [*seen[0][1]] if seen else []:
            new = [recorded.pop(block) for _, recorded in seen]  # joined, these need not stay
            old = [self._recorded[block]] if block in self._recorded else []
            keys, values = (torch.cat(parts) for parts in zip(*old, *new, strict=True))
            self._recorded[block] = keys, values
        self._hold(torch.cat([self._tokens, *(tokens for tokens, _ in seen)]))

    def _hold(self, tokens: Tensor) -> None:
        """Note the places [K] in the flat buffers of the recorded tokens."""
        self._tokens = tokens
        self._ordered, self._order = tokens.sort()

    def keep(self, select: Tensor) -> None:
        """Drop what is recorded of other samples."""
        if not self.supported:
            return
        _, _, tokens = self._places(select)
        known = self._known(tokens)
        for block, (keys, values) in self._recorded.items():
            self._recorded[block] = keys.index_select(0, known), values.index_select(0, known)
        self._hold(tokens)

    def _places(self, select: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The held tokens of these samples: place in `select`, place in the sample, place in the flat buffers; [K]."""
        owner, within = ragged(self._counts[select])
        return owner, within, self._samples.offsets[select][owner] + within

    def _known(self, tokens: Tensor) -> Tensor:
        """Where tokens [K] are among those recorded."""
        return self._order[torch.searchsorted(self._ordered, tokens)].to(self._topology.device)

    def _seen(self, select: Tensor) -> tuple[Tensor, dict[int, tuple[Tensor, Tensor]]]:
        """The held tokens [K] of these samples, and the keys and values of each block."""
        topology, layer = self._topology, self._cache.layer
        rows = pack(self._samples, select, packed=False, stop=self._counts[select]).to(topology.device)
        recorder = _Recorder(rows.token_rows.to(topology.device))
        resume(topology, self._cache.hidden(rows), rows, layer, at_tokens(topology, rows, layer), recorder)
        self.supported = self.supported and recorder.seen.keys() == set(range(layer, topology.n_blocks))
        return rows.host_index.view(-1)[rows.token_rows], recorder.seen

    def remaining(self, select: Tensor) -> tuple[Rows, Past | None]:
        """The rows of these samples' tokens that are not held, on the CPU, and the keys and values before them."""
        if not self.supported:
            return pack(self._samples, select, packed=False), None
        counts = self._counts[select]
        rows = pack(self._samples, select, packed=False, start=counts)
        owner, within, tokens = self._places(select)
        n, width = len(counts), int(counts.max())
        total = width + rows.index.shape[1]
        places = owner * total + width - counts[owner] + within  # directly before the rows; pads come first
        ours = (self._samples.lengths[select] - 1 - counts)[:, None]
        masks = torch.arange(-width, 0) >= -counts[:, None], torch.arange(rows.index.shape[1]) < ours
        known, mask = self._known(tokens), torch.cat(masks, 1).to(self._topology.device)
        places = places.to(self._topology.device)

        def lay_out(recorded: Tensor) -> Tensor:
            return _laid_out(recorded.index_select(0, known), places, n, total)

        held = {block: (lay_out(keys), lay_out(values)) for block, (keys, values) in self._recorded.items()}
        return rows, Past(held, mask, width)


def _laid_out(recorded: Tensor, places: Tensor, n: int, width: int) -> Tensor:
    """Put keys or values [K, heads, d] at flat places of n rows: [n, heads, width, d], zeros elsewhere."""
    flat = recorded.new_zeros(n * width, *recorded.shape[1:]).index_copy(0, places, recorded)
    return flat.view(n, width, *recorded.shape[1:]).transpose(1, 2).contiguous()
