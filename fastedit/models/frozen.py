"""Cache the frozen part of the edited block: it is the same in every epoch, so it runs once, before training."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastedit.errors import ModelError
from fastedit.models.forward import in_passes, pass_tokens, row_multiple, run_blocks
from fastedit.models.hooks import Override, hooked
from fastedit.models.prefix_cache import PrefixCache
from fastedit.models.token_states import Budget, TokenStates
from fastedit.models.tokens import Rows, pack
from fastedit.models.topology import Topology

_ENOUGH = 2**60  # bytes


class FrozenPart:
    """Cache of what a block's frozen modules compute for each token of all samples; in a pass it replaces them.

    If ``trained`` is the MLP or a part of it, the attention is cached; if it is the MLP's last projection, the rest of
    the MLP as well. Nothing is cached for the last block, whose passes leave out rows, nor what does not fit into the
    memory of the model's device, because fetching it would take as long as computing it.

    Like the prefix cache it runs in the order of the samples, so that its bits do not depend on the order of training.

    Args:
        cache: gives the block, the samples, and the remaining budget.
        trained: the one module whose weights change.
        parts: what to cache, out of "attn" and "mlp", whether it fits into the budget or not; None is all that fits.

    Attributes:
        budget: what remains of it.
    """

    def __init__(
        self, topology: Topology, cache: PrefixCache, trained: nn.Module, parts: Collection[str] | None = None
    ) -> None:
        modules: dict[str, nn.Module] = {}
        for name in ("attn", "mlp", "up_proj", "down_proj"):
            with suppress(ModelError):
                modules[name] = topology.resolve(cache.layer, name)[1]
        attn, mlp = modules.pop("attn", None), modules.get("mlp")
        known = topology.runs_in_parts and cache.layer < topology.n_blocks - 1
        known = known and any(trained is m for part in modules.values() for m in part.modules())
        self._attn = attn if known and (parts is None or "attn" in parts) else None
        known = known and (parts is None or "mlp" in parts)
        self._mlp = mlp if known and trained is modules["down_proj"] else None
        self._trained, self._samples = trained, cache.samples
        self.budget = cache.budget if parts is None else Budget(_ENOUGH, _ENOUGH, tally=cache.budget.tally)
        self._states: dict[nn.Module, TokenStates] = {}  # outputs of the attention, inputs of the trained projection
        self._returned = 0  # length of the tuple that the attention returns, 0 if it returns none
        self._run(topology, cache)

    @torch.no_grad()
    def _run(self, topology: Topology, cache: PrefixCache) -> None:
        for select in in_passes(self._samples.lengths, pass_tokens(topology.device)):
            if self._attn is None and self._mlp is None:
                return
            rows = pack(self._samples, select, packed=topology.packs, multiple=row_multiple(topology.device))
            rows = rows.to(topology.device)
            with hooked(self._recorders(rows)):
                run_blocks(topology, rows, cache.layer, cache.hidden(rows), stop=cache.layer + 1)

    @property
    def parts(self) -> list[str]:
        """Names of the cached parts, out of "attn" and "mlp"."""
        return [name for name, part in (("attn", self._attn), ("mlp", self._mlp)) if part is not None]

    def overrides(self, rows: Rows) -> list[Override]:
        """Overrides that replace the frozen modules in a pass over these rows."""

        def stored(module: nn.Module, like: Tensor) -> Tensor:
            return self._states[module].read(rows).view(*like.shape[:-1], -1)

        overrides: list[Override] = []
        if (attn := self._attn) is not None:

            def attend(*args: Any, **kwargs: Any) -> Any:
                states = stored(attn, args[0] if args else kwargs["hidden_states"])
                return (states, *[None] * (self._returned - 1)) if self._returned else states

            overrides.append((attn, attend))
        if self._mlp is not None:
            overrides.append((self._mlp, lambda x: self._trained(stored(self._trained, x))))
        return overrides

    def _recorders(self, rows: Rows) -> Iterator[RemovableHandle]:
        """Hooks that keep what the frozen modules compute in a pass."""
        last: list[Tensor] = []

        def note_attention(module: nn.Module, _: Any, output: Any) -> None:
            self._returned = len(output) if isinstance(output, tuple) else 0
            if not self._keep(module, rows, output[0] if self._returned else output):
                self._attn = None

        def note_inputs(module: nn.Module, args: tuple[Any, ...]) -> None:
            if not self._keep(module, rows, args[0]):
                self._mlp = None

        def note_projection(_: nn.Module, __: Any, output: Tensor) -> None:
            last.append(output)

        def compare(_: nn.Module, __: Any, output: Tensor) -> None:
            if not (last and output is last[-1]):  # the MLP does more after its last projection
                self._mlp = None

        if self._attn is not None:
            yield self._attn.register_forward_hook(note_attention)
        if self._mlp is not None:
            # before other hooks: the override calls the projection with these inputs, and the hooks apply again
            yield self._trained.register_forward_pre_hook(note_inputs, prepend=True)
            yield self._trained.register_forward_hook(note_projection)
            yield self._mlp.register_forward_hook(compare)

    def _keep(self, module: nn.Module, rows: Rows, states: Tensor) -> bool:
        if module not in self._states:
            size = (self._samples.input_ids.numel(), states.shape[-1])
            token_states = TokenStates.allocate(size, states.dtype, states.device, self.budget, near=True)
            if token_states is None:
                return False
            self._states[module], self.budget = token_states, token_states.left(self.budget)
        self._states[module].write(rows, states)
        return True
