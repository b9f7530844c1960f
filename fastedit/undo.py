"""What it takes to get weights back from an edited checkpoint, bit for bit.

Subtracting an update gives the weights up to a rounding. Those that differ then are kept, or all of a matrix if that
is smaller. The update is subtracted in fp64, so that every machine finds the same ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fastedit.tensorfile import checksums, load_tensors, save_tensors
from fastedit.weights import LowRank, Update

_TAG, _WHAT = "fastedit-undo-1", "what takes an edit back"
_AT, _WAS = "..at", "..was"  # no parameter's path has two dots in a row
_CHUNK = 2**22  # weights at once


@torch.no_grad()
def subtracted(weight: Tensor, update: Update) -> Tensor:
    """The weight without the update, rounded once to its dtype."""
    found = torch.empty_like(weight, memory_format=torch.contiguous_format)
    step = max(1, _CHUNK // max(1, weight[0].numel()))
    for i in range(0, len(weight), step):
        rows = slice(i, i + step)
        part = (
            update.left[rows].double() @ update.right.double() if isinstance(update, LowRank) else update[rows].double()
        )
        found[rows] = (weight[rows].double() - part.to(weight.device)).to(weight.dtype)
    return found


class Undo:
    """The weights that subtracting an edit would not give back, and the checksums of all that it changed.

    Attributes:
        originals: path of each parameter -> checksum of its weights before the edit.
        edit: path of each parameter -> checksums of its update.
    """

    def __init__(self) -> None:
        self.originals: dict[str, str] = {}
        self.edit: dict[str, list[str]] = {}
        self._kept: dict[str, Tensor] = {}

    @torch.no_grad()
    def keep(self, path: str, before: Tensor, after: Tensor, update: Update) -> None:
        """Note what the update of one parameter loses."""
        wanted = before.detach().contiguous()
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[wanted.itemsize]
        found = subtracted(after.detach().to(wanted.dtype), update)
        at = (found.view(bits) != wanted.view(bits)).reshape(-1).nonzero()[:, 0]
        places = at.to(torch.int32 if wanted.numel() < 2**31 else torch.int64).cpu()
        if after.dtype == wanted.dtype and places.nbytes + len(at) * wanted.itemsize < wanted.nbytes:
            self._kept |= {path + _AT: places, path + _WAS: wanted.reshape(-1)[at].cpu()}
        else:
            self._kept[path + _WAS] = wanted.cpu()
        self.originals |= checksums({path: wanted})
        self.edit[path] = _identity(update)

    def belongs_to(self, updates: Mapping[str, Update]) -> bool:
        """Whether it is that of exactly these updates."""
        return self.edit == {path: _identity(update) for path, update in updates.items()}

    @torch.no_grad()
    def restored(self, path: str, weight: Tensor, update: Update) -> Tensor:
        """The weights of one parameter before the edit, if `weight` is what it was right after it; see `originals`."""
        was = self._kept[path + _WAS]
        if path + _AT not in self._kept:
            return was
        found = subtracted(weight, update)
        found.view(-1)[self._kept[path + _AT].long()] = was.to(found.dtype)
        return found

    def save(self, path: str | Path) -> None:
        """Write it to a file. Raises FileError."""
        save_tensors(path, self._kept, _TAG, {"originals": self.originals, "edit": self.edit}, _WHAT)

    @classmethod
    def load(cls, path: str | Path) -> Undo:
        """Read it from a file. Raises FileError."""
        undo = cls()
        undo._kept, metadata, _ = load_tensors(path, [_TAG], _WHAT)
        undo.originals, undo.edit = dict(metadata.get("originals", {})), dict(metadata.get("edit", {}))
        return undo


def _identity(update: Update) -> list[str]:
    parts = {"left": update.left, "right": update.right} if isinstance(update, LowRank) else {"": update}
    return list(checksums(parts).values())


def undo_of(before: Mapping[str, Tensor], after: Mapping[str, Tensor], updates: Mapping[str, Update]) -> Undo:
    """That of an edit which a model holds."""
    undo = Undo()
    for path, update in updates.items():
        undo.keep(path, before[path], after[path], update)
    return undo
