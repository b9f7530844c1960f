"""Undo files, which restore the weights of an edited checkpoint bit for bit.

Subtracting an update restores the weights up to rounding. An undo file keeps the weights that come out different, or
the whole matrix if that is smaller. The subtraction is in fp64, so that every machine finds the same ones.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastedit.errors import FileError, listed
from fastedit.tensorfile import checksums, load_tensors, save_tensors
from fastedit.weights import LowRank, Update

UNDO = "delta.undo"
"""The file in a checkpoint that undoes its last edit. Not *.safetensors, which some programs would read as weights."""
_EARLIER = re.compile(r"delta-(\d+)\.undo")  # of the edits before the last one; 1 is the first

_TAG, _WHAT = "fastedit-undo-1", "what takes an edit back"
_AT, _WAS = "..at", "..was"  # no parameter's path has two dots in a row
_CHUNK = 2**22  # weights that are subtracted at once


@torch.no_grad()
def subtracted(weight: Tensor, update: Update) -> Tensor:
    """The weight [m, …] without its update, of the same shape, rounded once to the dtype of the weight."""
    result = torch.empty_like(weight, memory_format=torch.contiguous_format)
    step = max(1, _CHUNK // max(1, weight[0].numel()))
    for i in range(0, len(weight), step):
        rows = slice(i, i + step)
        change = (
            update.left[rows].double() @ update.right.double() if isinstance(update, LowRank) else update[rows].double()
        )
        result[rows] = (weight[rows].double() - change.to(weight.device)).to(weight.dtype)
    return result


class Undo:
    """The weights that subtracting an edit does not restore, and checksums of everything that it changed.

    Attributes:
        originals: path of each parameter -> checksum of its weights before the edit.
        edit: path of each parameter -> checksums of its update.
        edited: path of each parameter that is kept whole -> checksum of its weights right after the edit.
    """

    def __init__(self) -> None:
        self.originals: dict[str, str] = {}
        self.edit: dict[str, list[str]] = {}
        self.edited: dict[str, str] = {}
        self._tensors: dict[str, Tensor] = {}

    @torch.no_grad()
    def keep(self, path: str, before: Tensor, after: Tensor, update: Update) -> None:
        """Keep what subtracting the update of one parameter [m, …] would not restore; all three have its shape."""
        original = before.detach().contiguous()
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[original.itemsize]
        restored = subtracted(after.detach().to(original.dtype), update)
        at = (restored.view(bits) != original.view(bits)).reshape(-1).nonzero()[:, 0]
        places = at.to(torch.int32 if original.numel() < 2**31 else torch.int64).cpu()
        if after.dtype == original.dtype and places.nbytes + len(at) * original.itemsize < original.nbytes:
            self._tensors |= {path + _AT: places, path + _WAS: original.reshape(-1)[at].cpu()}
        else:
            self._tensors[path + _WAS] = original.cpu()
            self.edited |= checksums({path: after})
        self.originals |= checksums({path: original})
        self.edit[path] = identity(update)

    def belongs_to(self, updates: Mapping[str, Update]) -> bool:
        """Whether it was made for exactly these updates."""
        return self.edit == {path: identity(update) for path, update in updates.items()}

    @torch.no_grad()
    def restored(self, path: str, weight: Tensor, update: Update) -> Tensor | None:
        """The weights [m, …] of one parameter before the edit; None if `weight` is not as the edit left it."""
        was = self._tensors[path + _WAS]
        if path + _AT not in self._tensors:
            return was if checksums({path: weight})[path] == self.edited.get(path) else None
        restored, at = subtracted(weight, update), self._tensors[path + _AT].long()
        if len(at) and not 0 <= int(at.min()) <= int(at.max()) < restored.numel():
            return None
        restored.view(-1)[at] = was.to(restored.dtype)
        return restored if checksums({path: restored})[path] == self.originals[path] else None

    def save(self, path: str | Path) -> None:
        """Write it to a file. Raises FileError."""
        metadata = {"originals": self.originals, "edit": self.edit, "edited": self.edited}
        save_tensors(path, self._tensors, _TAG, metadata, _WHAT)

    @classmethod
    def load(cls, path: str | Path) -> Undo:
        """Read it from a file. Raises FileError if the file is missing or damaged."""
        undo = cls()
        undo._tensors, metadata, _ = load_tensors(path, [_TAG], _WHAT)
        parts: list[Any] = [metadata.get(name) for name in ("originals", "edit", "edited")]
        if not all(isinstance(part, dict) for part in parts):
            raise FileError(path, f"{_WHAT} is damaged (its notes are not those of an edit)")
        undo.originals, undo.edit, undo.edited = parts
        if wrong := sorted({*undo.originals, *undo.edit} - {path for path in undo.edit if undo._is_whole(path)}):
            raise FileError(path, f"{_WHAT} is damaged ({len(wrong)} parameters are not as noted: {listed(wrong)})")
        return undo

    def _is_whole(self, path: str) -> bool:
        """Whether the tensors that are kept of a parameter agree with its notes."""
        was, at = self._tensors.get(path + _WAS), self._tensors.get(path + _AT)
        if was is None or path not in self.originals:
            return False
        if at is None:
            return path in self.edited and checksums({path: was})[path] == self.originals[path]
        return at.ndim == 1 and at.shape == was.shape and at.dtype in (torch.int32, torch.int64)


def identity(update: Update) -> list[str]:
    """Checksums of an update."""
    parts = {"left": update.left, "right": update.right} if isinstance(update, LowRank) else {"": update}
    return list(checksums(parts).values())


def undo_files(folder: Path) -> list[Path]:
    """The undo files of a checkpoint, its last edit's first."""
    earlier = {int(match[1]): path for path in folder.glob("*.undo") if (match := _EARLIER.fullmatch(path.name))}
    files = [folder / UNDO, *(earlier[n] for n in sorted(earlier, reverse=True))]
    return [path for path in files if path.is_file()]


def copy_undo_files(files: Sequence[Path], folder: Path, *, below: bool) -> None:
    """Copy the undo files of the edits that a new checkpoint still holds.

    Args:
        files: in the order of `undo_files`.
        below: whether another edit is made on top of them, so that `UNDO` will be its file.
    """
    names = [f"delta-{n}.undo" for n in range(len(files) - (not below), 0, -1)]
    for path, name in zip(files, names if below else [UNDO, *names], strict=False):
        shutil.copyfile(path, folder / name)


def undo_of(before: Mapping[str, Tensor], after: Mapping[str, Tensor], updates: Mapping[str, Update]) -> Undo:
    """Make the undo of an edit that a model holds."""
    undo = Undo()
    for path, update in updates.items():
        undo.keep(path, before[path], after[path], update)
    return undo
