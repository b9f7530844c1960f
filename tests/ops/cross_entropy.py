"""Inputs of target_cross_entropy, and the plain formula by autograd."""

from __future__ import annotations

import torch
from torch import Tensor


def problem(seed: int, R: int, h: int, V: int, *, bias: bool = True) -> dict[str, Tensor | None]:
    rng = torch.Generator().manual_seed(seed)
    return {
        "hidden": torch.randn(R, h, generator=rng),
        "head_weight": torch.randn(V, h, generator=rng) * 2 / h**0.5,
        "labels": torch.randint(V, (R,), generator=rng),
        "sample_weight": torch.rand(R, generator=rng),
        "bias": torch.randn(V, generator=rng) if bias else None,
    }


def cast(inputs: dict[str, Tensor | None], dtype: torch.dtype) -> dict[str, Tensor | None]:
    rounded = ("hidden", "head_weight", "bias")
    return {k: v.to(dtype) if k in rounded and v is not None else v for k, v in inputs.items()}


def plain(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    sample_weight: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The formula by autograd in the inputs' dtype, its logarithms in fp32 at least, as models do it."""
    hidden = hidden.clone().requires_grad_()
    z = hidden @ head_weight.T
    if bias is not None:
        z = z + bias
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    wide = torch.promote_types(z.dtype, torch.float32)
    logp = z.to(wide).log_softmax(1)[torch.arange(len(labels)), labels]
    loss = -(sample_weight.to(wide) * logp).sum()
    return loss.detach(), torch.autograd.grad(loss, hidden)[0]
