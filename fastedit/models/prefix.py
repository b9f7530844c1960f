"""The prefix cache: run the blocks below an edited one once, keep their output, resume from there.

Everything runs through the model's own backbone with rows of samples: the blocks that need not run become
identities and the state they would have made is put in front of the first block that runs. Masks, rotary
embeddings, attention types of single layers and soft-caps therefore stay the model's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from fastedit.errors import ModelError
from fastedit.models.token_states import Budget, TokenStates
from fastedit.models.tokens import Rows, Samples, pack
from fastedit.models.topology import Stopped, Topology, eval_mode

# Attention that reads restarting positions in every row of a batch; varlen attention needs a single row.
_BATCHED_ATTENTION = frozenset({"eager", "sdpa", "flex_attention"})
# Tokens of a forward pass. On a CPU buffers of over 32 MiB are fresh pages every time; products of few rows are slow.
_PASS_TOKENS = {"cpu": 2048, "cuda": 8192}


Override = tuple[nn.Module, Callable[..., Any]]
"""A module and what stands in for its ``forward`` during a pass."""


@contextmanager
def forwards(overrides: Iterable[Override]) -> Iterator[None]:
    """Replace ``forward`` on module instances; what stood on the instance before stands there afterwards."""
    undo: list[tuple[dict[str, Any], Any]] = []
    try:
        for module, forward in overrides:
            undo.append((module.__dict__, module.__dict__.get("forward")))
            module.__dict__["forward"] = forward
        yield
    finally:
        for attributes, before in reversed(undo):
            if before is None:
                attributes.pop("forward", None)
            else:
                attributes["forward"] = before


def _input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


def _identity(*args: Any, **kwargs: Any) -> Tensor:
    return _input_of(args, kwargs)


def _identity_tuple(*args: Any, **kwargs: Any) -> tuple[Tensor]:
    return (_input_of(args, kwargs),)


def at_rows(module: nn.Module, rows: Tensor) -> Callable[[Tensor], Tensor]:
    """``module.forward`` at the given rows [A] of its flattened input; zeros at others."""
    forward = module.forward

    def run(x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        y: Tensor = forward(flat.index_select(0, rows))
        return y.new_zeros((len(flat), y.shape[-1])).index_copy(0, rows, y).view(*x.shape[:-1], -1)

    return run


def pruned(topology: Topology, rows: Rows) -> list[Override]:
    """The row-independent parts of the last block, at the target rows only."""
    last = topology.rowwise(topology.n_blocks - 1)
    return [(module, at_rows(module, rows.target_rows)) for module in last]


def run_blocks(
    topology: Topology,
    rows: Rows,
    layer: int,
    hidden: Tensor | None,
    *,
    stop: int | None = None,
    prune: bool = False,
    overrides: Sequence[Override] = (),
    past: Any = None,
) -> Tensor:
    """Run blocks ``layer`` … and the final norm on ``hidden`` [B, R, h], or end with block ``stop``'s input.

    Without ``hidden`` the embedding's output enters block 0. ``prune``: row-independent parts of the last
    block run at the target rows only. ``overrides`` replace ``forward`` of modules. ``past``: a cache of
    keys and values in front of the rows, with the ``mask`` of both. Returns [B, R, h].
    """
    blocks = topology.blocks
    shape = rows.input_ids.shape
    single_row = topology.packs and topology.config._attn_implementation not in _BATCHED_ATTENTION
    input_ids: Tensor = rows.input_ids
    # a sample alone in its row stands where the model itself counts; masks made from positions wait for the GPU
    position_ids = rows.position_ids if rows.packed or past is not None else None
    if single_row and rows.packed and position_ids is not None:
        input_ids, position_ids = input_ids.view(1, -1), position_ids.view(1, -1)
        hidden = None if hidden is None else hidden.reshape(1, -1, hidden.shape[-1])

    overrides = list(overrides)  # of several for one module the last counts
    if layer:
        identity = _identity_tuple if topology.blocks_return_tuples else _identity
        overrides += [(block, identity) for block in blocks[:layer]]
    if prune:
        overrides += pruned(topology, rows)

    def substitute(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return ((hidden, *args[1:]), kwargs) if args else ((), kwargs | {"hidden_states": hidden})

    def leave(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise Stopped(_input_of(args, kwargs))

    handles = []
    try:
        if hidden is not None:
            handles.append(blocks[layer].register_forward_pre_hook(substitute, with_kwargs=True))
        if stop is not None:
            handles.append(blocks[stop].register_forward_pre_hook(leave, with_kwargs=True))
        with forwards(overrides), eval_mode(topology.backbone):
            output = topology.backbone(
                input_ids=input_ids,
                attention_mask=None if past is None else past.mask,
                position_ids=position_ids,
                past_key_values=past,
                use_cache=False,
            )
        states: Tensor = output[0]
    except Stopped as stopped:
        states = stopped.seen
    finally:
        for handle in handles:
            handle.remove()
    return states.reshape(*shape, -1)


def resume(
    topology: Topology,
    hidden: Tensor,
    rows: Rows,
    layer: int,
    overrides: Sequence[Override] = (),
    past: Any = None,
) -> Tensor:
    """Run blocks ``layer`` … n-1 and the final norm, and take the rows that predict target tokens.

    Args:
        hidden: [B, R, h], the input of block ``layer`` (``PrefixCache.hidden``), in the model's dtype.
        rows: on the model's device.
        layer: the first block to run.
        overrides: modules whose ``forward`` something else stands in for.
        past: keys and values of tokens in front of the rows (``HeldTokens.rest``).

    Returns:
        Hidden states [M, h] at ``rows.target_rows``, after the final norm; ``topology.logits`` takes them on.
        Differentiable in ``hidden`` and in the weights of blocks ``layer`` … n-1. In the last block, parts
        that treat rows independently run at those rows only: nobody reads the others.

    Raises:
        ModelError: the model has no such block.
    """
    topology.block(layer)
    states = run_blocks(topology, rows, layer, hidden, prune=True, overrides=overrides, past=past)
    return states.view(-1, states.shape[-1]).index_select(0, rows.target_rows)


def full(topology: Topology, rows: Rows, *, prune: bool = True) -> Tensor:
    """``resume`` without a cache: from the token embedding to the final norm. Returns [M, h].

    Without ``prune`` the last block runs at all tokens like the others.
    """
    states = run_blocks(topology, rows, 0, None, prune=prune)
    return states.view(-1, states.shape[-1]).index_select(0, rows.target_rows)


class PrefixCache:
    """The input of block ``layer`` for every token of all samples, in one flat buffer [T, h].

    The state has the dtype that the model itself has there. Use it as a context manager.

    Args:
        topology: of the model.
        samples: all samples; rows given to ``hidden`` index into them.
        layer: blocks below it run once, now.
        budget: decides the tier.
        batch_tokens: tokens of a forward pass; None is what suits the device.
        packed: several samples a row. Otherwise no sample can spoil another with values that are not finite.
        progress: called with the number of samples just done.

    Raises:
        ModelError: no such block, or the file does not fit on its disk.
    """

    def __init__(
        self,
        topology: Topology,
        samples: Samples,
        layer: int,
        *,
        budget: Budget | None = None,
        batch_tokens: int | None = None,
        packed: bool = True,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        topology.block(layer)
        self._topology = topology
        self.samples = samples
        self._budget = budget or Budget()
        self._batch_tokens = batch_tokens or pass_tokens(topology.device)
        self._packed = packed and topology.packs
        self._kept: TokenStates | None = None
        self.layer = layer
        try:
            self._run(None, layer, progress)
        except BaseException:
            self.close()
            raise

    @property
    def _states(self) -> TokenStates:
        if self._kept is None:
            raise ModelError("the prefix cache is closed; make a new one")
        return self._kept

    @property
    def tier(self) -> str:
        """Where the state is, as `TokenStates` says."""
        return self._states.tier

    @property
    def nbytes(self) -> int:
        """Bytes of the cached state."""
        return self._states.nbytes

    @property
    def budget(self) -> Budget:
        """What is left of the budget."""
        return self._states.left(self._budget)

    def hidden(self, rows: Rows) -> Tensor:
        """The cached state of the rows' tokens [B, R, h] on the model's device; pads hold some token's."""
        return self._states.read(rows)

    def advance(
        self,
        layer: int,
        progress: Callable[[int], None] | None = None,
        around: Callable[[Tensor], AbstractContextManager[None]] | None = None,
    ) -> None:
        """Run blocks ``self.layer`` … ``layer - 1`` on the cached state, in place.

        A cache whose advance fails is closed: a part of its state would belong to another block.

        Args:
            around: gives, for the samples [B] of each pass, the context in which it runs.

        Raises:
            ModelError: no such block, or one below the cached one.
        """
        self._topology.block(layer)
        if layer < self.layer:
            raise ModelError(f"a prefix cache at block {self.layer} cannot go back to {layer}; make a new one")
        if layer == self.layer:
            return
        try:
            self._run(self.layer, layer, progress, around)
        except BaseException:
            self.close()
            raise
        self.layer = layer

    def close(self) -> None:
        """Free the state, and with it the file of a memory-mapped one."""
        self._kept = None

    def __enter__(self) -> PrefixCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @torch.no_grad()
    def _run(
        self,
        start: int | None,
        stop: int,
        progress: Callable[[int], None] | None,
        around: Callable[[Tensor], AbstractContextManager[None]] | None = None,
    ) -> None:
        """Fill the buffer with the input of block ``stop``, from block ``start``'s or from the tokens."""
        topology = self._topology
        for select in in_passes(self.samples.lengths, self._batch_tokens):
            rows = pack(self.samples, select, packed=self._packed).to(topology.device)
            hidden = None if start is None else self.hidden(rows)
            with around(torch.tensor(select)) if around else nullcontext():
                states = run_blocks(topology, rows, start or 0, hidden, stop=stop)
            if self._kept is None:
                size = (self.samples.input_ids.numel(), states.shape[-1])
                self._kept = TokenStates.allocate(size, states.dtype, states.device, self._budget)
            self._states.write(rows, states)
            if progress is not None:
                progress(len(select))


def in_passes(lengths: Tensor, batch_tokens: int) -> Iterator[range]:
    """Ranges of consecutive samples of at most ``batch_tokens`` tokens, one sample at least."""
    first, total = 0, 0
    for i, n in enumerate(lengths.tolist()):
        if total and total + n > batch_tokens:
            yield range(first, i)
            first, total = i, 0
        total += n
    if total:
        yield range(first, len(lengths))


def pass_tokens(device: torch.device) -> int:
    """Tokens of a forward pass that suit ``device``."""
    return _PASS_TOKENS.get(device.type, 4096)
