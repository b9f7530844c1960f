"""A matrix in a file, read and written in runs of consecutive rows.

A memory map would need less code. But if the file is larger than the free memory, every page fault waits for a few KiB:
batches of samples were read thirty times as fast in runs.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from fastedit.errors import ModelError


class RowsFile:
    """Rows [T, width] of zeros in a new file without a name, so that its space is freed however the process ends.

    The space is reserved now, so that a full disk is an error here and not later.

    Raises:
        ModelError: the file does not fit on its disk.
    """

    def __init__(self, size: tuple[int, int], dtype: torch.dtype, directory: Path) -> None:
        self.size, self.dtype, self._row = size, dtype, size[1] * dtype.itemsize
        self.nbytes = size[0] * self._row
        path = None
        try:
            descriptor, path = tempfile.mkstemp(prefix="fastedit-prefix-", dir=directory)
            self._file = os.fdopen(descriptor, "r+b", buffering=0)
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(descriptor, 0, self.nbytes)
            elif shutil.disk_usage(directory).free < self.nbytes:
                raise OSError("no space left on the disk")
            else:
                self._file.truncate(self.nbytes)
        except OSError as error:
            raise ModelError(
                f"the prefix cache needs {self.nbytes} bytes in {directory}: {error.strerror or error}; free the "
                "space, or give the budget another directory or more host memory"
            ) from error
        finally:
            if path is not None:
                with suppress(OSError):
                    os.unlink(path)

    def read(self, rows: Tensor, *, pinned: bool = False) -> Tensor:
        """The rows at some ascending places [N], as a tensor [N, width] in host memory."""
        values = torch.empty((len(rows), self.size[1]), dtype=self.dtype, pin_memory=pinned)
        self._move(os.preadv, rows, values)
        return values

    def write(self, rows: Tensor, values: Tensor) -> None:
        """Set the rows at some ascending places [N] to values [N, width] in host memory."""
        self._move(os.pwritev, rows, values.contiguous())

    def ahead(self, begin: Tensor, end: Tensor) -> None:
        """Ask the system to prefetch the rows from ``begin`` [N] to ``end`` [N]."""
        if hasattr(os, "posix_fadvise"):
            for first, last in zip((begin * self._row).tolist(), (end * self._row).tolist(), strict=True):
                os.posix_fadvise(self._file.fileno(), first, last - first, os.POSIX_FADV_WILLNEED)

    def _move(self, call: Callable[[int, list[memoryview], int], int], rows: Tensor, values: Tensor) -> None:
        content = values.view(torch.uint8).view(-1).numpy().data
        for offset, first, n in _runs(rows):
            remaining, at = content[offset * self._row : (offset + n) * self._row], first * self._row
            while remaining:
                moved = call(self._file.fileno(), [remaining], at)
                if not moved:
                    raise ModelError("the file of the prefix cache is shorter than it was made; is its disk damaged?")
                remaining, at = remaining[moved:], at + moved


def _runs(rows: Tensor) -> Iterator[tuple[int, int, int]]:
    """(place among `rows`, first row, number of rows) of each run of consecutive rows."""
    if not len(rows):
        return
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), (rows.diff() != 1).nonzero()[:, 0] + 1])
    lengths = torch.cat([starts, torch.tensor([len(rows)])]).diff()
    yield from zip(starts.tolist(), rows[starts].tolist(), lengths.tolist(), strict=True)
