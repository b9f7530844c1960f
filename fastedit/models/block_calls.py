"""Calls of the blocks, recorded once and repeated without the backbone around them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn

from fastedit.models.forward import pruned, resume
from fastedit.models.hooks import Override, eval_mode, forwards, hooked
from fastedit.models.past import Past
from fastedit.models.tokens import Rows
from fastedit.models.topology import Topology


class BlockCalls:
    """A record of how the backbone calls its blocks from ``layer`` on for some rows, to repeat these calls.

    ``resume`` does what `forward.resume` does. The first call goes through the backbone and keeps the arguments of
    each block (masks, rotary embeddings) and the modules after the last one; later calls run these directly. That
    saves the backbone's own work, and on a GPU a synchronization, because recent transformers read the positions. If
    the blocks of a model cannot be called directly, every call goes through the backbone.
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
            hidden = self._topology.for_head(hidden)
        return hidden.reshape(-1, hidden.shape[-1]).index_select(0, self._rows.target_rows)

    def _record(self, hidden: Tensor) -> Tensor:
        topology, rows = self._topology, self._rows
        called: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = []

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            others = {name: value for name, value in kwargs.items() if name != "hidden_states"}
            called.append((module, args[1:], others))

        running = list(topology.blocks[self._layer :])
        tail = [child for child in topology.backbone.children() if child is not topology.blocks]
        handles = (m.register_forward_pre_hook(note, with_kwargs=True) for m in (*running, *tail))
        with hooked(handles), self._attention():
            states = resume(topology, hidden, rows, self._layer, self._overrides, self._past)
        if not topology.replays_blocks:
            return states
        first = next(i for i, (module, _, _) in enumerate(called) if module is running[0])
        self._calls = called[first:]
        self._again = [*self._overrides, *pruned(topology, rows)]
        return states

    def _attention(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._past is None else self._past.attention()
