"""Targets z of locate-then-edit: the state at the subject's last token that makes the model say the target.

A vector δ is added to the output of one block (MEMIT, arXiv 2210.07229, section 4.2) or of its MLP (ROME, arXiv
2202.05262, section 3.1) at the subject's last token. It is optimized for each edit separately, many edits at once
(`target_loop`). Blocks below the site run once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastedit.errors import ConfigError
from fastedit.methods.batch import Batch
from fastedit.methods.locate_then_edit.config import TargetConfig
from fastedit.methods.locate_then_edit.target_loop import TargetLoop
from fastedit.models import PrefixCache, forwards, fuse

_TENSORS = ("z", "h0", "loss", "probability", "steps")


@dataclass(frozen=True)
class Targets:
    """Targets of N edits, fp32 on the model's device; the rows of dropped edits hold NaN.

    `z` [N, h] is h₀ + δ; `h0` [N, h] the subject's state at the site in the bare prompt; `loss` [N] the last one;
    `probability` [N] of the target: exp of its tokens' mean log P, averaged over the rewriting rows; `steps` [N]
    int64 the updates taken; `dropped` the places of edits whose loss was not finite; `lr` the rate used; `notes` are
    for the user.
    """

    z: Tensor
    h0: Tensor
    loss: Tensor
    probability: Tensor
    steps: Tensor
    dropped: tuple[int, ...]
    lr: float
    notes: tuple[str, ...]

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors by name, and the rest, serializable to JSON."""
        tensors = {name: getattr(self, name) for name in _TENSORS}
        return tensors, {"lr": self.lr, "dropped": self.dropped, "notes": self.notes}

    @classmethod
    def of_state(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], device: torch.device) -> Targets:
        """Make targets from what `state` returned, on a device. Raises KeyError or TypeError for anything else."""
        on_device = {name: tensors[name].to(device) for name in _TENSORS}
        return cls(**on_device, dropped=tuple(metadata["dropped"]), lr=metadata["lr"], notes=tuple(metadata["notes"]))

    @classmethod
    def joined(cls, parts: Sequence[Targets]) -> Targets:
        """Join the targets of consecutive edits."""
        tensors = {name: torch.cat([getattr(part, name) for part in parts]) for name in _TENSORS}
        dropped, offset = [], 0
        for part in parts:
            dropped += [offset + place for place in part.dropped]
            offset += len(part.z)
        notes = dict.fromkeys(note for part in parts for note in part.notes)
        return cls(**tensors, dropped=tuple(dropped), lr=parts[0].lr, notes=tuple(notes))

    def select(self, places: Sequence[int]) -> Targets:
        """The targets of the edits at these places."""
        index = torch.tensor([*places], dtype=torch.int64, device=self.z.device)
        tensors: dict[str, Any] = {name: getattr(self, name)[index] for name in _TENSORS}
        dropped = tuple(new for new, old in enumerate(places) if old in self.dropped)
        return replace(self, **tensors, dropped=dropped)


def find_targets(
    batch: Batch, z_layer: int, config: TargetConfig, *, memory: int | None = None, in_flight: int | None = None
) -> Targets:
    """Optimize the targets of all edits; the model stays as it is.

    Args:
        z_layer: block of the site; not the last one, because no block after it reads the subject.
        memory: bytes for the edits in flight; None is half of what is free.
        in_flight: edits in a batch; None is as many as fit `memory`.

    Raises:
        ConfigError, ModelError: a wrong layer. RequestError: as for `Batch.rewriting`.
    """
    topology = batch.model.topology
    topology.block(z_layer)
    if z_layer == topology.n_blocks - 1:
        raise ConfigError(
            f"z_layer {z_layer} is the last block and nothing reads the subject after it; choose one of 0 to "
            f"{z_layer - 1}"
        )
    samples, _ = batch.rewriting
    first = z_layer + (config.site == "block")
    with (
        _frozen(topology.model),
        forwards(fuse(topology)),
        # unpacked here and below, so that values that are not finite stay in their own edit
        PrefixCache(topology, samples, first, budget=batch.budget, packed=False) as cache,
    ):
        loop = TargetLoop(batch, cache, z_layer, config)
        loop.run(in_flight, memory)
    bad = loop.loss.isfinite().logical_not_()
    dropped = tuple(bad.nonzero()[:, 0].tolist())
    notes = [*batch.notes]
    if dropped:
        notes.append(f"dropped, because the loss is not finite: {batch.names(dropped)}")
    for values in (loop.z, loop.loss, loop.probability):
        values[bad] = torch.nan
    return Targets(loop.z, loop.h0, loop.loss, loop.probability, loop.steps, dropped, loop.lr, tuple(notes))


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Turn off gradients for all weights inside the block, so that autograd keeps only what δ needs."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    try:
        for p in trainable:
            p.requires_grad_(False)
        yield
    finally:
        for p in trainable:
            p.requires_grad_(True)
