"""Training in the directions that a layer's inputs seldom take, so that the layer stays what it is for other texts.

The trained map is x ↦ W x + D P x with P = I − U diag(s) Uᵀ: U are eigenvectors of a second moment C of the layer's
inputs and s = λ / (λ + τ) is what is withheld of each, so that P = (I + C / τ)⁻¹. Of a direction in which the inputs
are usually large nearly nothing is left to train, of one that they never take all. The gradient in D is Gᵀ (X P): the
step is the one that is taken without P, on other inputs, and it never forms a matrix [d, d].
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

_SMALLEST = 0.02  # of s: what is withheld of other directions is not worth their columns


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
        """The P that withholds a share of the directions: τ is where Σ s = share · d.

        A share of the directions, because a share of C's energy may be one direction (Gemma 3) or a hundred.

        Args:
            values: [d] fp64, the eigenvalues of C; `vectors` [d, d] are its eigenvectors, the columns.
        """
        values = values.clamp(min=0)
        low, high = values.max() * 2.0**-80, values.max() * 2.0**10
        for _ in range(100):  # the sum falls with τ
            middle = (low * high).sqrt()
            too_many = (values / (values + middle)).sum() > share * len(values)
            low, high = torch.where(too_many, middle, low), torch.where(too_many, high, middle)
        shares = values / (values + high)
        kept = shares > _SMALLEST
        return cls(vectors[:, kept].float().contiguous(), shares[kept].float())

    def of_rows(self, x: Tensor) -> Tensor:
        """x P of rows x [..., d]."""
        return x - self._withheld(x) @ self.basis.T.to(x.dtype)

    def _withheld(self, x: Tensor) -> Tensor:
        """x U diag(s) [..., r]."""
        return (x @ self.basis.to(x.dtype)) * self.shares.to(x.dtype)

    @contextmanager
    def around(self, module: nn.Module) -> Iterator[None]:
        """Inside, a linear map of weight M computes W x + (M − W) P x (+ bias); W is its weight on entry."""
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
