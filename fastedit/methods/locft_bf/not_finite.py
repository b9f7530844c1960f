"""Find the edits that cause a loss that is not finite."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastedit import ops
from fastedit.errors import EditError
from fastedit.methods.locft_bf.training_set import TrainingSet
from fastedit.models import pack, run_from_tokens


def not_finite(data: TrainingSet, when: str, batch: Tensor, lr: float | None) -> EditError:
    """The error that names the edits that cause it; the model must hold its original weights.

    Args:
        when: where in training a loss first was not finite; `batch` holds the samples of that step.
    """
    guilty = sorted({data.owner[i] for i in _broken(data)})
    if guilty:
        return EditError(
            f"the loss is not finite for {data.batch.names(guilty)}, with the original weights and each "
            "edit by itself; the model is restored. Leave these edits out, or mend the model: it may have a token "
            "embedding or another weight that is not finite, or numbers too large for its dtype",
            edits=data.batch.name_list(guilty),
        )
    return EditError(
        f"the loss is not finite, first in {when}: {data.names(batch.tolist())}; "
        "with the original weights every edit has a finite loss, so it was training that diverged. The model is "
        f"restored. Try a learning rate below {lr:.3g}"
    )


@torch.no_grad()
def _broken(data: TrainingSet) -> list[int]:
    """The samples whose loss is not finite with the current weights.

    Runs from the tokens, with one sample per row: in a shared row, and so in the prefix cache, a value that is not
    finite spreads to every sample, since 0 times such a value is not 0.
    """
    topology, samples, broken = data.batch.model.topology, data.samples, []
    head: Any = topology.head
    for select in torch.arange(len(samples)).split(max(1, 4096 // int(samples.lengths.max()))):
        rows = pack(samples, select, packed=False).to(topology.device)
        each, _ = ops.target_cross_entropy(
            run_from_tokens(topology, rows),
            head.weight,
            rows.labels,
            torch.ones(len(rows.labels), device=topology.device),
            bias=getattr(head, "bias", None),
            softcap=topology.logit_softcap,
            per_row=True,
        )
        broken += select[rows.sample_of[~each.isfinite()].cpu()].tolist()
    return broken
