"""Keys of the edits, layer by layer: inputs of the edited projection at the last token of the subject.

Keys at a layer depend only on edited weights below it, so one walk through the blocks serves all layers of a
spread: after the weights of a layer are written, the walk continues from that layer (MEMIT, arXiv 2210.07229, section
4.3).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from types import TracebackType

import torch
from torch import Tensor, nn

from fastedit.errors import EditError
from fastedit.methods.batch import Batch
from fastedit.models import Factors, PrefixCache, Rows, observe, pack, pass_tokens, per_sample_updates
from fastedit.progress import counter


class KeyWalk:
    """Keys and block outputs at the last token of every edit's subject, layer by layer.

    A key is averaged over the bare prompt and the contexts: half the bare one and half the mean of the contexts
    (MEMIT), or without ``half`` uniformly over all of them (ROME). Tokens after the subject never run. The walk is at
    block ``layer`` and only goes up. Its results are those of the model as it is at that moment, provided that no
    weights below ``layer`` changed after the walk had passed them. Use it as a context manager.

    ``updates`` maps linear maps to factors of one update per edit (`per_sample_updates`): every edit then runs as if
    only its own update had been written.

    Args:
        batch_tokens: tokens per forward pass; None chooses what suits the device.

    Raises:
        ModelError: no such block. RequestError: a subject that ends after the model's context.
    """

    def __init__(self, batch: Batch, layer: int, *, half: bool = True, batch_tokens: int | None = None) -> None:
        self._topology, self._batch, self._samples = batch.model.topology, batch, batch.prompts
        self._batch_tokens = batch_tokens or pass_tokens(self._topology.device)
        self.updates: dict[nn.Module, Factors] = {}
        n_contexts = len(batch.templates) - 1
        share = 0.5 if half and n_contexts else 1 / (1 + n_contexts)
        self._weights = [share] + [(1 - share) / max(1, n_contexts)] * n_contexts
        self._cache = PrefixCache(
            self._topology,
            self._samples,
            layer,
            budget=batch.budget,
            batch_tokens=batch_tokens,
            packed=False,  # so that an error names only the edit whose key is not finite
            progress=counter(batch.progress, "keys", len(self._samples)),
        )

    @property
    def layer(self) -> int:
        return self._cache.layer

    def advance(self, layer: int) -> None:
        """Go up to block ``layer``, through the blocks in between with their current weights."""
        self._cache.advance(layer, around=self._own)

    def keys(self, module: str = "down_proj", *, bare: bool = False) -> Tensor:
        """Keys [N, d], fp32, of a projection of block ``layer``; with ``bare``, of the bare prompts alone.

        Raises:
            ModelError: no such module.
            EditError: keys that are not finite; names the edits.
        """
        _, projection = self._topology.resolve(self.layer, module)
        n = len(self._batch)
        keys: Tensor | None = None
        shares = [1.0] if bare else self._weights
        for select in torch.arange(n * len(shares)).split(self._samples_a_pass):
            rows, hidden = self._rows(select)
            with self._own(select):
                inputs = observe(self._topology, hidden, rows, self.layer, projection).float()
            if keys is None:
                keys = inputs.new_zeros(n, inputs.shape[1])
            weights = torch.tensor([shares[int(s) // n] for s in select], device=inputs.device)
            keys.index_add_(0, (select % n).to(inputs.device), inputs * weights[:, None])
        assert keys is not None
        return self._finite(keys, f"keys at layer {self.layer}")

    def outputs(self, layer: int, module: str = "block", *, finite: bool = True) -> Tensor:
        """Outputs of a module of block ``layer`` (the current one or a later one) at the subject in the bare prompt.

        Returns:
            [N, width] fp32.

        Raises:
            EditError: with ``finite``, outputs that are not finite; names the edits.
        """
        _, submodule = self._topology.resolve(layer, module)
        chunks = []
        for select in torch.arange(len(self._batch)).split(self._samples_a_pass):
            rows, hidden = self._rows(select)
            with self._own(select):
                chunks.append(observe(self._topology, hidden, rows, self.layer, submodule, output=True).float())
        outputs = torch.cat(chunks)
        return self._finite(outputs, f"outputs of {module} {layer}") if finite else outputs

    def close(self) -> None:
        """Free the prefix cache."""
        self._cache.close()

    def __enter__(self) -> KeyWalk:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _samples_a_pass(self) -> int:
        return max(1, self._batch_tokens // int(self._samples.lengths.max()))

    def _own(self, select: Tensor) -> AbstractContextManager[None]:
        """A context in which the rows of these samples [B] run, each with its edit's updates."""
        return per_sample_updates(self.updates, select % len(self._batch)) if self.updates else nullcontext()

    def _rows(self, select: Tensor) -> tuple[Rows, Tensor]:
        rows = pack(self._samples, select, packed=False).to(self._topology.device)
        return rows, self._cache.hidden(rows)

    def _finite(self, values: Tensor, what: str) -> Tensor:
        bad = (~values.isfinite().all(1)).nonzero()[:, 0].tolist()
        if bad:
            text = f"the {what} are not finite for {self._batch.names(bad)}; leave these edits out"
            raise EditError(text, edits=self._batch.name_list(bad))
        return values
