"""Train in directions that a layer's inputs seldom take, so that the layer changes little for other texts.

The trained map is x ↦ W x + D P x with P = I − U diag(s) Uᵀ. The columns of U are eigenvectors of a second moment C of
the layer's inputs, and s = λ / (λ + τ) is the share withheld of each, so that P = (I + C / τ)⁻¹. A direction in which
inputs are usually large is hardly trained; one that they never take is trained fully. The gradient in D is Gᵀ (X P):
the step is as without P, but on other inputs, and never forms a [d, d] matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fastedit.models import hooked

_SMALLEST = 0.02  # smallest s that is kept: for less, a column of U is not worth its cost


def threshold(values: Tensor, share: float) -> Tensor:
    """The τ with Σ λ / (λ + τ) = share · d for eigenvalues λ [d] of 0 or more."""
    low, high = values.max() * 2.0**-80, values.max() * 2.0**10
    for _ in range(100):  # the sum falls with τ
        middle = (low * high).sqrt()
        too_many = (values / (values + middle)).sum() > share * len(values)
        low, high = torch.where(too_many, middle, low), torch.where(too_many, high, middle)
    return high


@dataclass(frozen=True)
class NullSpace:
    """P = I − U diag(s) Uᵀ of a linear map's inputs.

    Attributes:
        basis: U [d, r] fp32, orthonormal columns.
        shares: s [r] fp32, in 0 … 1.
    """

    basis: Tensor
    shares: Tensor

    @classmethod
    def of(cls, values: Tensor, vectors: Tensor, share: float) -> NullSpace:
        """The P that withholds a share of the directions: τ is chosen so that Σ s = share · d.

        It is a share of the directions, because a share of C's trace may be one direction (Gemma 3) or a hundred.

        Args:
            values: [d] fp64, the eigenvalues of C; the columns of `vectors` [d, d] are its eigenvectors.
        """
        values = values.clamp(min=0)
        shares = values / (values + threshold(values, share))
        large = shares > _SMALLEST
        return cls(vectors[:, large].float().contiguous(), shares[large].float())

    def of_rows(self, x: Tensor) -> Tensor:
        """x P for rows x [..., d]."""
        return x - self._withheld(x) @ self.basis.T.to(x.dtype)

    def _withheld(self, x: Tensor) -> Tensor:
        """x U diag(s) [..., r]."""
        return (x @ self.basis.to(x.dtype)) * self.shares.to(x.dtype)

    @contextmanager
    def around(self, module: nn.Module) -> Iterator[None]:
        """Inside the block, a linear map of weight M computes W x + (M − W) P x (+ bias); W is its weight on entry."""
        weight: Any = module.weight
        weight = weight.detach() if isinstance(module, Conv1D) else weight.detach().T  # [d, h]
        frozen = self.basis.T.to(weight.dtype) @ weight  # [r, h]
        withheld: list[Tensor] = []

        def leave_out(_: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor]:
            withheld.append(self._withheld(args[0]))
            return (args[0] - withheld[-1] @ self.basis.T.to(args[0].dtype),)

        def add(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            return torch.add(output, withheld.pop() @ frozen)

        with hooked([module.register_forward_pre_hook(leave_out), module.register_forward_hook(add)]):
            yield
