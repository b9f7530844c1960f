"""Passes of LocFT-BF: the loss of some samples and its gradient, from what no step changes and runs once."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fastedit import ops, parallel
from fastedit.methods.locft_bf.adam import GradientParts, recorded
from fastedit.methods.locft_bf.anchors import Reference
from fastedit.methods.locft_bf.config import LocFTBFConfig
from fastedit.methods.locft_bf.null_space import NullSpace
from fastedit.methods.locft_bf.training_set import TrainingSet
from fastedit.models import (
    FrozenPart,
    HeldTokens,
    Past,
    PrefixCache,
    Rows,
    at_tokens,
    in_passes,
    observe,
    pack,
    pass_tokens,
    resume,
    row_multiple,
)
from fastedit.statistics.store import StatisticsStore

_BEFORE = "tokens before the subjects"
_PADDED = 4  # how many times the tokens of a pass a step may have with pads, if tokens are held


class Passes:
    """Passes through the blocks from the lowest edited one on.

    Outside `prepared` they run the model as it is. Set `cache` before the first one.

    Attributes:
        loss_of: [S] fp32, of each sample the mean over its target tokens when it was last computed, NaN before.
        gradients: the parts of the gradients, filled by `run` inside `prepared`.
        null_spaces: by block, the directions that the update avoids.
        kept: names of what is kept in memory because it runs once.
        notes: what was not kept there, though it changes what is learned.
        holds: whether the tokens before the subjects are among it.
    """

    cache: PrefixCache

    def __init__(self, data: TrainingSet, modules: Mapping[int, nn.Module], config: LocFTBFConfig) -> None:
        self.data, self.modules, self.config = data, modules, config
        self.topology, self.samples = data.batch.model.topology, data.samples
        topology, samples = self.topology, self.samples
        self.loss_of = torch.full((len(samples),), torch.nan, dtype=torch.float32, device=topology.device)
        self.gradients: GradientParts = {}
        self.null_spaces: dict[int, NullSpace] = {}
        self.notes: list[str] = []
        self._frozen: FrozenPart | None = None
        self._held: HeldTokens | None = None
        self._reference: Reference | None = None
        self._trained_rows: Mapping[int, Tensor] | None = None  # of the current pass
        self._scratch: Tensor | None = None  # reused by all steps: new pages cost a CPU time
        if topology.device.type == "cpu":
            head: Any = topology.head
            targets = int((samples.lengths - samples.target_start).sum())
            n_anchors = int(config.batch_size) if len(data.anchors) else 0
            self._scratch = ops.logits_buffer(head.weight, targets, n_anchors)

    @property
    def kept(self) -> list[str]:
        frozen = [] if self._frozen is None else self._frozen.parts
        return frozen if self._held is None else [*frozen, _BEFORE]

    @property
    def holds(self) -> bool:
        return self._held is not None

    @contextmanager
    def prepared(
        self,
        maps: Mapping[str, nn.Linear | Conv1D],
        statistics: StatisticsStore | None,
        *,
        epochs: int,
        kept: Collection[str] | None = None,
    ) -> Iterator[None]:
        """Run once what no step changes; inside the block, with statistics, the modules compute W x + (M − W) P x.

        Args:
            maps: those linear maps whose gradients are recorded in parts.
            statistics: of the modules' inputs, if the update avoids the directions that these usually take.
            epochs: with a single one nothing would be read again.
            kept: what to keep, whether it fits into the budget or not; None is all that fits.
        """
        topology, cache = self.topology, self.cache
        self._frozen = FrozenPart(topology, cache, self.modules[cache.layer], kept) if epochs > 1 else None
        keys = self._look_at_anchors(statistics is not None) if len(self.data.anchors) else {}
        with ExitStack() as stack:
            if statistics is not None:
                share = self.config.null_space
                assert share is not None  # chosen by now
                for layer, module in self.modules.items():
                    if layer in keys:  # also avoid the directions of the inputs at anchors
                        K = keys[layer].double()
                        values, vectors = torch.linalg.eigh(statistics.covariance(layer) + K.T @ K / len(K))
                    else:
                        values, vectors = statistics.eigen(layer)
                    self.null_spaces[layer] = NullSpace.of(values, vectors, share)
                    stack.enter_context(self.null_spaces[layer].around(module))
                stack.callback(self.release)
                if self._frozen is not None and (kept is None or _BEFORE in kept):
                    self._held = self._tokens_before_subjects(self._frozen)
            self.gradients = stack.enter_context(recorded(maps, self._subjects))
            yield

    def release(self) -> None:
        """Run the tokens before the subjects from now on, with the update, as in the edited model."""
        self._held = None

    @torch.no_grad()
    def _look_at_anchors(self, keys_too: bool) -> dict[int, Tensor]:
        """Keep the predictions at all anchors; returns, with `keys_too`, the modules' inputs there [A, d] by block."""
        topology, first = self.topology, self.data.anchors.first
        keys: dict[int, list[Tensor]] = {layer: [] for layer in self.modules if keys_too}
        references = []
        for in_pass in in_passes(self.samples.lengths[first:], pass_tokens(topology.device)):
            select = first + torch.tensor(in_pass)
            rows = pack(self.samples, select, packed=topology.packs).to(topology.device)
            references.append(Reference.of(topology.logits(self._hidden(rows)).float()))
            for layer, seen in keys.items():
                state = self.cache.hidden(rows)
                seen.append(observe(topology, state, rows, self.cache.layer, self.modules[layer]))
        self._reference = Reference.joined(references)
        return {layer: torch.cat(seen) for layer, seen in keys.items()}

    def _tokens_before_subjects(self, frozen: FrozenPart) -> HeldTokens | None:
        """The tokens before those that are trained, if there are some and they fit into what the frozen part left.

        They run once: an update in the null space hardly changes them. All processes hold them, or none does, because
        they train together.
        """
        # their rows are padded to the longest sample of a step
        padded = int(self.config.batch_size) * int(self.samples.lengths.max())
        too_long = padded > _PADDED * pass_tokens(self.topology.device)
        if self.data.trained is None or self.config.schedule == "depth-first" or too_long:
            return None
        # a token may be the subject's last one and the target's first
        before = torch.minimum(self.data.trained.clamp(min=0), self.samples.target_start - 1)
        held = HeldTokens(self.topology, self.cache, self.samples, before)
        held.record(torch.arange(len(self.samples)), frozen.budget)
        if not all(parallel.gathered(held.supported and held.nbytes > 0)):
            if not all(parallel.gathered(held.fits)):
                self.notes.append(f"the {_BEFORE} run in every epoch: what they compute does not fit into memory")
            return None
        tier = "device" if self.topology.device.type == "cuda" else "host"
        self.data.batch.budget.tally.add(held, tier, held.nbytes)
        return held

    def _subjects(self, x: Tensor) -> Tensor | None:
        """The rows of an input [T, d] where training takes place; None is all."""
        return None if self._trained_rows is None else self._trained_rows[len(x)]

    def _hidden(self, rows: Rows, past: Past | None = None) -> Tensor:
        """Hidden states [M, h] at the target rows."""
        topology, layer = self.topology, self.cache.layer
        overrides = [] if past is None else at_tokens(topology, rows, layer)
        overrides += self._frozen.overrides(rows) if self._frozen else []
        with nullcontext() if past is None else past.attention():
            return resume(topology, self.cache.hidden(rows), rows, layer, overrides, past)

    def run(self, select: Tensor, weights: Tensor, anchors: Tensor) -> Tensor:
        """Compute the gradients of some samples, anchors last; returns the weighted loss of each target row [M].

        Edits whose loss is below `focus` get no gradient.

        Args:
            select: [B], samples.
            weights: [B], of each one's losses.
            anchors: [K], which anchors the last K samples are.
        """
        topology, head = self.topology, cast(Any, self.topology.head)
        past: Past | None = None
        if self._held is not None:
            rows, past = self._held.remaining(select)
        else:
            rows = pack(self.samples, select, packed=topology.packs, multiple=row_multiple(topology.device))
        weight = weights[rows.sample_of].to(topology.device, non_blocking=True)
        rows = rows.to(topology.device, non_blocking=True)
        self._trained_rows = self.data.trained_rows(rows)
        hidden = self._hidden(rows, past)  # [M, h], anchors last
        n = len(rows.labels) - len(anchors)
        losses, grad = ops.target_cross_entropy(
            hidden.detach(),
            head.weight,
            rows.labels[:n],
            weight,
            bias=getattr(head, "bias", None),
            softcap=topology.logit_softcap,
            others=partial(self._reference.divergence, anchors) if self._reference is not None else None,
            per_row=True,
            scratch=self._scratch,
        )
        sample = rows.sample_of[:n]
        count = losses.new_zeros(len(select)).index_add_(0, sample, torch.ones_like(losses[:n]))
        each = torch.zeros_like(count).index_add_(0, sample, losses[:n] / weight[:n]) / count
        edits = select[: len(select) - len(anchors)]
        self.loss_of[edits.to(losses.device)] = each[: len(edits)].float()
        if self.config.focus:
            grad[:n] *= (each >= self.config.focus)[sample][:, None]
        if hidden.requires_grad:
            hidden.backward(grad)
        return losses
