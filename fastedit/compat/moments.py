"""Find second moments where other editing code keeps them: in a variable, in .npz files, or as a projection P."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastedit.compat.hparams import Hparams
from fastedit.compat.known import Known
from fastedit.errors import ConfigError
from fastedit.files import stamp
from fastedit.models import Topology
from fastedit.statistics.moment import StreamingCovariance
from fastedit.statistics.store import statistics_path

_FILE = "_fastedit_file"  # attribute of a C that was read: the file and its stamp
_ROUNDING = 0.05  # relative error of a matrix that was made or kept in fp16
Cache = MutableMapping[tuple[str, str], Tensor]
"""(name of a model, path of a projection) -> C [d, d]."""


class Moments:
    """The second moments of a call.

    Attributes:
        layers: the layers to write, ascending.
        module: path in a block of the projection to write.
        paths: paths of the projections.
        given: path of a projection -> C [d, d].
        directory: folder for those that are not given; None is the usual places.
        sought: files of published statistics that were not found.
    """

    def __init__(self, hparams: Hparams, topology: Topology, module: str, layers: Sequence[int]) -> None:
        self._hparams, self._topology, self.module = hparams, topology, module
        self.paths = [topology.resolve(layer, module)[0] for layer in layers]
        self.layers = layers
        self.given: dict[str, Tensor] = {}
        self.directory: str | None = None
        self.sought: list[Path] = []

    def load(self, cache: Cache, default_directory: str) -> None:
        """Take the second moments from the cache, or else from published files; these are added to the cache.

        Raises:
            ConfigError: a file is needed, and the fields for its name are missing. FileError: a damaged file.
        """
        config: Any = self._topology.model.config
        name, stats = str(getattr(config, "_name_or_path", "") or ""), self._hparams.get("stats_dir", default_directory)
        for layer, path in zip(self.layers, self.paths, strict=True):
            key = name.replace("/", "_"), str(self._hparams.get("rewrite_module_tmp")).format(layer)
            read = getattr(cache.get(key), _FILE, None)
            if key not in cache or read:
                files = self._files(Path(str(stats)), name, key[1])
                found = next((file for file in files if file.exists()), None)
                if found is None and not (read and read[0] in files):
                    cache.pop(key, None)
                    self.sought.append(files[0])
                    if statistics_path(self._topology, stats, layer, self.module).is_file():
                        self.directory = str(stats)
                    continue
                if found and read != (found, stamp(found)):
                    cache[key] = StreamingCovariance.load(found).finalize().float()
                    setattr(cache[key], _FILE, (found, stamp(found)))
            width = self._topology.input_width(layer, self.module)
            check_matrices(f"COV_CACHE[{key!r}]", cache[key], (width, width))
            self.given[path] = cache[key]

    def _files(self, stats: Path, name: str, layer_name: str) -> list[Path]:
        """The files where ROME's and MEMIT's code keeps a layer's statistics, and where EasyEdit does."""
        hparams, names = self._hparams, ("mom2_dataset", "mom2_n_samples", "mom2_dtype")
        hparams.require(names)
        dataset, n, dtype = (hparams.get(field) for field in names)
        folders = dict.fromkeys((name.replace("/", "_"), name.rstrip("/").rpartition("/")[2]))
        return [stats / f / f"{dataset}_stats" / f"{layer_name}_{dtype}_mom2_{n}.npz" for f in folders]

    def take_identity(self, known: Known) -> None:
        """Use C = I: an update without a second moment."""
        for path, layer in zip(self.paths, self.layers, strict=True):
            width = self._topology.input_width(layer, self.module)
            self.given[path] = known.memo.get(("identity", width), (), partial(torch.eye, width))

    def take_projections(self, known: Known, projections: Tensor) -> None:
        """Use C = I − P, for P [L, d, d] that project on the null space. Raises ConfigError if P is something else."""
        check_stack("P", projections, self._topology, self.layers, self.module)
        for i, path in enumerate(self.paths):
            make = partial(_beside, projections[i], f"P[{i}], of layer {self.layers[i]},")
            self.given[path] = known.memo.get(("P", i), (projections, projections._version), make)

    def add_identity(self, known: Known, share: float) -> None:
        """Add share · I to each given C."""
        for path, C in self.given.items():
            make = partial(_with_identity, C, share)
            self.given[path] = known.memo.get(("with identity", path), (C, C._version, share), make)


def _with_identity(matrix: Tensor, share: float) -> Tensor:
    return matrix.detach().cpu() + share * torch.eye(len(matrix), dtype=matrix.dtype)


def _beside(projection: Tensor, name: str) -> Tensor:
    """I − P [d, d]. Raises ConfigError if P is not an orthogonal projection."""
    P = projection.detach().cpu()
    check_symmetric(name, P)
    x = torch.randn(len(P), generator=torch.Generator().manual_seed(0)).to(P.dtype)
    if (P @ (P @ x) - P @ x).norm() > _ROUNDING * x.norm():
        raise ConfigError(f"{name} is not a projection: P P is not P; give U Uᵀ of orthonormal columns U")
    return torch.eye(len(P), dtype=P.dtype) - P


def check_matrices(name: str, given: Any, shape: tuple[int, ...], what: str = "") -> None:
    """Raise ConfigError unless `given` is a plain floating-point tensor of this shape that requires no gradient."""
    expected = f"expected {shape}{what}, as a dense tensor of floating-point numbers"
    if not isinstance(given, Tensor):
        raise ConfigError(f"{name} is a {type(given).__name__}, {expected}")
    if tuple(given.shape) != shape:
        raise ConfigError(f"{name} has shape {tuple(given.shape)}, {expected}")
    if not given.is_floating_point() or given.layout is not torch.strided or given.is_meta:
        raise ConfigError(f"{name} is {given.dtype}, {given.layout}, on {given.device}, {expected}")
    if given.requires_grad:
        raise ConfigError(f"{name} requires a gradient; give {name}.detach()")
    if given.is_inference():
        raise ConfigError(f"{name} was made in torch.inference_mode(); give {name}.clone(), made outside it")


def check_symmetric(name: str, matrix: Tensor) -> None:
    """Raise ConfigError if a matrix [d, d] is not finite or not symmetric, up to a rounding."""
    if not matrix.isfinite().all():
        raise ConfigError(f"{name} holds NaN or infinity; make it again")
    if (matrix - matrix.mT).abs().max() > _ROUNDING * matrix.abs().max():
        raise ConfigError(f"{name} is not symmetric; give all of it")


def check_own(name: str, matrices: Tensor) -> None:
    """Raise ConfigError for a tensor that cannot be written in place, because some of its elements are one."""
    if any(size > 1 and step == 0 for size, step in zip(matrices.shape, matrices.stride(), strict=True)):
        raise ConfigError(f"{name} is updated in place, and several of its elements are one (expand); give a clone")


def check_sum(name: str, eigenvalues: Tensor) -> None:
    """Raise ConfigError if a matrix with these eigenvalues [d], upwards, is not a sum of k kᵀ, up to a rounding."""
    least, largest = float(eigenvalues[0]), float(eigenvalues.abs().max())
    if least < -_ROUNDING * largest:
        raise ConfigError(f"{name} is not a sum of k kᵀ: an eigenvalue of it is {least:.3g}; give what a call returned")


def check_stack(name: str, given: Any, topology: Topology, layers: Sequence[int], module: str) -> None:
    """Raise ConfigError as `check_matrices` does, for a stack with one [d, d] for each layer."""
    width = topology.input_width(layers[0], module)
    check_matrices(name, given, (len(layers), width, width), ": a matrix for each layer")
