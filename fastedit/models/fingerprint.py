"""What tells one checkpoint from another, and whether a parameter is still what it was."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from fastedit.models.topology import check_editable, topology

_SAMPLED = 256
_CHUNK = 2**20
FP16 = "in fp16 a model has another fingerprint than in bf16 or fp32"
"""For messages that fingerprints differ."""


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """Hash of the names, shapes and up to 256 evenly spaced values of every parameter.

    Values are taken in bf16, so that one checkpoint has one fingerprint whether it is loaded in fp32 or bf16. In fp16
    it has another: what is below 6e-5 has lost digits there, and the rest was rounded twice if it came from fp32.

    Raises:
        ModelError: weights that this package cannot edit.
    """
    parts = topology(model)
    check_editable(parts)
    digest = hashlib.sha256()
    values = []
    for path, p in sorted(parts.model.named_parameters()):
        digest.update(f"{path} {tuple(p.shape)};".encode())
        step = max(1, p.numel() // _SAMPLED)
        values.append(p.detach().reshape(-1)[::step][:_SAMPLED].to(torch.bfloat16))
    flat = torch.cat(values).cpu()
    digest.update(flat.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:32]


@torch.no_grad()
def checksum(parameter: Tensor) -> int:
    """64 bits that depend on every bit of a parameter and on its place, and on nothing else.

    Words of 32 bits are summed with random odd weights, modulo 2⁶⁴: neither the order of the sum nor the device
    matters, as they would to a sum that rounds. One MiB at once, so that temporaries stay small; the sums of
    such chunks are summed likewise.
    """
    rng = torch.Generator().manual_seed(0)

    def weights(n: int) -> Tensor:
        return (torch.randint(-(2**63), 2**63 - 1, (n,), generator=rng) | 1).to(parameter.device)

    flat = parameter.detach().reshape(-1)
    word = torch.int8 if flat.nbytes % 4 else torch.int32
    places = weights(min(_CHUNK, flat.nbytes) // word.itemsize)
    chunks = (chunk.clone().view(word) for chunk in flat.split(_CHUNK // flat.itemsize))  # copies are aligned
    sums = torch.stack([(chunk * places[: len(chunk)]).sum() for chunk in chunks])
    return int((sums * weights(len(sums))).sum())
