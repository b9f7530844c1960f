"""Weights of a model: updates, how they are oriented and added, and snapshots that put weights back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fastedit.errors import TensorError
from fastedit.tensorfile import checksum


@dataclass(frozen=True, eq=False)
class LowRank:
    """An update ``left @ right`` of a parameter [m, n]: left [m, k] and right [k, n], both fp32.

    It has the orientation of its parameter: for a Conv1D, whose weight is [in, out], ``left`` is [in, k].

    Raises:
        TensorError: the factors are not matrices that can be multiplied.
    """

    left: Tensor
    right: Tensor

    def __post_init__(self) -> None:
        if self.left.ndim != 2 or self.right.ndim != 2 or self.left.shape[1] != self.right.shape[0]:
            shapes = f"{tuple(self.left.shape)} and {tuple(self.right.shape)}"
            raise TensorError(f"factors of shapes {shapes} have no product; expected [m, k] and [k, n]")

    @property
    def shape(self) -> torch.Size:
        """The shape of the parameter."""
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


def summed(updates: Sequence[Update]) -> Update:
    """The sum of several updates of one parameter, whatever their order.

    Factors stay factors: they are put side by side.
    """
    if len(updates) == 1:
        return updates[0]
    ordered = sorted(updates, key=lambda update: checksum(update.left if isinstance(update, LowRank) else update))
    low_rank = [update.to("cpu") for update in ordered if isinstance(update, LowRank)]
    factors = (
        LowRank(torch.cat([u.left for u in low_rank], 1), torch.cat([u.right for u in low_rank])) if low_rank else None
    )
    if factors and len(low_rank) == len(ordered):
        return factors
    total = torch.zeros(updates[0].shape, dtype=torch.float64)
    for update in ordered:
        total += update.dense().cpu() if isinstance(update, LowRank) else update.cpu()
    return total.float()


def inner(one: Update, other: Update) -> float:
    """The inner product of two updates of one parameter, in fp64; factors are not multiplied out."""
    if isinstance(other, LowRank):
        if not isinstance(one, LowRank):
            return float(((one.cpu().double() @ other.right.cpu().double().T) * other.left.cpu()).sum())
        left, right = one.left.cpu().double().T @ other.left.cpu().double(), one.right.cpu().double()
        return float((left * (right @ other.right.cpu().double().T)).sum())
    return inner(other, one) if isinstance(one, LowRank) else float((one.cpu().double() * other.cpu().double()).sum())


def norm(update: Update) -> float:
    """The Frobenius norm."""
    return math.sqrt(max(inner(update, update), 0.0))


def truncated(update: Update, rank: int) -> tuple[LowRank, float]:
    """The nearest update of at most this rank, and its relative error: norm of the difference over norm of the update.

    For factors [m, k] and [k, n] the SVD is of a [k, k] matrix. For a dense matrix the smaller Gram matrix is
    decomposed.
    """
    if isinstance(update, LowRank):
        (q, a), (p, b) = (torch.linalg.qr(f.cpu().double()) for f in (update.left, update.right.T))
        u, sizes, v = torch.linalg.svd(a @ b.T, full_matrices=False)
        left, right = q @ u[:, :rank], (sizes[:, None] * v)[:rank] @ p.T
    else:
        matrix = update.cpu().double()
        wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
        squares, u = torch.linalg.eigh(wide @ wide.T)
        sizes, left = squares.flip(0).clamp_min(0).sqrt(), u.flip(1)[:, :rank]
        right = left.T @ wide
        if wide is not matrix:
            left, right = right.T, left.T
    squared_norm = float(sizes.square().sum())
    error = math.sqrt(float(sizes[rank:].square().sum()) / squared_norm) if squared_norm else 0.0
    return LowRank(left.float().contiguous(), right.float().contiguous()), error


def oriented(module: nn.Module, left: Tensor, right: Tensor) -> LowRank:
    """ΔW = left [h, k] @ right [k, d] of the map y = W x as an update of its weight, which Conv1D stores transposed."""
    return LowRank(right.T, left.T) if isinstance(module, Conv1D) else LowRank(left, right)


@torch.no_grad()
def put_back(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Set the parameters at these paths to these values, bit for bit."""
    for path, value in values.items():
        parameters[path].copy_(value)


class Snapshot:
    """A copy of parameters, to put them back bit for bit.

    As a context manager it puts them back if its block fails, on Ctrl-C too.

    Args:
        parameters: path -> parameter.
        always: put them back also if the block succeeds.
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
