"""The fingerprint, which tells checkpoints apart."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from operator import itemgetter

import torch
from torch import Tensor, nn

from fastedit.models.editable import check_editable
from fastedit.models.quantized import stored
from fastedit.models.topology import topology

_SAMPLED = 256
FP16 = "in fp16 a model has another fingerprint than in bf16 or fp32"
"""For messages about fingerprints that differ."""


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """Hash of the names, shapes and up to 256 evenly spaced values of every parameter, and of the buffers of
    quantized maps.

    Values are converted to bf16, so that a checkpoint has the same fingerprint in fp32 and bf16. In fp16 it has another
    one: values below 6e-5 have lost digits there, and the others were rounded twice if they came from fp32.

    Raises:
        ModelError: weights that this package cannot edit.
    """
    parts = topology(model)
    check_editable(parts)
    return fingerprint_of(stored(parts.model))


@torch.no_grad()
def fingerprint_of(parameters: Iterable[tuple[str, Tensor]]) -> str:
    """The fingerprint of a model with these parameters, given as (path, values)."""
    digest = hashlib.sha256()
    values = []
    entries = ((path, tuple(p.shape), _sample(p)) for path, p in parameters)
    for path, shape, sample in sorted(entries, key=itemgetter(0)):
        digest.update(f"{path} {shape};".encode())
        values.append(sample)
    if len({sample.device for sample in values}) > 1:  # some are offloaded
        values = [sample.cpu() for sample in values]
    flat = torch.cat(values).cpu()
    digest.update(flat.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:32]


def _sample(parameter: Tensor) -> Tensor:
    step = max(1, parameter.numel() // _SAMPLED)
    return parameter.detach().reshape(-1)[::step][:_SAMPLED].to(torch.bfloat16)
