"""The prefix cache: run the blocks below an edited one once, keep their output, and resume from there."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, closing, nullcontext
from types import TracebackType

import torch
from torch import Tensor

from fastedit.errors import ModelError
from fastedit.models.forward import in_passes, pass_tokens, row_multiple, run_blocks
from fastedit.models.offload import stages, streamed
from fastedit.models.token_states import Budget, TokenStates
from fastedit.models.tokens import Rows, Samples, pack
from fastedit.models.topology import Topology


class PrefixCache:
    """The input of block ``layer`` for every token of all samples, in one flat buffer [T, h].

    The state has the dtype that the model itself uses there. Use it as a context manager.

    Args:
        topology: of the model.
        samples: all samples; rows given to ``hidden`` index into them.
        layer: the blocks below it run once, now.
        budget: decides the tier.
        batch_tokens: tokens per forward pass; None chooses what suits the device.
        packed: put several samples into a row. If False, no sample can affect another with values that are not finite.
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
        self._stored: TokenStates | None = None
        self.layer = layer
        try:
            self._run(None, layer, progress)
        except BaseException:
            self.close()
            raise

    @property
    def _states(self) -> TokenStates:
        if self._stored is None:
            raise ModelError("the prefix cache is closed; make a new one")
        return self._stored

    @property
    def tier(self) -> str:
        """Where the state is kept (see `TokenStates`)."""
        return self._states.tier

    @property
    def nbytes(self) -> int:
        """Bytes of the cached state."""
        return self._states.nbytes

    @property
    def budget(self) -> Budget:
        """The remaining budget."""
        return self._states.left(self._budget)

    def hidden(self, rows: Rows) -> Tensor:
        """The cached state of the rows' tokens [B, R, h] on the model's device; pads get some token's state."""
        return self._states.read(rows)

    def ahead(self, select: Tensor) -> None:
        """Ask the system to prefetch the state of these samples [N], if it is in a file."""
        begin = self.samples.offsets[select]
        self._states.ahead(begin, begin + self.samples.lengths[select])

    def advance(
        self,
        layer: int,
        progress: Callable[[int], None] | None = None,
        around: Callable[[Tensor], AbstractContextManager[None]] | None = None,
    ) -> None:
        """Run blocks ``self.layer`` … ``layer - 1`` on the cached state, in place.

        If this fails, the cache is closed, because parts of its state would belong to different blocks.

        Args:
            around: returns, for the samples [B] of each pass, the context in which it runs.

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
        """Free the state and its file."""
        self._stored = None

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
        """Fill the buffer with the input of block ``stop``, from the input of block ``start`` or from the tokens.

        All samples pass an offloaded block before the next one is read, so that each is read once.
        """
        parts = stages(self._topology.blocks, start or 0, stop)
        done = reported = 0
        with closing(streamed(self._topology.blocks, parts)) as ready:
            for number, part in enumerate(ready):
                for select in in_passes(self.samples.lengths, self._batch_tokens):
                    with around(torch.tensor(select)) if around else nullcontext():
                        self._pass(select, part.start if number or start is not None else None, part.stop)
                    done += len(select)
                    if progress is not None:
                        progress(done // len(parts) - reported)
                        reported = done // len(parts)

    def _pass(self, select: range, start: int | None, stop: int) -> None:
        topology = self._topology
        rows = pack(self.samples, select, packed=self._packed, multiple=row_multiple(topology.device))
        rows = rows.to(topology.device)
        states = run_blocks(topology, rows, start or 0, None if start is None else self.hidden(rows), stop=stop)
        if self._stored is None:
            size = (self.samples.input_ids.numel(), states.shape[-1])
            self._stored = TokenStates.allocate(size, states.dtype, topology.device, self._budget)
        self._states.write(rows, states)
