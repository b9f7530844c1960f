"""Targets z of locate-then-edit: what the subject's last token should become so that the model says the target.

A vector δ, added to the output of one block (MEMIT, arXiv 2210.07229, section 4.2) or of its MLP (ROME, arXiv
2202.05262, section 3.1) at the subject's last token, is optimized for every edit by itself, many at once
(`target_loop`). Blocks below the site run once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastedit.errors import ConfigError
from fastedit.methods.base import Edit, Progress, no_progress
from fastedit.methods.keys import subject_samples
from fastedit.methods.subjects import BARE, behind, in_templates, last_tokens, name_of, named, subject_ends
from fastedit.methods.target_loop import RELATIVE_LR, TargetConfig, TargetLoop
from fastedit.models import Budget, PairError, PrefixCache, Samples, Topology, tokenize

__all__ = ["RELATIVE_LR", "TargetConfig", "Targets", "find_targets", "target_samples"]


@dataclass(frozen=True)
class Targets:
    """Targets of N edits, fp32 on the model's device; the rows of dropped edits hold NaN.

    `z` [N, h] = h₀ + δ; `h0` [N, h], the subject's state at the site in the bare prompt; `loss` [N], the last one;
    `probability` [N], of the target: exp of its tokens' mean log P, mean over the rewriting rows; `steps` [N]
    int64, the updates taken; `dropped`, places of edits whose loss was not finite; `lr`, the rate used; `notes`
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


def find_targets(
    topology: Topology,
    tokenizer: Any,
    edits: Sequence[Edit],
    z_layer: int,
    config: TargetConfig,
    *,
    contexts: Sequence[str] = (),
    budget: Budget | None = None,
    memory: int | None = None,
    in_flight: int | None = None,
    progress: Progress = no_progress,
) -> Targets:
    """Optimize the targets of all edits; the model stays as it is.

    Args:
        z_layer: block of the site; not the last one, behind which nothing reads the subject.
        contexts: templates with one "{}" each, in which the prompt stands beside the bare "{}".
        budget: of the prefix cache.
        memory: bytes for the edits in flight; None is half of what is free.
        in_flight: edits in a batch; None is what `memory` holds.

    Raises:
        ConfigError, ModelError, RequestError: a wrong context or layer; an edit whose subject is not in its
            prompt, or that is longer than the model's context.
    """
    topology.block(z_layer)
    if z_layer == topology.n_blocks - 1:
        raise ConfigError(
            f"z_layer {z_layer} is the last block and nothing reads the subject behind it; choose one of 0 to "
            f"{z_layer - 1}"
        )
    samples, last, notes = target_samples(topology, tokenizer, edits, contexts)
    first = z_layer + (config.site == "block")
    with (
        _frozen(topology.model),
        # unpacked here and below: an edit with values that are not finite must not touch another
        PrefixCache(topology, samples, first, budget=budget, packed=False) as cache,
    ):
        loop = TargetLoop(topology, cache, samples, last, len(edits), z_layer, config)
        loop.run(in_flight, memory, progress)
    bad = loop.loss.isfinite().logical_not_()
    dropped = tuple(bad.nonzero()[:, 0].tolist())
    if dropped:
        notes.append(f"dropped, because the loss is not finite: {named(edits, dropped)}")
    for values in (loop.z, loop.loss, loop.probability):
        values[bad] = torch.nan
    return Targets(loop.z, loop.h0, loop.loss, loop.probability, loop.steps, dropped, loop.lr, tuple(notes))


def target_samples(
    topology: Topology, tokenizer: Any, edits: Sequence[Edit], contexts: Sequence[str]
) -> tuple[Samples, Tensor, list[str]]:
    """All rows, template by template, then the KL rows; where the subject ends in each [(C + 2)·N]; notes.

    Raises:
        ConfigError, RequestError: as `find_targets`.
    """
    ends, notes = subject_ends(edits)
    texts, places = in_templates(edits, ends, [BARE, *contexts])
    n = len(edits)
    pairs = [(text, edits[i % n].target) for i, text in enumerate(texts)]
    try:
        rewriting = tokenize(tokenizer, pairs, append_eos=False, max_length=topology.context_length)
    except PairError as error:
        context, i = divmod(error.pair, n)
        raise behind(name_of(edits[i], i), contexts[context - 1] if context else "", error) from None
    _, last = last_tokens(tokenizer, [f"{prompt} {target}" for prompt, target in pairs], places)
    # nothing behind the subject is read in these rows: they end there
    subjects = [str(edit.subject) for edit in edits]
    ids, kl_last = last_tokens(tokenizer, [f"{s} is a" for s in subjects], [len(s) for s in subjects])
    essence = subject_samples(ids, kl_last)
    samples = Samples(
        torch.cat([rewriting.input_ids, essence.input_ids]),
        torch.cat([rewriting.offsets, essence.offsets[1:] + rewriting.offsets[-1]]),
        torch.cat([rewriting.target_start, essence.target_start]),
    )
    return samples, torch.tensor(last + kl_last), notes


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No weight asks for a gradient inside: autograd then keeps only what δ needs."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    try:
        for p in trainable:
            p.requires_grad_(False)
        yield
    finally:
        for p in trainable:
            p.requires_grad_(True)
