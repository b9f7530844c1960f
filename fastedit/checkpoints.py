"""Compare and change the files of checkpoints, one tensor at a time, without loading the model.

Parameters are named by their paths in the model. The architecture that config.json describes tells which tensors of
the files they are.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fastedit.compose import added
from fastedit.delta import WeightDelta
from fastedit.errors import FileError, ModelError, listed
from fastedit.files import replacing_directory
from fastedit.loading import refuse_adapter
from fastedit.models import fingerprint_of, plain_state
from fastedit.progress import Progress, no_progress
from fastedit.saving import architecture_of, check_room, copy_settings, names_in_files
from fastedit.undo import UNDO, Undo, subtracted
from fastedit.weights import add_

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_SKETCH, _ENERGY = 256, 0.99
_PART = 2**20  # weights that are compared at once
_WHOLE = "edit the loaded model instead: fastedit export DELTA --merge DIR --model MODEL"

Change = Callable[[Tensor], Tensor]


class Checkpoint:
    """A folder of safetensors files with its config.json.

    Attributes:
        keys: path of each parameter -> names of its tensors in the files; several if it is tied and stored more than
            once.

    Raises:
        FileError: the folder is not a checkpoint, or cannot be read.
        ModelError: the folder holds an adapter or quantized weights, or the names or shapes in its files do not fit
            the architecture.
    """

    @plain_state
    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        refuse_adapter(self.folder)
        self._places = _places(self.folder)
        network = self._architecture()
        names: dict[int, list[str]] = {}
        for name, parameter in network.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        self.shapes = {path: parameter.shape for path, parameter in network.named_parameters()}
        with tempfile.TemporaryDirectory() as trial:
            saved = names_in_files(network, Path(trial)) or {}
        prefix = f"{network.base_model_prefix}."
        self.keys: dict[str, list[str]] = {}
        for tied in names.values():
            candidates = dict.fromkeys(key for name in tied for key in (name, saved.get(name, name)))
            candidates |= dict.fromkeys(key.removeprefix(prefix) for key in candidates)
            self.keys[tied[0]] = [key for key in candidates if key in self._places]
        self._check()

    def read(self, path: str) -> Tensor:
        """A parameter, as it is stored."""
        return self._tensor(self.keys[path][0])

    def dtype(self, path: str) -> str:
        """The dtype in which a parameter is stored, such as "BF16"."""
        key = self.keys[path][0]
        with safe_open(self.folder / self._places[key], "pt") as file:
            return str(file.get_slice(key).get_dtype())

    def fingerprint(self, change: Callable[[str, Tensor], Tensor] = lambda _, tensor: tensor) -> str:
        """The fingerprint of the model; `change` may replace each parameter by what it will be."""
        return fingerprint_of((path, change(path, self.read(path))) for path in self.keys)

    @plain_state
    def write(
        self,
        directory: Path,
        changes: Mapping[str, Change],
        finish: Callable[[Path], None] = lambda _: None,
        progress: Progress = no_progress,
    ) -> None:
        """Write the checkpoint with some parameters changed, a file at a time; it appears whole or not at all.

        Tokenizer and settings are copied, those in subfolders too. Weights in other formats and undo files are not,
        nor are subfolders that are hidden or hold weights.

        Args:
            changes: path -> function that makes the new weights from the old ones.
            finish: called with the new folder at the end, before it takes its place.

        Raises:
            FileError: the checkpoint cannot be written.
        """
        by_key = {key: changes[path] for path in changes for key in self.keys[path]}
        files = sorted(set(self._places.values()))
        check_room(directory, sum((self.folder / file).stat().st_size for file in files))
        try:
            with replacing_directory(directory) as folder:
                copy_settings(self.folder, folder)
                for i, name in enumerate(files):
                    self._write_file(name, folder, by_key)
                    progress("files", i + 1, len(files))
                finish(folder)
        except (OSError, SafetensorError) as error:
            raise FileError(directory, f"could not be written: {error}; nothing was changed") from error

    def _write_file(self, name: str, folder: Path, changes: Mapping[str, Change]) -> None:
        keys = [key for key, file in self._places.items() if file == name]
        if not changes.keys() & set(keys):
            shutil.copyfile(self.folder / name, folder / name)
            return
        with safe_open(self.folder / name, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # not a mapping
            metadata = file.metadata() or {"format": "pt"}
        for key in keys:
            if key in changes:
                tensors[key] = changes[key](tensors[key].clone()).contiguous()
        save_file(tensors, folder / name, metadata)

    def _tensor(self, key: str) -> Tensor:
        with safe_open(self.folder / self._places[key], "pt") as file:
            tensor: Tensor = file.get_tensor(key)
        return tensor

    def _architecture(self) -> nn.Module:
        try:
            config = json.loads((self.folder / "config.json").read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise FileError(self.folder, f"has no config.json that can be read: {error}; give a checkpoint") from None
        if "quantization_config" in config:
            raise ModelError(f"{self.folder} is quantized; give the checkpoint in fp32, bf16 or fp16")
        try:
            network: nn.Module = architecture_of(self.folder)
        except ModelError as error:
            raise error.at(self.folder) from None
        return network

    def _check(self) -> None:
        if missing := [path for path, keys in self.keys.items() if not keys]:
            raise ModelError(
                f"{self.folder}: its files name no tensor for {len(missing)} parameters of the model: "
                f"{listed(missing)}; {_WHOLE}"
            )
        wrong = []
        for name in sorted(set(self._places.values())):
            with safe_open(self.folder / name, "pt") as file:
                for path, keys in self.keys.items():
                    for key in (key for key in keys if self._places[key] == name):
                        stored = file.get_slice(key)
                        if (shape := tuple(stored.get_shape())) != tuple(self.shapes[path]):
                            wrong.append(f"{key} {list(shape)} instead of {list(self.shapes[path])}")
                        elif stored.get_dtype() not in ("F32", "BF16", "F16", "F64"):
                            wrong.append(f"{key} in {stored.get_dtype()}")
        if wrong:
            raise ModelError(f"{self.folder}: {len(wrong)} tensors are not as config.json says: {listed(wrong)}")


def _places(folder: Path) -> dict[str, str]:
    """Name of each tensor -> its file. Raises FileError."""
    index = folder / _INDEX
    try:
        if index.is_file():
            weight_map: Any = json.loads(index.read_text("utf-8"))["weight_map"]
            if missing := sorted({file for file in weight_map.values() if not (folder / file).is_file()}):
                raise FileError(folder, f"lacks {len(missing)} of its files: {listed(missing)}")
            return dict(weight_map)
        with safe_open(folder / _SINGLE, "pt") as file:
            return dict.fromkeys(file.keys(), _SINGLE)
    except (OSError, SafetensorError, ValueError, KeyError, AttributeError) as error:
        raise FileError(folder, f"holds no weights as *.safetensors that can be read: {error}") from error


class Stack:
    """Deltas to be added to a checkpoint, as the sums that `compose.stacked` makes; nothing is written yet."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.sums: list[WeightDelta] = []

    def put(self, delta: WeightDelta) -> str:
        """Add a sum and return the model's new fingerprint. Raises ModelError as `check_fits`."""
        check_fits(self.checkpoint, delta)
        self.sums.append(delta)
        return self.checkpoint.fingerprint(self.edited)

    def edited(self, path: str, weight: Tensor) -> Tensor:
        """The weights of a parameter with all sums added."""
        if not any(path in delta.updates for delta in self.sums):
            return weight
        new = weight.clone()
        for delta in self.sums:
            if path in delta.updates:
                add_(new, delta.updates[path])
        return new


class Reverted:
    """Deltas to be taken out of a checkpoint; nothing is written yet.

    Args:
        undos: undo files, which make the result exact; the first that belongs to these deltas is used.

    Attributes:
        updates: path of each parameter -> the sum of its updates.

    Raises:
        ModelError: the checkpoint lacks a parameter, or has it in another shape.
    """

    def __init__(self, checkpoint: Checkpoint, deltas: Sequence[WeightDelta], undos: Sequence[Undo]) -> None:
        for delta in deltas:
            check_fits(checkpoint, delta)
        self._checkpoint, self.updates, self._found = checkpoint, added(deltas), len(undos)
        self._made_for = list(dict.fromkeys(str(delta.metadata.get("fingerprint")) for delta in deltas))
        self._undo = next((undo for undo in undos if undo.belongs_to(self.updates)), None)

    def changes(self) -> dict[str, Change]:
        """Path -> function from the weights now to those before the edits; without a fitting undo file it subtracts."""
        return {path: lambda weight, path=path: self._before(path, weight) for path in self.updates}  # type: ignore[misc]

    def problem(self) -> str | None:
        """Why `changes` may not restore the weights before the edits bit for bit; None if it does."""
        folder, undo = self._checkpoint.folder, self._undo
        if undo is None:
            mismatch = f"the {self._found} files found are of other edits, or of fewer or more"
            return f"{folder}: no undo file of these deltas: {mismatch if self._found else f'there is no {UNDO}'}"
        read, updates = self._checkpoint.read, self.updates.items()
        if wrong := [path for path, update in updates if undo.restored(path, read(path), update) is None]:
            return (
                f"{folder}: without the deltas {len(wrong)} of {len(self.updates)} matrices are not what they were: "
                f"{listed(wrong)}; they were changed after these edits"
            )
        if (fingerprint := self._checkpoint.fingerprint(self._before)) not in self._made_for:
            return (
                f"{folder}: without the deltas the fingerprint is {fingerprint}, but they were made for "
                f"{listed(self._made_for)}; it holds other edits too, of which the last one has to be reverted first"
            )
        return None

    def _before(self, path: str, weight: Tensor) -> Tensor:
        if path not in self.updates:
            return weight
        update = self.updates[path]
        exact = self._undo.restored(path, weight, update) if self._undo else None
        return subtracted(weight, update) if exact is None else exact


def check_fits(checkpoint: Checkpoint, delta: WeightDelta) -> None:
    """Raise ModelError if the delta updates parameters that the checkpoint lacks, or has in other shapes."""
    wrong = [
        f"{path} {list(update.shape)}"
        for path, update in delta.updates.items()
        if checkpoint.shapes.get(path) != update.shape
    ]
    if wrong:
        raise ModelError(
            f"{checkpoint.folder} lacks {len(wrong)} parameters of the delta, or has them in another shape: "
            f"{listed(wrong)}"
        )


@dataclass(frozen=True)
class Difference:
    """How a parameter of one checkpoint differs from that of another.

    Attributes:
        changed: share of its weights that differ; NaN is equal to NaN.
        relative: norm of the difference divided by the norm of the first, both without what is not finite.
        largest: largest finite difference of a single weight.
        broken: number of weights that differ and are NaN or infinite in one of the two.
    """

    path: str
    changed: float
    relative: float
    largest: float
    broken: int


def rank_of(update: Tensor) -> int | None:
    """Estimate from a sketch how many directions hold 99 % of the squared norm of an update [m, n]; None above 256.

    Rounding to bf16 adds directions. A vector [m] has rank 1.
    """
    if update.ndim < 2:
        return 1
    rng = torch.Generator().manual_seed(0)
    probe = torch.randn(update.shape[1], min(_SKETCH, *update.shape), generator=rng)
    q = torch.linalg.qr(update @ probe).Q
    energy = torch.linalg.svdvals(q.T @ update).square().cumsum(0) / torch.linalg.vector_norm(update).square()
    enough = (energy >= _ENERGY).nonzero()
    return int(enough[0]) + 1 if len(enough) else None


@plain_state
def differences(
    one: Checkpoint, other: Checkpoint, progress: Progress = no_progress
) -> Iterator[tuple[Difference, Tensor]]:
    """Yield the parameters that differ, in the order of the model, with the differences in fp32.

    Raises:
        ModelError: the two do not have the same parameters; names those that differ.
    """
    a, b = one.shapes, other.shapes
    if wrong := [path for path in {**a, **b} if a.get(path) != b.get(path)]:
        raise ModelError(
            f"{one.folder} and {other.folder} are not versions of one model: {len(wrong)} parameters are in one of "
            f"them only, or differ in shape: {listed(wrong)}"
        )
    return _differences(one, other, progress)


@torch.no_grad()
def _differences(one: Checkpoint, other: Checkpoint, progress: Progress) -> Iterator[tuple[Difference, Tensor]]:
    for i, path in enumerate(one.shapes):
        if difference := _difference(path, one.read(path), other.read(path)):
            yield difference
        progress("parameters", i + 1, len(one.shapes))


def _difference(path: str, one: Tensor, other: Tensor) -> tuple[Difference, Tensor] | None:
    """The difference of a parameter, None if there is none; computed in fp64, part by part to save memory."""
    if one.dtype == other.dtype and torch.equal(one, other):
        return None
    update, changed, broken, largest, whole, moved = torch.zeros(one.shape), 0, 0, 0.0, 0.0, 0.0
    parts = (tensor.reshape(-1).split(_PART) for tensor in (one, other, update))
    for old, new, out in zip(*parts, strict=True):
        a, b = old.double(), new.double()
        differ = (a != b) & ~(a.isnan() & b.isnan())
        change = torch.where(differ, b - a, 0.0)
        out.copy_(change)
        finite = change[change.isfinite()]
        changed, broken = changed + int(differ.sum()), broken + len(change) - len(finite)
        whole, moved = whole + float(a[a.isfinite()].square().sum()), moved + float(finite.square().sum())
        largest = max(largest, float(finite.abs().max()) if len(finite) else 0.0)
    if not changed:
        return None
    relative = math.sqrt(moved / max(whole, 1e-300))
    return Difference(path, changed / one.numel(), relative, largest, broken), update
