"""The second moment of keys: an accumulator that streams, stops, goes on, and is kept in a file.

C is the mean of k kᵀ over the tokens of some text (ROME, arXiv 2202.05262, section 3.1; MEMIT, arXiv 2210.07229,
section 4.2). Sums are fp64 whatever the rows are: a mean far from zero costs fp32 its digits.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, distributed

from fastedit.errors import ModelError
from fastedit.files import replacing
from fastedit.ops.syrk import LARGEST, syrk_

_FORMAT = "fastedit-covariance-1"
_CONSTRUCTOR = "util.runningstats.SecondMoment()"  # what published files say of themselves
_ASYMMETRY = 1e-3  # of the geometric mean of the diagonal's two values; sums in fp32 stay far below


class StreamingCovariance:
    """The sum of x xᵀ over rows x [dim] that arrive in pieces, and their number.

    `count` is the number of rows so far. `metadata` is JSON-able and goes into the file: of which model, layer,
    module and text the rows are, when `collect` made it. Only the lower triangle is ever computed.

    Args:
        dim: width of a row.
        device: of the sum [dim, dim], fp64; rows have to be there too.
    """

    def __init__(
        self, dim: int, *, device: torch.device | str | None = None, metadata: Mapping[str, Any] | None = None
    ) -> None:
        if dim < 1:
            raise ModelError(f"a second moment of width {dim}: expected the width of the keys, 1 or more")
        self.dim, self.count, self.metadata = dim, 0, dict(metadata or {})
        self.stored = torch.float64  # the precision of the sums: that of the file they were read from
        self._total = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    @property
    def device(self) -> torch.device:
        return self._total.device

    @torch.no_grad()
    def update(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Add rows x [T, dim] (fp32, bf16 or fp16, any strides), those that mask [T] (bool) keeps.

        Raises:
            ModelError: another width, device or dtype than expected, or a kept row with NaN or an infinity (it is
                named). Nothing is added then.
        """
        if x.device.type != "cpu":  # there `syrk_` does not look, since somebody has to wait for the answer
            bad = ~(torch.linalg.vector_norm(x, torch.inf, dim=1, dtype=torch.float32) <= LARGEST)
            if mask is not None:
                bad &= mask
            if bad.any():
                raise ModelError(f"row {int(bad.nonzero()[0])} is not finite, or larger than {LARGEST:.1e}")
        syrk_(self._total, x, mask)
        self.count += len(x) if mask is None else int(mask.sum())

    def merge(self, other: StreamingCovariance) -> None:
        """Add what another accumulator has seen.

        Raises:
            ModelError: of another width, model, layer or module. Nothing is added.
        """
        if other.dim != self.dim:
            raise ModelError(f"a second moment of width {other.dim} cannot join one of width {self.dim}")
        for name in ("fingerprint", "layer", "module"):
            ours, theirs = self.metadata.get(name), other.metadata.get(name)
            if None not in (ours, theirs) and ours != theirs:
                raise ModelError(f"a second moment of {name} {theirs} cannot join one of {name} {ours}")
        self._total += other._total.to(self.device)
        self.count += other.count

    def all_reduce(self) -> None:
        """Add what the other processes of torch.distributed have seen; all hold the same sum then."""
        count = torch.tensor(self.count, device=self.device)
        distributed.all_reduce(self._total)
        distributed.all_reduce(count)
        self.count = int(count)

    @torch.no_grad()
    def finalize(self) -> Tensor:
        """C [dim, dim] fp64, the mean of x xᵀ, on the accumulator's device; the accumulator can go on.

        Raises:
            ModelError: no rows.
        """
        if not self.count:
            raise ModelError("no rows were added: a second moment has to be of some tokens")
        C = self._total / self.count  # its upper triangle is still zero
        C += C.tril(-1).T
        return C

    def save(self, path: str | Path, *, dtype: torch.dtype = torch.float64) -> None:
        """Write a safetensors file: the sum's lower triangle row by row, the count, the metadata.

        An existing file stays whole if writing fails.

        Args:
            dtype: of the sum in the file. With fp32 (half the size) a run cannot be resumed bit for bit.

        Raises:
            ModelError: the file cannot be written (a full disk, say).
        """
        packed = pack_lower(self._total).to(dtype)
        about = {"count": self.count, "dim": self.dim, "metadata": self.metadata, "digest": _digest(packed, self.count)}
        write_tensor(Path(path), packed, _FORMAT, about)

    @classmethod
    def load(cls, path: str | Path, *, device: torch.device | str | None = None) -> StreamingCovariance:
        """Read a file written by `save`, or a published one (.npz).

        Raises:
            ModelError: missing, truncated, changed since it was written, or something else.
        """
        if Path(path).suffix == ".npz":
            return load_npz(path, device=device)
        packed, about = read_tensor(Path(path), _FORMAT, "a second moment of fastedit")
        try:
            count, dim = int(about["count"]), int(about["dim"])
            found = cls(dim, device=device, metadata=about["metadata"])
            whole = about["digest"] == _digest(packed, count) and packed.numel() == dim * (dim + 1) // 2
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{path}: its header is damaged ({error!r}); collect the statistics again") from error
        if not whole:
            raise ModelError(f"{path} was changed since it was written; collect the statistics again")
        if count and not packed.isfinite().all():
            raise ModelError(f"{path} holds values that are not finite; collect the statistics again")
        found.count, found.stored = count, packed.dtype
        found._total = unpack_lower(packed, dim).to(found.device, torch.float64)
        return found

    def save_npz(self, path: str | Path, *, sample_size: int | None = None) -> None:
        """Write the file that ROME's and MEMIT's published code reads: the sum [dim, dim] in fp32, not the mean.

        Args:
            sample_size: of which that code checks that it is the number of documents asked for; by default the
                number that was read.

        Raises:
            ModelError: the file cannot be written.
        """
        total = (self._total + self._total.tril(-1).T).float().cpu().numpy()
        size = self.metadata.get("documents", 0) if sample_size is None else sample_size
        entries = {"constructor": np.array(_CONSTRUCTOR), "count": np.array(self.count), "mom2": total}
        named: dict[str, Any] = {f"mom2.{name}": entry for name, entry in entries.items()}
        try:
            with replacing(Path(path)) as temporary, temporary.open("wb") as file:
                np.savez(file, **named, sample_size=np.array(size))
        except OSError as error:
            raise ModelError(f"{path}: the statistics could not be saved: {error}; nothing was written") from error


def load_npz(path: str | Path, *, device: torch.device | str | None = None) -> StreamingCovariance:
    """Read a published file of statistics: entries mom2.count and mom2.mom2, the sum [d, d].

    Raises:
        ModelError: missing, truncated, with pickled objects (which are never loaded), without these entries, or
            with a sum that is not square, not finite or not symmetric.
    """
    try:
        with np.load(path, allow_pickle=False) as entries:
            total, count = torch.from_numpy(entries["mom2.mom2"]), int(entries["mom2.count"])
            size = int(entries["sample_size"]) if "sample_size" in entries else None
    except (OSError, EOFError, zipfile.BadZipFile) as error:
        raise ModelError(f"{path}: not a readable .npz file: {error}") from error
    except (KeyError, TypeError, ValueError) as error:  # numpy's ValueError says so where entries are pickled
        raise ModelError(f"{path}: not a published file of second moments: {error}") from error
    if total.ndim != 2 or total.shape[0] != total.shape[1] or not total.is_floating_point() or count < 1:
        raise ModelError(
            f"{path}: mom2.mom2 is {list(total.shape)} {total.dtype} of {count} tokens, expected a sum [d, d] of "
            "floating point over some tokens"
        )
    size_of = total.diagonal().clamp_min(0).sqrt()
    if not total.isfinite().all():
        raise ModelError(f"{path}: mom2.mom2 holds values that are not finite")
    if ((total - total.T).abs_() > _ASYMMETRY * size_of * size_of[:, None]).any():
        raise ModelError(f"{path}: mom2.mom2 is not symmetric, as a sum of k kᵀ is")
    found = StreamingCovariance(len(total), device=device, metadata={} if size is None else {"documents": size})
    found.count, found.stored = count, total.dtype
    found._total = total.to(found.device, torch.float64).tril_()
    return found


def pack_lower(matrix: Tensor) -> Tensor:
    """The lower triangle of [d, d] row by row, [d (d + 1) / 2], on the CPU."""
    rows = matrix.cpu()
    return torch.cat([row[: i + 1] for i, row in enumerate(rows)])


def unpack_lower(packed: Tensor, dim: int) -> Tensor:
    """[d, d] with what `pack_lower` took, and zeros above the diagonal."""
    matrix = packed.new_zeros(dim, dim)
    for i, row in enumerate(packed.split(list(range(1, dim + 1)))):
        matrix[i, : i + 1] = row
    return matrix


def write_tensor(path: Path, tensor: Tensor, form: str, about: Mapping[str, Any]) -> None:
    """A safetensors file with one tensor, its format and what is to be said about it; whole or not at all.

    Raises:
        ModelError: it cannot be written.
    """
    try:
        with replacing(path) as temporary:
            save_file({"lower": tensor}, temporary, {"format": form, "fastedit": json.dumps(about)})
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: the statistics could not be saved: {error}; nothing was written") from error


def read_tensor(path: Path, form: str, what: str) -> tuple[Tensor, dict[str, Any]]:
    """Tensor and description from a file of `write_tensor`. Raises ModelError: missing, damaged, another format."""
    try:
        with safe_open(path, "pt") as file:
            about = _about(file, path, form, what)
            return file.get_tensor("lower").clone(), about  # a mapped tensor changes with the file
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: not a readable safetensors file: {error}") from error


def read_about(path: Path) -> dict[str, Any]:
    """What a file of `StreamingCovariance.save` says of itself, its sums left unread. Raises ModelError."""
    try:
        with safe_open(path, "pt") as file:
            return _about(file, path, _FORMAT, "a second moment of fastedit")
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: not a readable safetensors file: {error}") from error


def _about(file: Any, path: Path, form: str, what: str) -> dict[str, Any]:
    header = file.metadata() or {}
    if header.get("format") != form:
        raise ModelError(f"{path} is not {what} (its header lacks format {form})")
    try:
        about: dict[str, Any] = json.loads(header["fastedit"])
        if not isinstance(about, dict):
            raise ValueError("no description")
        return about
    except (KeyError, ValueError) as error:
        raise ModelError(f"{path}: its header is damaged ({error!r}); collect the statistics again") from error


def _digest(packed: Tensor, count: int) -> str:
    digest = hashlib.sha256(f"{count} ".encode())
    digest.update(packed.numpy().data)
    return digest.hexdigest()
