"""Weights of a model: updates, how they are oriented and added, and snapshots that put weights back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True, eq=False)
class LowRank:
    """An update ``left @ right`` of a parameter [m, n]: left [m, k] and right [k, n], both fp32.

    It is oriented as its parameter is: for a Conv1D, whose weight is [in, out], ``left`` is [in, k].

    Raises:
        ValueError: the factors are not matrices that can be multiplied.
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


def oriented(module: nn.Module, left: Tensor, right: Tensor) -> LowRank:
    """ΔW = left [h, k] @ right [k, d] of the linear map y = W x as an update of the weight, which Conv1D transposes."""
    return LowRank(right.T, left.T) if isinstance(module, Conv1D) else LowRank(left, right)


@torch.no_grad()
def put_back(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Give the parameters at some paths these values, bit for bit."""
    for path, value in values.items():
        parameters[path].copy_(value)


class Snapshot:
    """Parameters as they are now, to be put back bit for bit.

    As a context manager it puts them back when its block fails, on Ctrl-C too.

    Args:
        parameters: by path.
        always: put them back when the block ends well, too.
    """

    def __init__(self, parameters: Mapping[str, Tensor], *, always: bool = False) -> None:
        self._parameters, self._always = dict(parameters), always
        self.values = {path: parameter.detach().clone() for path, parameter in parameters.items()}

    def restore(self) -> None:
        """Put the parameters back, bit for bit."""
        put_back(self._parameters, self.values)

    def __enter__(self) -> Snapshot:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None or self._always:
            self.restore()
