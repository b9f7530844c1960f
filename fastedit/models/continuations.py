"""Greedy continuations of prompts of any lengths, in one batch that a prompt leaves as soon as its text has ended."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import DynamicCache

from fastedit.models.hooks import eval_mode
from fastedit.models.per_sample import Factors, per_sample_updates
from fastedit.models.topology import Topology


@dataclass(frozen=True)
class _Batch:
    """Prompts that are being continued, padded on the left.

    ``which`` [B] on the CPU are places in the list of prompts; ``tokens`` [B, L] are the prompts and continuations so
    far, and ``mask`` [B, L] is false at pads. ``cache`` holds the keys and values of the tokens that the model has read
    (None: it reads all tokens each time).
    """

    which: Tensor
    tokens: Tensor
    mask: Tensor
    cache: DynamicCache | None

    def rows(self, going: Tensor) -> _Batch:
        """The rows `going` [K], without columns that hold only pads."""
        rows = going.to(self.tokens.device)
        mask = self.mask[rows]
        first = int(mask.any(0).int().argmax())
        cache = self.cache and _cache([(k[rows, :, first:], v[rows, :, first:]) for k, v in _layers(self.cache)])
        return _Batch(self.which[going], self.tokens[rows, first:], mask[:, first:], cache)

    def joined(self, other: _Batch) -> _Batch:
        """The rows of both batches."""
        assert self.cache is not None
        assert other.cache is not None
        width = max(self.tokens.shape[1], other.tokens.shape[1])
        more = width - self.tokens.shape[1], width - other.tokens.shape[1]

        def both(one: Tensor, another: Tensor, columns_last: bool = True) -> Tensor:
            trailing = () if columns_last else (0, 0)
            return torch.cat([pad(x, (*trailing, n, 0)) for x, n in zip((one, another), more, strict=True)])

        layers = zip(_layers(self.cache), _layers(other.cache), strict=True)
        cache = _cache([(both(k, k2, False), both(v, v2, False)) for (k, v), (k2, v2) in layers])
        tokens, mask = both(self.tokens, other.tokens), both(self.mask, other.mask)
        return _Batch(torch.cat([self.which, other.which]), tokens, mask, cache)

    def read(self, topology: Topology) -> Tensor:
        """Read the unread tokens; returns the final hidden state [B, h] at the last token of each row."""
        start = self.cache.get_seq_length() if self.cache is not None else 0
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)
        with eval_mode(topology.backbone):
            states: Tensor = topology.backbone(
                input_ids=self.tokens[:, start:],
                attention_mask=None if self.cache is None else self.mask.long(),
                position_ids=positions[:, start:],
                past_key_values=self.cache,
                use_cache=self.cache is not None,
            )[0]
        return topology.for_head(states[:, -1])

    def followed_by(self, tokens: Tensor) -> _Batch:
        """The rows with one more, unread token [B] each."""
        tokens = torch.cat([self.tokens, tokens[:, None]], 1)
        return replace(self, tokens=tokens, mask=pad(self.mask, (0, 1), value=True))


def _batch(prompts: Sequence[Sequence[int]], which: Sequence[int], device: torch.device, cached: bool) -> _Batch:
    width = max(len(prompts[i]) for i in which)
    rows = [[0] * (width - len(prompts[i])) + list(prompts[i]) for i in which]
    lengths = torch.tensor([len(prompts[i]) for i in which], device=device)
    mask = torch.arange(width, 0, -1, device=device) <= lengths[:, None]
    return _Batch(torch.tensor(which), torch.tensor(rows, device=device), mask, DynamicCache() if cached else None)


def _layers(cache: DynamicCache) -> list[tuple[Tensor, Tensor]]:
    return [(layer.keys, layer.values) for layer in cache.layers]


def _cache(layers: Sequence[tuple[Tensor, Tensor]]) -> DynamicCache:
    """A cache of all keys and values; in layers with a window, the mask hides what the layer may not see."""
    cache = DynamicCache()
    for i, (keys, values) in enumerate(layers):
        cache.update(keys, values, i)
    return cache


def reads_caches(topology: Topology) -> bool:
    """Whether the model reads caches and ignores left pads, so that prompts of all lengths can share a batch.

    Measured on three tokens: their last state after two pads and from a cache must be that of a plain pass.
    """
    prompt = [topology.config.vocab_size // n for n in (4, 2, 3)]
    plain = _batch([prompt], [0], topology.device, False).read(topology).float()
    try:
        state = _read_after_pads(topology, prompt)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # blocks that need their own kind of cache, such as recurrent ones, may raise anything
        return False
    if state is None:
        return False
    return bool((state - plain[0]).norm() < 0.05 * plain.norm())  # half precision rounds by a hundredth


def _read_after_pads(topology: Topology, prompt: list[int]) -> Tensor | None:
    """The state of a prompt's last token, read after two pads and from a cache; None if a block does not use one."""
    begun = _batch([prompt[:1] * 4, prompt[:2]], [0, 1], topology.device, True)  # the second has two pads in front
    begun.read(topology)
    assert begun.cache is not None
    if len(begun.cache.layers) != topology.n_blocks or any(x.get_seq_length() != 4 for x in begun.cache.layers):
        return None  # the attention of some block does not use the cache
    last = torch.tensor(prompt[2:] * 2, device=topology.device)
    return begun.followed_by(last).read(topology)[1].float()


class Continuations:
    """Greedy continuations of prompts.

    Prompts of all lengths share a batch, and new ones take the places of those that have ended. For a model that does
    not read caches, only prompts of equal lengths share a batch, and every new token runs all tokens again.

    Args:
        limits: the most tokens to add to each prompt, at least 1.
        ended: called with places of prompts [B] (on the CPU) and the next token [B] of each; returns bools [B].
        capacity: tokens of prompts and continuations that are in the batch at once.
        updates, edits: prompt i runs with the update ``edits[i]``, if there are any.
    """

    def __init__(
        self,
        topology: Topology,
        prompts: Sequence[Sequence[int]],
        limits: Sequence[int],
        ended: Callable[[Tensor, Tensor], Tensor],
        *,
        capacity: int,
        updates: Mapping[nn.Module, Factors],
        edits: Tensor,
    ) -> None:
        self._topology, self._prompts, self._ended, self._capacity = topology, prompts, ended, capacity
        self._updates, self._edits = updates, edits
        self._limits = torch.tensor(limits)
        self._texts: list[list[int]] = [[] for _ in prompts]

    @torch.no_grad()
    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        """Yield, as texts end, the place of a prompt and the tokens that follow it, including the one that ends it."""
        lengths = [len(prompt) for prompt in self._prompts]
        waiting = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        if reads_caches(self._topology):
            yield from self._run(waiting, True)
        else:
            for _, group in groupby(waiting, lambda i: lengths[i]):
                yield from self._run(list(group), False)

    def _run(self, waiting: list[int], cached: bool) -> Iterator[tuple[int, list[int]]]:
        """The continuations of prompts, which are in order of length, the longest first."""
        longest = int(self._limits.max())
        batch: _Batch | None = None
        while waiting or batch:
            rows, width = (len(batch.which), batch.tokens.shape[1]) if batch else (0, 0)
            room = max(1, self._capacity // (max(width, len(self._prompts[waiting[0]])) + longest)) if waiting else 0
            if waiting and (batch is None or (cached and 2 * rows <= room)):
                chunk, waiting = waiting[: room - rows], waiting[room - rows :]
                fresh = _batch(self._prompts, chunk, self._topology.device, cached)
                done, going = self._step(fresh)
                yield from done
                batch = going if batch is None else batch.joined(going) if going else batch
            if batch:
                done, batch = self._step(batch)
                yield from done

    def _step(self, batch: _Batch) -> tuple[list[tuple[int, list[int]]], _Batch | None]:
        """Add a token to each row; returns the texts that end with it, and the batch of the others."""
        which = batch.which
        with per_sample_updates(self._updates, self._edits[which]):
            states = batch.read(self._topology)
        tokens = self._topology.logits(states).float().argmax(-1)
        for i, token in zip(which.tolist(), tokens.tolist(), strict=True):
            self._texts[i].append(token)
        counts = torch.tensor([len(self._texts[i]) for i in which.tolist()])
        over = self._ended(which, tokens).cpu() | (counts >= self._limits[which])
        done = [(i, self._texts[i]) for i in which[over].tolist()]
        if over.all():
            return done, None
        batch = batch.followed_by(tokens)
        return done, batch.rows((~over).nonzero().flatten()) if over.any() else batch
