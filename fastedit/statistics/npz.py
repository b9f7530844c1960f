"""Published files of second moments (.npz), as ROME's and MEMIT's code reads and writes them."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastedit.errors import FileError
from fastedit.tensorfile import writing

_CONSTRUCTOR = "util.runningstats.SecondMoment()"  # as in published files
_ASYMMETRY = 1e-3  # relative to the geometric mean of the two diagonal values; fp32 sums stay far below


def save_npz(path: str | Path, total: Tensor, count: int, sample_size: int) -> None:
    """Write the sum [d, d] of k kᵀ over `count` tokens of `sample_size` documents, in fp32.

    Raises:
        FileError: the file cannot be written.
    """
    entries = {"constructor": np.array(_CONSTRUCTOR), "count": np.array(count), "mom2": total.float().cpu().numpy()}
    prefixed: dict[str, Any] = {f"mom2.{name}": entry for name, entry in entries.items()}
    with writing(path, "the statistics could not be saved") as temporary, temporary.open("wb") as file:
        np.savez(file, **prefixed, sample_size=np.array(sample_size))


def load_npz(path: str | Path) -> tuple[Tensor, int, int | None]:
    """Read entries mom2.mom2, the sum [d, d], mom2.count and, if it is there, sample_size.

    Raises:
        FileError: the file is missing, truncated, without these entries, or with pickled objects (which are never
            loaded); or its sum is not square, not finite or not symmetric.
    """
    try:
        with np.load(path, allow_pickle=False) as entries:
            total, count = torch.from_numpy(entries["mom2.mom2"]), int(entries["mom2.count"])
            size = int(entries["sample_size"]) if "sample_size" in entries else None
    except (OSError, EOFError, zipfile.BadZipFile) as error:
        raise FileError(path, f"not a readable .npz file: {error}") from error
    except (KeyError, TypeError, ValueError) as error:  # numpy raises ValueError for pickled entries
        raise FileError(path, f"not a published file of second moments: {error}") from error
    if total.ndim != 2 or total.shape[0] != total.shape[1] or not total.is_floating_point() or count < 1:
        raise FileError(
            path,
            f"mom2.mom2 is {list(total.shape)} {total.dtype} of {count} tokens, expected a sum [d, d] of "
            "floating point over some tokens",
        )
    scale = total.diagonal().clamp_min(0).sqrt()
    if not total.isfinite().all():
        raise FileError(path, "mom2.mom2 holds values that are not finite")
    if ((total - total.T).abs_() > _ASYMMETRY * scale * scale[:, None]).any():
        raise FileError(path, "mom2.mom2 is not symmetric, as a sum of k kᵀ is")
    return total, count, size
