"""Run rows of samples through a part of the model.

Every pass goes through the model's own backbone: blocks that need not run become identities, and the state that they
would have made is the input of the first block that runs. Masks, rotary embeddings, attention types of single layers
and soft-caps therefore stay the model's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastedit.models.hooks import Override, Stopped, eval_mode, forwards, hooked
from fastedit.models.tokens import Rows
from fastedit.models.topology import Topology

# Attention that reads restarting positions in every row of a batch; varlen attention needs a single row.
_BATCHED_ATTENTION = frozenset({"eager", "sdpa", "flex_attention"})
# Where masks are given ready-made: transformers looks for sequences in the positions and waits for the GPU to tell.
_READY_MASKS = frozenset({"cuda"})
# Tokens per forward pass. A CPU gets new pages for every buffer over 32 MiB, but products of few rows are slow.
_PASS_TOKENS = {"cpu": 2048, "cuda": 8192}


def _input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


def _identity(*args: Any, **kwargs: Any) -> Tensor:
    return _input_of(args, kwargs)


def _identity_tuple(*args: Any, **kwargs: Any) -> tuple[Tensor]:
    return (_input_of(args, kwargs),)


def at_rows(module: nn.Module, rows: Tensor) -> Callable[[Tensor], Tensor]:
    """``module.forward`` at the given rows [A] of its flattened input; zeros at the other rows."""
    forward = module.forward

    def run(x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        y: Tensor = forward(flat.index_select(0, rows))
        return y.new_zeros((len(flat), y.shape[-1])).index_copy(0, rows, y).view(*x.shape[:-1], -1)

    return run


def pruned(topology: Topology, rows: Rows) -> list[Override]:
    """Overrides that run the row-independent parts of the last block at the target rows only."""
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
    """Run blocks ``layer`` … and the final norm on ``hidden`` [B, R, h], or stop at the input of block ``stop``.

    After the final norm the states are what the head reads (``Topology.for_head``).

    Without ``hidden`` the embedding's output enters block 0. ``prune``: row-independent parts of the last
    block run at the target rows only. ``overrides`` replace ``forward`` of modules. ``past``: a cache of
    keys and values of earlier tokens, with a ``mask`` for these and the rows. Returns [B, R, h].
    """
    blocks = topology.blocks
    shape = rows.input_ids.shape
    single_row = topology.packs and topology.config._attn_implementation not in _BATCHED_ATTENTION
    input_ids: Tensor = rows.input_ids
    # without packing the model's own positions are right; masks made from given positions wait for the GPU
    position_ids = rows.position_ids if rows.packed or past is not None else None
    if single_row and rows.packed and position_ids is not None:
        input_ids, position_ids = input_ids.view(1, -1), position_ids.view(1, -1)
        hidden = None if hidden is None else hidden.reshape(1, -1, hidden.shape[-1])

    mask: Tensor | None = None if past is None else past.mask
    if past is None and position_ids is not None and _takes_mask(topology, position_ids):
        mask = _within_samples(position_ids)

    overrides = list(overrides)  # the last one for a module counts
    if layer:
        identity = _identity_tuple if topology.blocks_return_tuples else _identity
        overrides += [(block, identity) for block in blocks[:layer]]
    if prune:
        overrides += pruned(topology, rows)

    def substitute(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return ((hidden, *args[1:]), kwargs) if args else ((), kwargs | {"hidden_states": hidden})

    def leave(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise Stopped(_input_of(args, kwargs))

    def handles() -> Iterator[RemovableHandle]:
        if hidden is not None:
            yield blocks[layer].register_forward_pre_hook(substitute, with_kwargs=True)
        if stop is not None:
            yield blocks[stop].register_forward_pre_hook(leave, with_kwargs=True)

    try:
        with hooked(handles()), forwards(overrides), eval_mode(topology.backbone):
            output = topology.backbone(
                input_ids=input_ids,
                attention_mask=mask,
                position_ids=position_ids,
                past_key_values=past,
                use_cache=False,
            )
        states: Tensor = topology.for_head(output[0])
    except Stopped as stopped:
        states = stopped.seen
    return states.reshape(*shape, -1)


def _takes_mask(topology: Topology, position_ids: Tensor) -> bool:
    """Whether all blocks can take one mask [B, 1, R, R]: they attend to everything before, or windows hold a row."""
    config, width = topology.config, position_ids.shape[1]
    kinds = {"full_attention", *(getattr(config, "layer_types", None) or ())}
    window = getattr(config, "sliding_window", None)
    return (
        position_ids.device.type in _READY_MASKS
        and config._attn_implementation == "sdpa"
        and kinds <= {"full_attention", "sliding_attention"}
        and (window is None or width <= window)
    )


def _within_samples(position_ids: Tensor) -> Tensor:
    """The mask [B, 1, R, R] of packed rows: a token attends to those before it since the positions last restarted."""
    sample = (position_ids.diff(prepend=position_ids[:, :1] - 1) != 1).cumsum(1)  # [B, R], counted within its row
    return (sample[:, None, :, None] == sample[:, None, None, :]).tril()


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
        overrides: replacements for the ``forward`` of modules.
        past: keys and values of tokens before the rows (``HeldTokens.remaining``).

    Returns:
        What the head reads [M, h] at ``rows.target_rows``: the hidden states after the final norm, in some families
        times a factor; the input of ``topology.logits``.
        Differentiable in ``hidden`` and in the weights of blocks ``layer`` … n-1. In the last block, parts
        that treat rows independently run at those rows only, because the others are not read.

    Raises:
        ModelError: the model has no such block.
    """
    topology.block(layer)
    states = run_blocks(topology, rows, layer, hidden, prune=True, overrides=overrides, past=past)
    return states.view(-1, states.shape[-1]).index_select(0, rows.target_rows)


def run_from_tokens(topology: Topology, rows: Rows, *, prune: bool = True) -> Tensor:
    """``resume`` without a cache: from the token embedding to the final norm. Returns [M, h].

    Without ``prune`` the last block runs at all tokens like the others.
    """
    states = run_blocks(topology, rows, 0, None, prune=prune)
    return states.view(-1, states.shape[-1]).index_select(0, rows.target_rows)


@torch.no_grad()
def observe(
    topology: Topology, hidden: Tensor, rows: Rows, layer: int, module: nn.Module, *, output: bool = False
) -> Tensor:
    """The input or the output of ``module`` at the target rows; nothing after the module runs.

    Args:
        hidden: [B, R, h], the input of block ``layer`` (``PrefixCache.hidden``).
        module: a module of block ``layer`` or of a later block, or such a block itself.

    Returns:
        [M, width] at ``rows.target_rows``, in the model's dtype.
    """

    def leave(_: nn.Module, args: tuple[Any, ...], result: Any = None) -> None:
        seen = result if output else args
        raise Stopped(seen[0] if isinstance(seen, tuple) else seen)

    with hooked([(module.register_forward_hook if output else module.register_forward_pre_hook)(leave)]):
        states = run_blocks(topology, rows, layer, hidden)
    return states.view(-1, states.shape[-1]).index_select(0, rows.target_rows)


def at_tokens(topology: Topology, rows: Rows, layer: int) -> list[Override]:
    """Overrides that run the linear maps of blocks ``layer`` … n-1 only at tokens, not at pads."""
    tokens = rows.token_rows.to(rows.index.device)
    linear = (m for i in range(layer, topology.n_blocks) for m in topology.rowwise(i) + topology.attended(i))
    return [(module, at_rows(module, tokens)) for module in linear]


def in_passes(lengths: Tensor, batch_tokens: int) -> Iterator[range]:
    """Ranges of consecutive samples with at most ``batch_tokens`` tokens, but at least one sample each."""
    first, total = 0, 0
    for i, n in enumerate(lengths.tolist()):
        if total and total + n > batch_tokens:
            yield range(first, i)
            first, total = i, 0
        total += n
    if total:
        yield range(first, len(lengths))


def row_multiple(device: torch.device) -> int:
    """The number that suits ``device`` to divide the length of packed rows: a GPU loads masks by 16 bytes."""
    return 8 if device.type == "cuda" else 1


def pass_tokens(device: torch.device) -> int:
    """The number of tokens per forward pass that suits ``device``."""
    return _PASS_TOKENS.get(device.type, 4096)
