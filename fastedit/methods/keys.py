"""Keys of the edits, layer by layer: what the edited projection reads at the last token of the subject.

Keys at a layer depend only on edited weights below it, so one walk through the blocks serves all layers of a
spread: after the weights of a layer were written, go on from that layer (MEMIT, arXiv 2210.07229, section 4.3).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastedit.errors import EditError, RequestError
from fastedit.methods.base import Edit, Progress, no_progress
from fastedit.methods.subjects import BARE, in_templates, last_tokens, name_of, named, subject_ends
from fastedit.models import Budget, PrefixCache, Rows, Samples, Topology, observe, pack, pass_tokens
from fastedit.models.per_sample import Factors, per_sample_updates

Average = Literal["half", "uniform"]


class KeyWalk:
    """Keys and block outputs at the last token of every edit's subject, at one layer after the other.

    A key is averaged over the bare prompt and the contexts: "half" the bare one and half the mean of the
    contexts (MEMIT), or "uniform" over all of them (ROME). Tokens behind the subject never run. The walk is
    at block ``layer`` and goes up only; what it gives is the model's as it is at that moment, provided that
    below ``layer`` only weights changed that it had not passed. Use it as a context manager.

    ``updates`` maps linear maps to factors of one update an edit (`per_sample_updates`): with them every edit goes its
    own way, as if its update alone had been written.

    Args:
        contexts: templates with one "{}" each, beside the bare "{}", which is always there.
        batch_tokens: tokens of a forward pass; None is what suits the device.
        budget: of the prefix cache.

    Raises:
        ConfigError, ModelError, RequestError: a wrong context; no such block; an edit whose subject is not in
            its prompt or lies behind the model's context.
    """

    def __init__(
        self,
        topology: Topology,
        tokenizer: Any,
        edits: Sequence[Edit],
        layer: int,
        *,
        contexts: Sequence[str] = (),
        average: Average = "half",
        budget: Budget | None = None,
        batch_tokens: int | None = None,
        progress: Progress = no_progress,
    ) -> None:
        self._topology, self._edits = topology, edits
        self._batch_tokens = batch_tokens or pass_tokens(topology.device)
        self.updates: dict[nn.Module, Factors] = {}
        ends, self.notes = subject_ends(edits)
        templates = [BARE, *contexts]
        texts, ends = in_templates(edits, ends, templates)
        ids, last = last_tokens(tokenizer, texts, ends)
        n = len(edits)
        for sample, place in enumerate(last):
            if place >= topology.context_length:
                raise RequestError(
                    f"{name_of(edits[sample % n], sample % n)}: its subject ends at token {place + 1}, behind the "
                    f"model's context of {topology.context_length}; shorten the prompt"
                )
        self._samples = subject_samples(ids, last)
        share = 1 / len(templates) if average == "uniform" or not contexts else 0.5
        self._weights = [share] + [(1 - share) / max(1, len(contexts))] * len(contexts)
        done = 0

        def report(count: int) -> None:
            nonlocal done
            done += count
            progress("keys", done, len(self._samples))

        self._cache = PrefixCache(
            topology,
            self._samples,
            layer,
            budget=budget,
            batch_tokens=batch_tokens,
            packed=False,  # so that an error names the edit whose key is not finite, and no other
            progress=report,
        )

    @property
    def layer(self) -> int:
        return self._cache.layer

    def advance(self, layer: int) -> None:
        """Go on to block ``layer``, through the blocks in between as their weights are now."""
        self._cache.advance(layer, around=self._own)

    def keys(self, module: str = "down_proj") -> Tensor:
        """Keys [N, d], fp32, of a projection of block ``layer``.

        Raises:
            ModelError: no such module.
            EditError: keys that are not finite; names the edits.
        """
        _, projection = self._topology.resolve(self.layer, module)
        n = len(self._edits)
        keys: Tensor | None = None
        for select in torch.arange(len(self._samples)).split(self._samples_a_pass):
            rows, hidden = self._batch(select)
            with self._own(select):
                seen = observe(self._topology, hidden, rows, self.layer, projection).float()
            if keys is None:
                keys = seen.new_zeros(n, seen.shape[1])
            weights = torch.tensor([self._weights[int(s) // n] for s in select], device=seen.device)
            keys.index_add_(0, (select % n).to(seen.device), seen * weights[:, None])
        assert keys is not None
        return self._finite(keys, f"keys at layer {self.layer}")

    def outputs(self, layer: int, module: str = "block", *, finite: bool = True) -> Tensor:
        """What a module of block ``layer`` (the current one or a later) gives at the subject in the bare prompt.

        Returns:
            [N, width] fp32.

        Raises:
            EditError: some are not ``finite``, and should be; names the edits.
        """
        _, found = self._topology.resolve(layer, module)
        seen = []
        for select in torch.arange(len(self._edits)).split(self._samples_a_pass):
            rows, hidden = self._batch(select)
            with self._own(select):
                seen.append(observe(self._topology, hidden, rows, self.layer, found, output=True).float())
        outputs = torch.cat(seen)
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
        """In which the rows of these samples [B] run, each with its edit's updates."""
        return per_sample_updates(self.updates, select % len(self._edits)) if self.updates else nullcontext()

    def _batch(self, select: Tensor) -> tuple[Rows, Tensor]:
        rows = pack(self._samples, select, packed=False).to(self._topology.device)
        return rows, self._cache.hidden(rows)

    def _finite(self, values: Tensor, what: str) -> Tensor:
        bad = (~values.isfinite().all(1)).nonzero()[:, 0].tolist()
        if bad:
            raise EditError(f"the {what} are not finite for {named(self._edits, bad)}; leave these edits out")
        return values


def subject_samples(ids: Sequence[Sequence[int]], last: Sequence[int]) -> Samples:
    """Samples that read up to the subject's last token; that token is their one target row."""
    kept = [[*tokens[: end + 1], 0] for tokens, end in zip(ids, last, strict=True)]  # the 0 is only a label
    flat = torch.tensor([token for tokens in kept for token in tokens])
    offsets = torch.tensor([0, *(len(tokens) for tokens in kept)]).cumsum(0)
    return Samples(flat, offsets, torch.tensor(last) + 1)
