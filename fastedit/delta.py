"""An edit as an object: additive weight updates that can be applied, reverted, saved and loaded."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fastedit.errors import ModelError
from fastedit.files import replacing
from fastedit.models import LowRank, Update, add_, checksum, fingerprint, topology
from fastedit.models.fingerprint import FP16
from fastedit.models.topology import check_editable

_DENSE, _FACTORED = "fastedit-delta-1", "fastedit-delta-2"  # the second one may hold factors
_LEFT, _RIGHT = "..left", "..right"  # no parameter's path has two dots in a row


class WeightDelta:
    """Additive updates of a model's parameters.

    Args:
        updates: path of each parameter -> fp32 update of its shape, as a tensor or in factors.
        metadata: method, configuration, fingerprint of the unedited model, versions; JSON-able.
        originals: the parameters before, when the model already holds the updates.
    """

    def __init__(
        self,
        updates: Mapping[str, Update],
        metadata: Mapping[str, Any],
        *,
        applied_to: nn.Module | None = None,
        originals: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.updates = dict(updates)
        self.metadata = dict(metadata)
        self._model = applied_to
        self._originals = dict(originals or {})
        self._sums = {} if applied_to is None else _checksums(_parameters(applied_to, self._originals))

    @property
    def applied(self) -> bool:
        """Whether a model holds these updates now."""
        return self._model is not None

    def applied_to(self, model: nn.Module) -> bool:
        """Whether this model holds these updates now."""
        return self._model is topology(model).model

    @torch.no_grad()
    def apply(self, model: nn.Module, *, force: bool = False) -> None:
        """Add the updates to the model's parameters, in fp32, rounded once to the parameter's dtype.

        Raises:
            ModelError: already applied; another model (by fingerprint; `force` skips that check only); a
                parameter that the model lacks or has in another shape; quantized or offloaded weights. Nothing is
                changed then.
        """
        if self.applied:
            raise ModelError("this delta is already applied; revert it first, or load it again for another model")
        parts = topology(model)
        check_editable(parts)
        inner = parts.model
        parameters = dict(inner.named_parameters())
        for path, update in self.updates.items():
            if path not in parameters:
                raise ModelError(f"the model has no parameter {path}, which the delta updates")
            if parameters[path].shape != update.shape:
                raise ModelError(
                    f"{path} has shape {tuple(parameters[path].shape)}, the delta was made for {tuple(update.shape)}"
                )
        made_for = self.metadata.get("fingerprint")
        if not force and made_for != fingerprint(inner):
            raise ModelError(
                f"the delta was made for a model with fingerprint {made_for}, this one has {fingerprint(inner)}; "
                f"load the unedited model it was made for ({FP16}), or force it"
            )
        self._originals = {path: parameters[path].detach().clone() for path in self.updates}
        try:
            for path, update in self.updates.items():
                add_(parameters[path], update)
            self._sums = _checksums(_parameters(inner, self._originals))
        except BaseException:
            self._restore(parameters)
            raise
        self._model = inner

    @torch.no_grad()
    def revert(self) -> None:
        """Put the parameters back, bit for bit.

        Raises:
            ModelError: not applied, or the parameters were changed since: by an edit made on top, which has to
                be reverted first, or by the caller.
        """
        if self._model is None:
            raise ModelError("this delta is not applied to a model; there is nothing to revert")
        for path, now in _checksums(_parameters(self._model, self._originals)).items():
            if now != self._sums[path]:
                raise ModelError(
                    f"{path} was changed after this edit: by a later edit (revert the later edits first, the last one "
                    "before the others) or by something else (undo that, or load the model again)"
                )
        self._restore(dict(self._model.named_parameters()))
        self._model = None

    def _restore(self, parameters: Mapping[str, Tensor]) -> None:
        for path, original in self._originals.items():
            parameters[path].copy_(original)
        self._originals, self._sums = {}, {}

    def save(self, path: str | Path) -> None:
        """Write a safetensors file: updates and metadata. An existing file stays whole if writing fails.

        Raises:
            ModelError: the file cannot be written (a full disk, say).
        """
        tensors: dict[str, Tensor] = {}
        for name, update in self.updates.items():
            if isinstance(update, LowRank):
                tensors |= {name + _LEFT: update.left, name + _RIGHT: update.right}
            else:
                tensors[name] = update
        tensors = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
        metadata = {"format": _DENSE if tensors.keys() == self.updates.keys() else _FACTORED}
        metadata["fastedit"] = json.dumps(self.metadata)
        metadata["checksums"] = json.dumps(_checksums(tensors))
        try:
            with replacing(Path(path)) as temporary:
                save_file(tensors, temporary, metadata)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path}: the delta could not be saved: {error}; nothing was written") from error

    @classmethod
    def load(cls, path: str | Path) -> WeightDelta:
        """Read a file written by `save`.

        Raises:
            ModelError: missing, truncated, changed since it was written, or not a delta.
        """
        try:
            with safe_open(path, "pt") as file:
                header = file.metadata() or {}
                if header.get("format") not in (_DENSE, _FACTORED):
                    raise ModelError(f"{path} is no fastedit delta (its header lacks format {_DENSE} or {_FACTORED})")
                # copies: a tensor that is mapped changes with the file, or crashes when it gets shorter
                tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118  # no mapping
            if "checksums" in header and json.loads(header["checksums"]) != _checksums(tensors):
                raise ValueError("changed since it was written")
            updates: dict[str, Update] = {}
            for key in list(tensors):
                if not key.endswith((_LEFT, _RIGHT)):
                    updates[key] = tensors[key]
                elif (name := key.removesuffix(_LEFT).removesuffix(_RIGHT)) not in updates:
                    updates[name] = LowRank(tensors[name + _LEFT], tensors[name + _RIGHT])
            return cls(updates, json.loads(header["fastedit"]))
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path}: not a readable safetensors file: {error}") from error
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{path}: the delta is damaged ({error!r}); make the edit again") from error


def _parameters(model: nn.Module, paths: Iterable[str]) -> dict[str, Tensor]:
    """As they are: what an update was added to could round another way if it were added anew."""
    parameters = dict(model.named_parameters())
    return {path: parameters[path] for path in paths}


def _checksums(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """What is true of these very bits, and of this dtype and shape."""
    return {name: f"{t.dtype} {list(t.shape)} {checksum(t)}" for name, t in tensors.items()}


def versions() -> dict[str, str]:
    """Versions of this package and of those that an edit's numbers depend on."""
    found = {}
    for name in ("fastedit", "torch", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from a source tree
            found[name] = "unknown"
    return found
