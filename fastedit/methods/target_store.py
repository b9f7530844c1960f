"""Targets on disk, found again by everything that they depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastedit.errors import ModelError
from fastedit.files import check_writable, replacing
from fastedit.methods.base import Edit
from fastedit.methods.targets import TargetConfig, Targets, target_samples
from fastedit.models import Topology, checksum

_FORMAT = "fastedit-targets-1"
_TENSORS = [f.name for f in fields(Targets) if f.type == "Tensor"]
_OF_PLACE = ("_name_or_path", "transformers_version")  # of a config: not what the model computes


class TargetStore:
    """A folder of targets of one model, of which only the weights `written` change from now on.

    Raises:
        ModelError: the folder cannot be made.
    """

    def __init__(self, folder: str | Path, topology: Topology, written: Sequence[str]) -> None:
        self._folder, self._topology = Path(folder), topology
        check_writable(self._folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._parameters = dict(topology.model.named_parameters())
        self._written = sorted(written)
        config = topology.config.to_dict()
        self._model = {name: value for name, value in config.items() if name not in _OF_PLACE}
        self._still = self._checksums([path for path in self._parameters if path not in self._written])

    def key(
        self, tokenizer: Any, edits: Sequence[Edit], z_layer: int, config: TargetConfig, contexts: Sequence[str]
    ) -> str:
        """A hash of what the targets of these edits depend on, now: every bit of the weights, the model's config,
        the tokens of all texts, the target's configuration, and the edits' names, by which notes speak of them.
        """
        samples, last, _ = target_samples(self._topology, tokenizer, edits, contexts)
        weights = self._still | self._checksums(self._written)
        about = [_FORMAT, self._model, weights, z_layer, asdict(config), [edit.id for edit in edits]]
        digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
        for part in (samples.input_ids, samples.offsets, samples.target_start, last):
            digest.update(part.numpy().tobytes())
        return digest.hexdigest()[:32]

    def save(self, key: str, targets: Targets) -> Path:
        """Write `{key}.safetensors`, whole or not at all.

        Raises:
            ModelError: the file cannot be written.
        """
        path = self._path(key)
        tensors: dict[str, Tensor] = {name: getattr(targets, name).cpu().contiguous() for name in _TENSORS}
        header = {"format": _FORMAT, "lr": targets.lr, "dropped": targets.dropped, "notes": targets.notes}
        header["sums"] = {name: checksum(tensor) for name, tensor in tensors.items()}
        try:
            with replacing(path) as temporary:
                save_file(tensors, temporary, {"fastedit": json.dumps(header)})
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path}: the targets could not be saved: {error}; give another folder") from error
        return path

    def load(self, key: str) -> Targets | None:
        """What `save` wrote under this key, or None.

        Raises:
            ModelError: a file of that name that holds no targets, or that was changed since it was written.
        """
        path = self._path(key)
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                header = json.loads((file.metadata() or {})["fastedit"])
                if header["format"] != _FORMAT:
                    raise KeyError(header["format"])
                tensors = {name: file.get_tensor(name).clone() for name in _TENSORS}
            if header["sums"] != {name: checksum(tensor) for name, tensor in tensors.items()}:
                raise ValueError("changed since it was written")
            tensors = {name: tensor.to(self._topology.device) for name, tensor in tensors.items()}
            return Targets(**tensors, dropped=tuple(header["dropped"]), lr=header["lr"], notes=tuple(header["notes"]))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{path} holds no targets ({error!r}); delete it, they are sought again then") from error

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}.safetensors"

    def _checksums(self, paths: Sequence[str]) -> dict[str, str]:
        return {path: f"{self._parameters[path].dtype} {checksum(self._parameters[path])}" for path in paths}
