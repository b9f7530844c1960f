"""Score answers with teacher forcing: likeliest tokens and log-probabilities at every token of an answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fastedit import parallel
from fastedit.evaluation.first_token import LOGITS
from fastedit.models import (
    Factors,
    PrefixCache,
    Samples,
    Topology,
    offloaded_prefix,
    pack,
    per_sample_updates,
    resume,
    run_from_tokens,
)


@dataclass(frozen=True)
class Scores:
    """A model's predictions at the target tokens of samples; all on the CPU.

    ``best`` [M] int64 are the likeliest ids and ``logp`` [M] fp32 the log P of the targets, sample after sample.
    ``first`` [K, h] are the final hidden states that predict the first target token of the K wanted samples.
    """

    best: Tensor
    logp: Tensor
    first: Tensor


def score(
    topology: Topology,
    samples: Samples,
    batch_tokens: int,
    progress: Callable[[int, int], None],
    updates: Mapping[nn.Module, Factors],
    edits: Tensor,
    wanted: Tensor,
) -> Scores:
    """Score all target tokens of all samples; every process takes its share of the samples.

    Sample i runs with the update ``edits[i]`` of ``updates``, if there are any.

    Args:
        wanted: [N] bool, the samples whose first states are kept.
    """
    mine = slice((share := parallel.share(len(samples))).start, share.stop)
    own_samples = samples.take(torch.arange(len(samples))[mine]) if parallel.world() > 1 else samples
    scores = parallel.gathered(
        _score(topology, own_samples, batch_tokens, progress, updates, edits[mine], wanted[mine])
    )
    return Scores(*(torch.cat([getattr(part, f.name) for part in scores]) for f in fields(Scores)))


def _score(
    topology: Topology,
    samples: Samples,
    batch_tokens: int,
    progress: Callable[[int, int], None],
    updates: Mapping[nn.Module, Factors],
    edits: Tensor,
    wanted: Tensor,
) -> Scores:
    """Score samples in this process."""
    n_targets = samples.lengths - samples.target_start
    if not len(samples):
        return Scores(torch.zeros(0, dtype=torch.int64), torch.zeros(0), torch.zeros(0, topology.hidden_size))
    # similar lengths share a batch: the longest sample sets the length of its rows
    order = samples.lengths.argsort(descending=True, stable=True)
    batch = (samples.lengths[order].cumsum(0) - 1) // batch_tokens
    step = max(1, LOGITS // topology.config.vocab_size)
    best, logp, first, done = [], [], [], 0
    # offloaded blocks are read once for all samples, not once for each batch
    layer = 0 if updates else min(offloaded_prefix(topology.blocks), topology.n_blocks - 1)
    cache = PrefixCache(topology, samples, layer) if layer else None
    for select in torch.split(order, torch.unique_consecutive(batch, return_counts=True)[1].tolist()):
        # with updates, one sample per row, so that an edit with values that are not finite affects no other
        rows = pack(samples, select, packed=topology.packs and not updates).to(topology.device, non_blocking=True)
        if cache is not None:
            hidden = resume(topology, cache.hidden(rows), rows, layer)
        else:
            with per_sample_updates(updates, edits[select]):
                hidden = run_from_tokens(topology, rows, prune=not updates)
        starts = n_targets[select].cumsum(0) - n_targets[select]
        first.append(hidden[starts[wanted[select]].to(hidden.device)].cpu())
        for states, labels in zip(torch.split(hidden, step), torch.split(rows.labels, step), strict=True):
            logits = topology.logits(states).float()  # [m, V]
            best.append(logits.argmax(-1))
            logp.append(-cross_entropy(logits, labels, reduction="none"))
        done += len(select)
        progress(done, len(samples))
    owner = torch.repeat_interleave(order, n_targets[order])  # [M]
    back = owner.argsort(stable=True)
    by_sample = order[wanted[order]].argsort()
    return Scores(torch.cat(best).cpu()[back], torch.cat(logp).cpu()[back], torch.cat(first)[by_sample])
