"""Targets on disk, under a key made from everything that they depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from fastedit import parallel
from fastedit.errors import FileError
from fastedit.files import check_writable
from fastedit.methods.batch import Batch
from fastedit.methods.locate_then_edit.config import TargetConfig
from fastedit.methods.locate_then_edit.targets import Targets
from fastedit.models import Topology, plain
from fastedit.tensorfile import checksum, load_tensors, save_tensors

_TAG = "fastedit-targets-2"
_OF_PLACE = ("_name_or_path", "transformers_version")  # fields of a config that do not change what the model computes


class TargetStore:
    """A folder of targets of one model; from now on only its weights in `written` may change.

    Raises:
        FileError: the folder cannot be made or written to.
    """

    def __init__(self, folder: str | Path, topology: Topology, written: Sequence[str]) -> None:
        self._folder, self._topology = Path(folder), topology
        if parallel.first():  # only one: processes would remove the folders that others try to make
            check_writable(self._folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._parameters = dict(topology.model.named_parameters())
        self._written = sorted(written)
        config = topology.config.to_dict()
        self._model = {name: value for name, value in config.items() if name not in _OF_PLACE}
        self._unwritten = self._checksums([path for path in self._parameters if path not in self._written])

    def key(self, batch: Batch, z_layer: int, config: TargetConfig) -> str:
        """A hash of all that the targets of these edits depend on now: every bit of the weights, the model's config,
        the tokens of all texts, the targets' configuration, and the edits' ids, which appear in notes.
        """
        samples, last = batch.rewriting
        weights = self._unwritten | self._checksums(self._written)
        identity = [_TAG, self._model, weights, z_layer, asdict(config), [edit.id for edit in batch.edits]]
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode())
        for part in (samples.input_ids, samples.offsets, samples.target_start, last):
            digest.update(part.numpy().tobytes())
        return digest.hexdigest()[:32]

    def save(self, key: str, targets: Targets) -> Path:
        """Write `{key}.safetensors`, whole or not at all.

        Raises:
            FileError: the file cannot be written.
        """
        path = self._path(key)
        tensors, metadata = targets.state()
        save_tensors(path, tensors, _TAG, metadata, "the targets")
        return path

    def load(self, key: str) -> Targets | None:
        """Load the targets that `save` wrote under this key, or None.

        Raises:
            FileError: the file does not hold targets, or was changed since it was written.
        """
        path = self._path(key)
        if not path.exists():
            return None
        try:
            tensors, metadata, _ = load_tensors(path, (_TAG,), "the targets")
            return Targets.of_state(tensors, metadata, self._topology.device)
        except (FileError, KeyError, TypeError) as error:
            text = "{path} holds no targets (it is damaged, or of another kind); delete it, they are sought again then"
            raise FileError(path, text) from error

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}.safetensors"

    def _checksums(self, paths: Sequence[str]) -> dict[str, str]:
        return {path: f"{self._parameters[path].dtype} {checksum(plain(self._parameters[path]))}" for path in paths}
