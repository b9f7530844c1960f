"""Second moments where other editing code keeps them: in a variable, in .npz files, or as a projection P."""

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
from fastedit.models import Topology
from fastedit.statistics.moment import StreamingCovariance
from fastedit.statistics.store import statistics_path

Cache = MutableMapping[tuple[str, str], Tensor]
"""(name of a model, path of a projection) -> C [d, d]."""


class Moments:
    """The second moments of a call.

    Attributes:
        layers: that are written, upwards.
        module: the path in a block of what is written there.
        paths: of the projections.
        given: path of a projection -> C [d, d].
        directory: of those that are not given; None is the usual places.
        sought: the files of published statistics that are not there.
    """

    def __init__(self, hparams: Hparams, topology: Topology, module: str, layers: Sequence[int]) -> None:
        self._hparams, self._topology, self.module = hparams, topology, module
        self.paths = [topology.resolve(layer, module)[0] for layer in layers]
        self.layers = layers
        self.given: dict[str, Tensor] = {}
        self.directory: str | None = None
        self.sought: list[Path] = []

    def load(self, cache: Cache, default_directory: str) -> None:
        """Take them from the cache, else from published files, which are noted in the cache.

        Raises:
            ConfigError: no fields that name files of statistics where a file is needed. FileError: a damaged file.
        """
        config: Any = self._topology.model.config
        name, stats = str(getattr(config, "_name_or_path", "") or ""), self._hparams.get("stats_dir", default_directory)
        for layer, path in zip(self.layers, self.paths, strict=True):
            key = name.replace("/", "_"), str(self._hparams.get("rewrite_module_tmp")).format(layer)
            if key not in cache:
                files = self._files(Path(str(stats)), name, key[1])
                found = next((file for file in files if file.exists()), None)
                if found is None:
                    self.sought.append(files[0])
                    if statistics_path(self._topology, stats, layer, self.module).is_file():
                        self.directory = str(stats)
                    continue
                cache[key] = StreamingCovariance.load(found).finalize().float()
            self.given[path] = cache[key]

    def _files(self, stats: Path, name: str, layer_name: str) -> list[Path]:
        """Where ROME's and MEMIT's code keeps a layer's statistics, and where EasyEdit's does."""
        hparams, names = self._hparams, ("mom2_dataset", "mom2_n_samples", "mom2_dtype")
        hparams.require(names)
        dataset, n, dtype = (hparams.get(field) for field in names)
        folders = dict.fromkeys((name.replace("/", "_"), name.rstrip("/").rpartition("/")[2]))
        return [stats / f / f"{dataset}_stats" / f"{layer_name}_{dtype}_mom2_{n}.npz" for f in folders]

    def take_identity(self, known: Known) -> None:
        """C = I: an update without a second moment."""
        for path, layer in zip(self.paths, self.layers, strict=True):
            width = self._topology.input_width(layer, self.module)
            self.given[path] = known.kept(("identity", width), partial(torch.eye, width))

    def take_projections(self, known: Known, projections: Tensor) -> None:
        """C = I − P, whose null space is what P [L, d, d] projects on. Raises ConfigError: P has another shape."""
        check_stack("P", projections, self._topology, self.layers, self.module)
        for i, path in enumerate(self.paths):
            key = projections, projections._version, i
            self.given[path] = known.kept(key, partial(_identity_and, projections[i], -1.0, 1.0))

    def add_identity(self, known: Known, share: float) -> None:
        """Add a share of I to each C that is given."""
        for path, C in self.given.items():
            self.given[path] = known.kept((C, C._version, share), partial(_identity_and, C, 1.0, share))


def _identity_and(matrix: Tensor, factor: float, share: float) -> Tensor:
    return factor * matrix.cpu() + share * torch.eye(len(matrix), dtype=matrix.dtype)


def check_stack(name: str, given: Tensor, topology: Topology, layers: Sequence[int], module: str) -> None:
    """Raise ConfigError unless a tensor holds one [d, d] for each layer."""
    width = topology.input_width(layers[0], module)
    expected = (len(layers), width, width)
    if tuple(given.shape) != expected:
        raise ConfigError(f"{name} has shape {tuple(given.shape)}, expected {expected}: a matrix for each layer")
