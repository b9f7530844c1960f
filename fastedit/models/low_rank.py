"""Updates of parameters that are kept as the factors of a product, and how any update is added."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LowRank:
    """An update ``left @ right`` of a parameter [m, n]: left [m, k] and right [k, n], both fp32.

    It is oriented as its parameter is: for a Conv1D, whose weight is [in, out], ``left`` is [in, k].

    Raises:
        ValueError: the factors are no matrices that can be multiplied.
    """

    left: Tensor
    right: Tensor

    def __post_init__(self) -> None:
        if self.left.ndim != 2 or self.right.ndim != 2 or self.left.shape[1] != self.right.shape[0]:
            shapes = f"{tuple(self.left.shape)} and {tuple(self.right.shape)}"
            raise ValueError(f"factors of shapes {shapes} have no product; expected [m, k] and [k, n]")

    @property
    def shape(self) -> torch.Size:
        """That of the parameter."""
        return torch.Size((self.left.shape[0], self.right.shape[1]))

    def dense(self) -> Tensor:
        """The product [m, n] in fp32."""
        return self.left @ self.right

    def to(self, device: torch.device | str) -> LowRank:
        """The same factors on a device."""
        return LowRank(self.left.to(device), self.right.to(device))


Update = Tensor | LowRank


@torch.no_grad()
def add_(parameter: Tensor, update: Update) -> None:
    """Add an update of the parameter's shape, in fp32 (in fp64 to fp64), rounded once to the parameter's dtype."""
    wide = torch.promote_types(parameter.dtype, torch.float32)
    update = update.to(parameter.device)
    if isinstance(update, LowRank):
        parameter.copy_(torch.addmm(parameter.to(wide), update.left.to(wide), update.right.to(wide)))
    else:
        parameter.copy_(parameter.to(wide) + update)
