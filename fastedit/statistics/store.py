"""Where second moments are kept, and how methods get them: one file per layer and module.

A folder of statistics holds `{layer}.{module}.safetensors` (`StreamingCovariance.save`). It is the given folder,
or `statistics` in the model's local checkpoint, or `fastedit/<fingerprint of the model>` in the user's cache. A given
folder may also be a tree of published .npz files. Cholesky factors, `{layer}.{module}.factor.safetensors`, and
eigenvectors, `{layer}.{module}.eigen.safetensors`, are made on first use. They are always kept in the user's cache,
because the folder of the statistics may be shared, or belong to the package.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastedit.errors import FileError, ModelError
from fastedit.files import stamp
from fastedit.models import Topology
from fastedit.models.fingerprint import FP16
from fastedit.ops import factor_covariance
from fastedit.ops.cholesky import FewTokensError
from fastedit.statistics.moment import LOWER, TAG, WHAT, StreamingCovariance, pack_lower, unpack_lower
from fastedit.tensorfile import checksum, load_metadata, load_tensors, save_tensors

_CHOLESKY_TAG = "fastedit-factor-2"  # version 1 had its checksum in another place, which is not read anymore
_EIGEN_TAG = "fastedit-eigen-1"
# {layer}_float32_mom2_100000.npz, or with the module's path: transformer.h.{layer}.mlp.fc_out_float32_mom2_100000.npz
_PUBLISHED = re.compile(r"(?:.+?\.)?(?P<layer>\d+)(?:\.(?P<module>.+))?_float(?:16|32|64)_mom2(?:_t\d+)?(?:_\d+)?\.npz")
_log = logging.getLogger(__name__)


class MissingStatisticsError(ModelError):
    """Some layers have no statistics; the message gives the command that makes them.

    Attributes:
        layers: the layers without statistics.
    """

    def __init__(self, text: str, layers: Sequence[int]) -> None:
        super().__init__(text)
        self.args = text, layers
        self.layers = tuple(layers)


@dataclass(frozen=True)
class StatisticsStore:
    """The second moments of a model's keys, wherever they are kept.

    Attributes:
        fingerprint: fingerprint of the unedited model.
        module: the projection whose inputs are the keys, as `Topology.resolve` takes it.
        directory: the only folder or published tree to look in; None looks in the usual places.
        unchecked: use statistics of another model, or of fewer tokens than their width, with a warning.
        given: path of a projection -> C [d, d], used instead of a file; its factor is not kept.
    """

    topology: Topology
    fingerprint: str
    module: str = "down_proj"
    directory: str | Path | None = None
    unchecked: bool = False
    given: Mapping[str, Tensor] = field(default_factory=dict)

    def require(self, layers: Sequence[int]) -> None:
        """Check before work starts that all layers have usable statistics, as far as the files' headers tell.

        Raises:
            MissingStatisticsError: layers without statistics; names all of them, and the command that makes them.
            ModelError: statistics of another model or width. FileError: a file does not hold statistics.
        """
        missing = [layer for layer in layers if self.in_memory(layer) is None and self._find(layer) is None]
        if missing:
            raise self._missing(missing)

    def cholesky(self, layer: int) -> Tensor:
        """The lower Cholesky factor L [d, d] fp64 of C = L Lᵀ on the module's device.

        It is made once and kept in the user's cache, if that can be written. A kept factor is checked against its own
        checksum; the statistics that it was made from are then not read.

        Raises:
            MissingStatisticsError, ModelError, FileError: as for `require`, and for statistics of fewer tokens than
                their width, not positive definite, or damaged.
        """
        if (C := self.in_memory(layer)) is not None:
            return factor_covariance(C.to(self.topology.device), allow_few=self.unchecked)
        path, _ = self._required(layer)
        width, device = self.topology.input_width(layer, self.module), self.topology.device
        if (stored := self._load(layer, "factor", _CHOLESKY_TAG, {LOWER: (width * (width + 1) // 2,)})) is not None:
            return unpack_lower(stored[LOWER], width).to(device)
        moment = _read(path, width)
        C = moment.finalize().to(device, moment.stored)  # the precision decides what counts as positive definite
        try:
            factor = factor_covariance(C, count=moment.count)
        except ModelError as error:
            if self.unchecked:
                return factor_covariance(C, count=moment.count, allow_few=True)  # warns, and is never kept
            if isinstance(error, FewTokensError):
                error = FewTokensError(error.count, error.dim, "unchecked_statistics")
            raise error.at(path) from None
        self._save(layer, "factor", _CHOLESKY_TAG, {LOWER: pack_lower(factor)})
        return factor

    def eigen(self, layer: int) -> tuple[Tensor, Tensor]:
        """The eigenvalues [d] of C, ascending, and its eigenvectors, the columns of [d, d]; fp64, on its device.

        Made once and kept like the Cholesky factor; raises what `covariance` raises.
        """
        keeps = self.in_memory(layer) is None and not self.unchecked
        width, device = self.topology.input_width(layer, self.module), self.topology.device
        shapes = {"values": (width,), "vectors": (width, width)}
        if keeps and (stored := self._load(layer, "eigen", _EIGEN_TAG, shapes)) is not None:
            return stored["values"].to(device), stored["vectors"].to(device)
        values, vectors = torch.linalg.eigh(self.covariance(layer))
        if keeps:
            self._save(layer, "eigen", _EIGEN_TAG, {"values": values, "vectors": vectors.contiguous()})
        return values, vectors

    def _load(self, layer: int, kind: str, tag: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor] | None:
        """The kept file that was made from a layer's statistics; None if missing, damaged or from other statistics."""
        path, identity = self._place(layer, kind)
        with suppress(FileError):
            tensors, metadata, _ = load_tensors(path, (tag,), f"the {kind} file")
            if identity.items() <= metadata.items() and all(
                tensors[name].shape == shape for name, shape in shapes.items()
            ):
                return tensors
        return None

    def _save(self, layer: int, kind: str, tag: str, tensors: dict[str, Tensor]) -> None:
        path, identity = self._place(layer, kind)
        try:
            save_tensors(path, tensors, tag, identity, f"the {kind} file")
        except FileError as error:
            _log.info("the %s file of layer %d is not kept: %s", kind, layer, error)

    def _place(self, layer: int, kind: str) -> tuple[Path, dict[str, Any]]:
        """The path of a file made from a layer's statistics, and what identifies these statistics."""
        path = user_directory(self.fingerprint) / _name(self.topology, layer, self.module, f"{kind}.")
        return path, {"digest": self._required(layer)[1], "dim": self.topology.input_width(layer, self.module)}

    def covariance(self, layer: int) -> Tensor:
        """C [d, d] fp64, the mean of k kᵀ, on the module's device; raises what `cholesky` raises."""
        if (C := self.in_memory(layer)) is not None:
            return C.to(self.topology.device, torch.float64)
        path, _ = self._required(layer)
        moment = _read(path, self.topology.input_width(layer, self.module))
        if moment.count < moment.dim:
            few = FewTokensError(moment.count, moment.dim, "unchecked_statistics").at(path)
            if not self.unchecked:
                raise few
            warnings.warn(str(few), RuntimeWarning, stacklevel=2)
        return moment.finalize().to(self.topology.device)

    def in_memory(self, layer: int) -> Tensor | None:
        """C of a layer if it was given, else None. Raises ModelError if its width is not that of the keys."""
        path, width = self.topology.resolve(layer, self.module)[0], self.topology.input_width(layer, self.module)
        C = self.given.get(path)
        if C is not None and C.shape != (width, width):
            raise ModelError(f"the second moment of {path} is {list(C.shape)}, expected [{width}, {width}]")
        return C

    def digests(self, layers: Sequence[int]) -> dict[str, str]:
        """Number of each layer -> a text that identifies its statistics; raises what `require` raises."""
        second_moments = {layer: self.in_memory(layer) for layer in layers}
        return {
            str(layer): self._required(layer)[1] if C is None else str(checksum(C))
            for layer, C in second_moments.items()
        }

    def _required(self, layer: int) -> tuple[Path, str]:
        found = self._find(layer)
        if found is None:
            raise self._missing([layer])
        return found

    def _find(self, layer: int) -> tuple[Path, str] | None:
        """The file of a layer's statistics, after a check of its header, and its digest; None if there is no file."""
        topology, module = self.topology, self.module
        width, name = topology.input_width(layer, module), _name(topology, layer, module)
        errors: list[ModelError] = []
        for path in (folder / name for folder in self._folders() if (folder / name).is_file()):
            header = load_metadata(path, (TAG,), WHAT)
            made_for = header.get("metadata", {}).get("fingerprint")
            if header.get("dim") != width:
                text = f"{{path}} is of width {header.get('dim')}, layer {layer} {module} reads {width}"
                errors.append(FileError(path, text))
            elif made_for not in (None, self.fingerprint) and not self.unchecked:
                text = f"{{path}} was made for a model with fingerprint {made_for}, this one has {self.fingerprint}; "
                text += (
                    f"load the unedited model it was made for ({FP16}), collect statistics of this one, or continue "
                )
                errors.append(FileError(path, text + "with unchecked_statistics"))
            elif (count := int(header.get("count", width))) < width and not self.unchecked:
                errors.append(FewTokensError(count, width, "unchecked_statistics").at(path))
            else:
                if made_for not in (None, self.fingerprint):
                    warnings.warn(f"{path} was made for another model", RuntimeWarning, stacklevel=4)
                return path, str(header.get("digest"))
        if errors:
            raise errors[0]
        published = [] if self.directory is None else self._published(layer)
        if len(published) > 1:
            listed = ", ".join(str(path) for path in published)
            text = f"{{path}} holds several statistics of layer {layer}: {listed}; give one's folder"
            raise FileError(Path(str(self.directory)), text)
        return (published[0], _file_digest(published[0])) if published else None

    def _folders(self) -> Iterator[Path]:
        if self.directory is not None:
            yield Path(self.directory)
            return
        checkpoint = _checkpoint(self.topology)
        if checkpoint and Path(checkpoint).is_dir():
            yield Path(checkpoint) / "statistics"
        yield user_directory(self.fingerprint)

    def _published(self, layer: int) -> list[Path]:
        """Published files of a layer's statistics."""
        module_path, projection = self.topology.resolve(layer, self.module)
        short_name = module_path.rpartition(".")[2]
        unnamed = short_name if self.topology.is_down_proj(layer, projection) else ""  # the older files name no module
        paths = []
        for path in self._npz_files():
            match = _PUBLISHED.fullmatch(path.name)
            if match and int(match["layer"]) == layer and (match["module"] or unnamed).rpartition(".")[2] == short_name:
                paths.append(path)
        return paths

    def _npz_files(self) -> list[Path]:
        """The .npz files in `directory`, which may be the folder of a data set, of a model, or of all models."""
        root, checkpoint = Path(str(self.directory)), _checkpoint(self.topology)
        plain = checkpoint.replace("\\", "/").rstrip("/")
        models = {plain.replace("/", "_"), plain.rpartition("/")[2]}
        if Path(checkpoint).is_dir():
            models.add(Path(checkpoint).resolve().name)  # resolves "." and ".."
        models -= {"", ".", ".."}
        folders = [root, *sorted(root.glob("*_stats"))]
        folders += [folder for model in sorted(models) for folder in sorted((root / model).glob("*_stats"))]
        return [path for folder in folders for path in sorted(folder.glob("*.npz"))]

    def _missing(self, layers: Sequence[int]) -> MissingStatisticsError:
        looked = " and ".join(str(folder) for folder in self._folders())
        listed = ",".join(map(str, layers))
        options = "" if self.module == "down_proj" else f" --module {self.module}"
        options += "" if self.directory is None else f" --output {self.directory}"
        if self.directory is not None and (others := self._npz_files()):
            names = ", ".join(path.name for path in others[:3]) + (
                f" and {len(others) - 3} more" if len(others) > 3 else ""
            )
            stem = layers[0] if self.module == "down_proj" else self.topology.resolve(layers[0], self.module)[0]
            looked += f"; of its .npz files, {names}, none is called such as {stem}_float32_mom2_100000.npz"
        if self.directory is None and self.topology.head.weight.dtype == torch.float16:
            looked += f"; {FP16}"
        place = f"layer {listed}" if len(layers) == 1 else f"layers {listed}"
        text = f"no statistics of {self.module} in {place} (looked in {looked}); make "
        text += f"them: fastedit covariance --model {_checkpoint(self.topology) or 'MODEL'} --text FILE "
        return MissingStatisticsError(f"{text}--layers {listed}{options}", layers)


def statistics_path(topology: Topology, directory: str | Path, layer: int, module: str = "down_proj") -> Path:
    """The file of a layer's statistics in a folder."""
    return Path(directory) / _name(topology, layer, module)


def user_directory(fingerprint: str) -> Path:
    """The folder in the user's cache for statistics of a model."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "fastedit" / fingerprint


def _read(path: Path, width: int) -> StreamingCovariance:
    moment = StreamingCovariance.load(path)
    if moment.dim != width:
        raise FileError(path, f"{{path}} is of width {moment.dim}, the projection reads {width}: of another model?")
    return moment


def _checkpoint(topology: Topology) -> str:
    config: Any = topology.model.config
    return str(getattr(config, "_name_or_path", "") or "")


def _name(topology: Topology, layer: int, module: str, kind: str = "") -> str:
    """The file name, the same for all names of a projection: down_proj, mlp.down_proj, model.layers.3.mlp.down_proj."""
    path, projection = topology.resolve(layer, module)
    inside = path.removeprefix(f"{topology.blocks_path}.{layer}.")
    return f"{layer}.{'down_proj' if topology.is_down_proj(layer, projection) else inside}.{kind}safetensors"


def _file_digest(path: Path) -> str:
    try:
        return _digest_of(path, stamp(path))
    except OSError as error:
        raise FileError(path, f"cannot be read: {error.strerror}") from error


@lru_cache(maxsize=1024)
def _digest_of(path: Path, _: tuple[int, ...]) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**22):
            digest.update(piece)
    return digest.hexdigest()
