"""Where second moments live, and how methods get them: one file a layer and module, its factor beside it.

A folder of statistics holds `{layer}.{module}.safetensors` (`StreamingCovariance.save`) and, made on first use,
`{layer}.{module}.factor.safetensors`. It is the one that is given, or `statistics` in the model's local checkpoint, or
`fastedit/<fingerprint of the model>` in the user's cache. A given one may also be a tree of published .npz files.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastedit.covariance import (
    StreamingCovariance,
    pack_lower,
    read_about,
    read_tensor,
    unpack_lower,
    write_tensor,
)
from fastedit.errors import ModelError
from fastedit.models import Topology, checksum
from fastedit.models.fingerprint import FP16
from fastedit.ops import factor_covariance

_FACTOR = "fastedit-factor-1"
# {layer}_float32_mom2_100000.npz, or with the module's path: transformer.h.{layer}.mlp.fc_out_float32_mom2_100000.npz
_PUBLISHED = re.compile(r"(?:.+?\.)?(?P<layer>\d+)(?:\.(?P<module>.+))?_float(?:16|32|64)_mom2(?:_t\d+)?(?:_\d+)?\.npz")
_log = logging.getLogger(__name__)


def load_factor(
    topology: Topology,
    fingerprint: str,
    layer: int,
    module: str = "down_proj",
    *,
    directory: str | Path | None = None,
    unchecked: bool = False,
) -> Tensor:
    """The lower Cholesky factor L [d, d] fp64 of C = L Lᵀ on the module's device, from the folder of statistics.

    Made once and kept beside the statistics, or in the user's cache where that folder cannot be written. A kept one
    is checked against its own checksum, and the statistics that it was made of then need not be read.

    Args:
        fingerprint: of the unedited model.
        module: the projection whose inputs are the keys, as `Topology.resolve` takes it.
        directory: the folder or published tree to look in, and no other.
        unchecked: go on, with a warning, with statistics of another model or of fewer tokens than d.

    Raises:
        ModelError: none there (names the command that makes them), of another model or width, from fewer tokens
            than d, not positive definite, damaged.
    """
    path, digest = _find(topology, fingerprint, layer, module, directory, unchecked)
    device = _device(topology, layer, module)
    width, name = topology.input_width(layer, module), _name(topology, layer, module, "factor.")
    places = [folder / name for folder in (path.parent, user_directory(fingerprint))]
    about = {"digest": digest, "dim": width}
    for place in places:
        with suppress(ModelError):  # a damaged factor is made again
            packed, noted = read_tensor(place, _FACTOR, "a factor")
            if noted == about | {"checksum": checksum(packed)} and packed.numel() == width * (width + 1) // 2:
                return unpack_lower(packed, width).to(device)
    found = _read(path, width)
    C = found.finalize().to(device, found.stored)  # its precision decides what counts as positive definite
    try:
        factor = factor_covariance(C, count=found.count)
    except ModelError as error:
        if not unchecked:
            raise ModelError(f"{path}: {error}".replace("allow_few", "unchecked_statistics")) from error
        return factor_covariance(C, count=found.count, allow_few=True)  # warns; never kept
    packed = pack_lower(factor)
    for place in places:
        try:
            write_tensor(place, packed, _FACTOR, about | {"checksum": checksum(packed)})
            break
        except ModelError as error:
            _log.info("the factor of layer %d is not kept: %s", layer, error)
    return factor


def load_covariance(
    topology: Topology,
    fingerprint: str,
    layer: int,
    module: str = "down_proj",
    *,
    directory: str | Path | None = None,
    unchecked: bool = False,
) -> Tensor:
    """C [d, d] fp64, the mean of k kᵀ, on the module's device; arguments and errors are those of `load_factor`."""
    path, _ = _find(topology, fingerprint, layer, module, directory, unchecked)
    found = _read(path, topology.input_width(layer, module))
    if found.count < found.dim:
        few = (
            f"{path} is of {found.count} tokens, fewer than its width {found.dim}: C is singular, and directions "
            "that no token has seen count as free to overwrite"
        )
        if not unchecked:
            raise ModelError(f"{few}. Collect some {10 * found.dim} tokens, or go on with unchecked_statistics")
        warnings.warn(few, RuntimeWarning, stacklevel=2)
    return found.finalize().to(_device(topology, layer, module))


def require_statistics(
    topology: Topology,
    fingerprint: str,
    layers: Sequence[int],
    module: str = "down_proj",
    *,
    directory: str | Path | None = None,
    unchecked: bool = False,
) -> None:
    """Look for the statistics of all layers before work starts: the error names every layer that lacks them.

    Raises:
        ModelError: as `load_factor`, as far as headers can tell.
    """
    missing = []
    for layer in layers:
        try:
            _find(topology, fingerprint, layer, module, directory, unchecked)
        except MissingStatisticsError:
            missing.append(layer)
    if missing:
        raise MissingStatisticsError(_missing(topology, fingerprint, missing, module, directory))


class MissingStatisticsError(ModelError):
    """There are no statistics for a layer; the message gives the command that makes them."""


def statistics_path(topology: Topology, directory: str | Path, layer: int, module: str = "down_proj") -> Path:
    """The file of a layer's statistics in a folder."""
    return Path(directory) / _name(topology, layer, module)


def user_directory(fingerprint: str) -> Path:
    """The folder for statistics of a model in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "fastedit" / fingerprint


def _find(
    topology: Topology, fingerprint: str, layer: int, module: str, directory: str | Path | None, unchecked: bool
) -> tuple[Path, str]:
    """The file of the statistics and a digest of it, its header checked."""
    width, name = topology.input_width(layer, module), _name(topology, layer, module)
    wrong: list[str] = []
    for folder in _folders(topology, fingerprint, directory):
        if (path := folder / name).is_file():
            about = read_about(path)
            made_for = about.get("metadata", {}).get("fingerprint")
            if about.get("dim") != width:
                wrong.append(f"{path} is of width {about.get('dim')}, layer {layer} {module} reads {width}")
            elif made_for not in (None, fingerprint) and not unchecked:
                wrong.append(
                    f"{path} was made for a model with fingerprint {made_for}, this one has {fingerprint}; load the "
                    f"unedited model it was made for ({FP16}), collect statistics of this one, or go on with "
                    "unchecked_statistics"
                )
            else:
                if made_for not in (None, fingerprint):
                    warnings.warn(f"{path} was made for another model", RuntimeWarning, stacklevel=3)
                return path, str(about.get("digest"))
    if wrong:
        raise ModelError(wrong[0])
    if directory is not None and (published := _published(topology, Path(directory), layer, module)):
        if len(published) > 1:
            listed = ", ".join(str(path) for path in published)
            raise ModelError(f"{directory} holds several statistics of layer {layer}: {listed}; give one's folder")
        return published[0], _file_digest(published[0])
    raise MissingStatisticsError(_missing(topology, fingerprint, [layer], module, directory))


def _folders(topology: Topology, fingerprint: str, directory: str | Path | None) -> Iterator[Path]:
    if directory is not None:
        yield Path(directory)
        return
    checkpoint = _checkpoint(topology)
    if checkpoint and Path(checkpoint).is_dir():
        yield Path(checkpoint) / "statistics"
    yield user_directory(fingerprint)


def _published(topology: Topology, root: Path, layer: int, module: str) -> list[Path]:
    """Published files of a layer's statistics."""
    wanted = topology.resolve(layer, module)[0].rpartition(".")[2]
    down = topology.resolve(layer, "down_proj")[0].rpartition(".")[2]
    found = []
    for path in _npz(topology, root):
        match = _PUBLISHED.fullmatch(path.name)
        if match and int(match["layer"]) == layer and (match["module"] or down).rpartition(".")[2] == wanted:
            found.append(path)
    return found


def _npz(topology: Topology, root: Path) -> list[Path]:
    """The .npz files in the folder of a data set, of a model, or of all models."""
    checkpoint = _checkpoint(topology)
    models = {checkpoint.replace("/", "_"), checkpoint.rpartition("/")[2]} - {""}
    folders = [root, *sorted(root.glob("*_stats"))]
    folders += [folder for model in sorted(models) for folder in sorted((root / model).glob("*_stats"))]
    return [path for folder in folders for path in sorted(folder.glob("*.npz"))]


def _read(path: Path, width: int) -> StreamingCovariance:
    found = StreamingCovariance.load(path)
    if found.dim != width:
        raise ModelError(f"{path} is of width {found.dim}, the projection reads {width}: of another model?")
    return found


def _missing(
    topology: Topology, fingerprint: str, layers: Sequence[int], module: str, directory: str | Path | None
) -> str:
    looked = " and ".join(str(folder) for folder in _folders(topology, fingerprint, directory))
    listed = ",".join(map(str, layers))
    more = "" if module == "down_proj" else f" --module {module}"
    more += "" if directory is None else f" --output {directory}"
    if directory is not None and (others := _npz(topology, Path(directory))):
        names = ", ".join(path.name for path in others[:3]) + f" and {len(others) - 3} more" * (len(others) > 3)
        wanted = layers[0] if module == "down_proj" else topology.resolve(layers[0], module)[0]
        looked += f"; of its .npz files, {names}, none is called such as {wanted}_float32_mom2_100000.npz"
    if directory is None and topology.head.weight.dtype == torch.float16:
        looked += f"; {FP16}"
    return (
        f"no statistics of {module} in layer{'s' * (len(layers) > 1)} {listed} (looked in {looked}); make them: "
        f"fastedit covariance {_checkpoint(topology) or 'MODEL'} --text FILE --layers {listed}{more}"
    )


def _checkpoint(topology: Topology) -> str:
    config: Any = topology.model.config
    return str(getattr(config, "_name_or_path", "") or "")


def _device(topology: Topology, layer: int, module: str) -> torch.device:
    weight: Any = topology.resolve(layer, module)[1].weight
    device: torch.device = weight.device
    return device


def _name(topology: Topology, layer: int, module: str, kind: str = "") -> str:
    """One name for a projection, however it is spelled: down_proj, mlp.down_proj, model.layers.3.mlp.down_proj."""
    path, found = topology.resolve(layer, module)
    short = "down_proj" if found is topology.resolve(layer, "down_proj")[1] else None
    inside = path.removeprefix(f"{topology.blocks_path}.{layer}.")
    return f"{layer}.{short or inside}.{kind}safetensors"


def _file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while piece := file.read(2**22):
                digest.update(piece)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
    return digest.hexdigest()
