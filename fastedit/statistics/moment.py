"""The second moment of keys: a streaming accumulator that can be saved, loaded and continued.

C is the mean of k kᵀ over the tokens of some text (ROME, arXiv 2202.05262, section 3.1; MEMIT, arXiv 2210.07229,
section 4.2). Sums are fp64 for rows of any dtype, because fp32 loses digits if the mean is far from zero.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

from fastedit.errors import FileError, ModelError, TensorError
from fastedit.ops.syrk import LARGEST_VALUE, syrk_
from fastedit.statistics.npz import load_npz, save_npz
from fastedit.tensorfile import load_tensors, save_tensors

TAG, LOWER = "fastedit-covariance-1", "lower"
WHAT = "a second moment of fastedit"


class StreamingCovariance:
    """The sum of x xᵀ over rows x [dim] that arrive in pieces, and the number of rows.

    `count` is the number of rows so far. `metadata` is saved in the file as JSON; from `collect` it says which model,
    layer, module and text the rows come from. Only the lower triangle is computed.

    Args:
        dim: width of a row.
        device: device of the fp64 sum [dim, dim]; rows have to be on it, too.
    """

    def __init__(
        self, dim: int, *, device: torch.device | str | None = None, metadata: Mapping[str, Any] | None = None
    ) -> None:
        if dim < 1:
            raise TensorError(f"a second moment of width {dim}: expected the width of the keys, 1 or more")
        self.dim, self.count, self.metadata = dim, 0, dict(metadata or {})
        self.stored = torch.float64  # precision of the sums, or of the file that they were read from
        self._total = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    @property
    def device(self) -> torch.device:
        return self._total.device

    @torch.no_grad()
    def update(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Add the rows x [T, dim] (fp32, bf16 or fp16, any strides) for which mask [T] (bool) is true.

        Raises:
            TensorError: a wrong width, device or dtype, or one of these rows has NaN or infinity (names it). Nothing
                is added then.
        """
        if x.device.type != "cpu":  # on a GPU `syrk_` does not check, because that would wait for the result
            bad = ~(torch.linalg.vector_norm(x, torch.inf, dim=1, dtype=torch.float32) <= LARGEST_VALUE)
            if mask is not None:
                bad &= mask
            if bad.any():
                raise TensorError(f"row {int(bad.nonzero()[0])} is not finite, or larger than {LARGEST_VALUE:.1e}")
        syrk_(self._total, x, mask)
        self.count += len(x) if mask is None else int(mask.sum())

    def merge(self, other: StreamingCovariance) -> None:
        """Add the sum of another accumulator.

        Raises:
            TensorError: it has another width. ModelError: it is of another model, layer or module. Nothing is added.
        """
        if other.dim != self.dim:
            raise TensorError(f"a second moment of width {other.dim} cannot join one of width {self.dim}")
        for name in ("fingerprint", "layer", "module"):
            ours, theirs = self.metadata.get(name), other.metadata.get(name)
            if None not in (ours, theirs) and ours != theirs:
                raise ModelError(f"a second moment of {name} {theirs} cannot join one of {name} {ours}")
        self._total += other._total.to(self.device)
        self.count += other.count

    def all_reduce(self) -> None:
        """Sum over all processes of torch.distributed; afterwards all hold the same sum."""
        count = torch.tensor(self.count, device=self.device)
        distributed.all_reduce(self._total)
        distributed.all_reduce(count)
        self.count = int(count)

    @torch.no_grad()
    def finalize(self) -> Tensor:
        """C [dim, dim] fp64, the mean of x xᵀ, on the accumulator's device; more rows may be added afterwards.

        Raises:
            TensorError: no rows were added.
        """
        if not self.count:
            raise TensorError("no rows were added: a second moment has to be of some tokens")
        C = self._total / self.count  # its upper triangle is still zero
        C += C.tril(-1).T
        return C

    def save(self, path: str | Path, *, dtype: torch.dtype = torch.float64) -> None:
        """Write a safetensors file: the sum's lower triangle row by row, the count, the metadata.

        An existing file stays whole if writing fails.

        Args:
            dtype: dtype of the sum in the file. From fp32 (half the size) a run cannot be resumed bit for bit.

        Raises:
            FileError: the file cannot be written (a full disk, say).
        """
        packed = pack_lower(self._total).to(dtype)
        header = {
            "count": self.count,
            "dim": self.dim,
            "metadata": self.metadata,
            "digest": _digest(packed, self.count),
        }
        save_tensors(path, {LOWER: packed}, TAG, header, "the statistics")

    @classmethod
    def load(cls, path: str | Path, *, device: torch.device | str | None = None) -> StreamingCovariance:
        """Read a file written by `save`, or a published one (.npz).

        Raises:
            FileError: the file is missing, truncated, changed since it was written, or of another kind.
        """
        if Path(path).suffix == ".npz":
            return cls._from_npz(path, device)
        tensors, header, _ = load_tensors(path, (TAG,), WHAT)
        try:
            packed, count, dim = tensors[LOWER], int(header["count"]), int(header["dim"])
            moment = cls(dim, device=device, metadata=header["metadata"])
            intact = header["digest"] == _digest(packed, count) and packed.numel() == dim * (dim + 1) // 2
        except (KeyError, TypeError, ValueError) as error:
            raise FileError(path, f"its header is damaged ({error!r}); collect the statistics again") from error
        if not intact:
            raise FileError(path, "{path} was changed since it was written; collect the statistics again")
        if count and not packed.isfinite().all():
            raise FileError(path, "{path} holds values that are not finite; collect the statistics again")
        moment.count, moment.stored = count, packed.dtype
        moment._total = unpack_lower(packed, dim).to(moment.device, torch.float64)
        return moment

    @classmethod
    def _from_npz(cls, path: str | Path, device: torch.device | str | None) -> StreamingCovariance:
        total, count, documents = load_npz(path)
        moment = cls(len(total), device=device, metadata={} if documents is None else {"documents": documents})
        moment.count, moment.stored = count, total.dtype
        moment._total = total.to(moment.device, torch.float64).tril_()
        return moment

    def save_npz(self, path: str | Path, *, sample_size: int | None = None) -> None:
        """Write the file that ROME's and MEMIT's published code reads: the sum [dim, dim] in fp32, not the mean.

        Args:
            sample_size: the number of documents, which that code compares with the one it asks for; by default the
                number that was read.

        Raises:
            FileError: the file cannot be written.
        """
        size = self.metadata.get("documents", 0) if sample_size is None else sample_size
        save_npz(path, self._total + self._total.tril(-1).T, self.count, size)


def pack_lower(matrix: Tensor) -> Tensor:
    """The lower triangle of a matrix [d, d], row by row, [d (d + 1) / 2], on the CPU."""
    rows = matrix.cpu()
    return torch.cat([row[: i + 1] for i, row in enumerate(rows)])


def unpack_lower(packed: Tensor, dim: int) -> Tensor:
    """The matrix [d, d] from what `pack_lower` returned, with zeros above the diagonal."""
    matrix = packed.new_zeros(dim, dim)
    for i, row in enumerate(packed.split(list(range(1, dim + 1)))):
        matrix[i, : i + 1] = row
    return matrix


def _digest(packed: Tensor, count: int) -> str:
    digest = hashlib.sha256(f"{count} ".encode())
    digest.update(packed.numpy().data)
    return digest.hexdigest()
