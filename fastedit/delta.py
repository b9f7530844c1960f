"""An edit as an object: additive weight updates that can be applied, reverted, saved and loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fastedit.errors import FileError, ModelError, TensorError, listed
from fastedit.models import check_plain, fingerprint, load_weights, plain_state, topology
from fastedit.models.editable import check_editable
from fastedit.models.fingerprint import FP16
from fastedit.tensorfile import checksums, load_tensors, save_tensors, writing
from fastedit.undo import undo_of
from fastedit.version import version_of
from fastedit.weights import LowRank, Snapshot, Update, add_, put_back

_DENSE, _FACTORED = "fastedit-delta-1", "fastedit-delta-2"  # tags of the file's layout; the second one may hold factors
_LEFT, _RIGHT = "..left", "..right"  # no parameter's path has two dots in a row


class WeightDelta:
    """Additive updates of a model's parameters.

    Args:
        updates: path of each parameter -> fp32 update of its shape, as a tensor or in factors.
        metadata: method, configuration, fingerprint of the unedited model, versions; serializable to JSON.
        applied_to: the model, if it already holds the updates.
        originals: the parameters before the updates, if a model holds them.
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
        self._sums = {} if applied_to is None else checksums(_parameters(applied_to, self._originals))

    @property
    def applied(self) -> bool:
        """Whether a model holds these updates now."""
        return self._model is not None

    def applied_to(self, model: nn.Module) -> bool:
        """Whether this model holds these updates now."""
        return self._model is topology(model).model

    def overwritten(self) -> list[str]:
        """The parameters that are not as these updates left them: something else has changed them since."""
        sums = {} if self._model is None else checksums(_parameters(self._model, self._originals))
        return [path for path, checksum in sums.items() if checksum != self._sums[path]]

    def changes(self, model: nn.Module, part: nn.Module) -> bool:
        """Whether these updates change a parameter of `part`, tied parameters included."""
        parameters, ids = dict(topology(model).model.named_parameters()), {id(p) for p in part.parameters()}
        return any(id(parameters.get(path)) in ids for path in self.updates)

    def check(self, model: nn.Module, *, force: bool = False) -> None:
        """Raise the errors that `apply` would raise, without changing the model."""
        if self.applied:
            raise ModelError("this delta is already applied; revert it first, or load it again for another model")
        parts = topology(model)
        check_editable(parts)
        inner = parts.model
        parameters = dict(inner.named_parameters())
        check_plain(inner, (path.rpartition(".")[0] for path in self.updates if path in parameters))
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

    @plain_state
    @torch.no_grad()
    def apply(self, model: nn.Module, *, force: bool = False) -> None:
        """Add the updates to the model's parameters, in fp32, rounded once to the parameter's dtype.

        Raises:
            ModelError: the delta is already applied, or was made for another model (compared by fingerprint; `force`
                skips only this check); the model lacks a parameter or has it in another shape; its weights are
                quantized. Nothing is changed then.
        """
        self.check(model, force=force)
        inner = topology(model).model
        load_weights(inner.get_submodule(path.rpartition(".")[0]) for path in self.updates)
        parameters = dict(inner.named_parameters())
        with Snapshot({path: parameters[path] for path in self.updates}) as snapshot:
            for path, update in self.updates.items():
                add_(parameters[path], update)
            sums = checksums(_parameters(inner, self.updates))
        self._originals, self._sums, self._model = snapshot.values, sums, inner

    @plain_state
    @torch.no_grad()
    def revert(self) -> None:
        """Put the parameters back, bit for bit.

        Raises:
            ModelError: the delta is not applied, or the parameters were changed after it: by a later edit, which has
                to be reverted first, or by the caller.
        """
        if self._model is None:
            raise ModelError("this delta is not applied to a model; there is nothing to revert")
        if changed := self.overwritten():
            raise ModelError(
                f"{listed(changed)} was changed after this edit: by a later edit (revert the later edits first, the "
                "last one before the others) or by something else (undo that, or load the model again)"
            )
        put_back(_parameters(self._model, self._originals), self._originals)
        self._originals, self._sums, self._model = {}, {}, None

    @plain_state
    def save(self, path: str | Path) -> None:
        """Write a safetensors file: updates and metadata. An existing file stays whole if writing fails.

        Raises:
            FileError: the file cannot be written (a full disk, say).
        """
        tensors: dict[str, Tensor] = {}
        for name, update in self.updates.items():
            if isinstance(update, LowRank):
                tensors |= {name + _LEFT: update.left, name + _RIGHT: update.right}
            else:
                tensors[name] = update
        tag = _DENSE if tensors.keys() == self.updates.keys() else _FACTORED
        save_tensors(path, tensors, tag, self.metadata, "the delta")

    def save_dense(self, path: str | Path) -> None:
        """Write the updates for other programs, as safetensors: per parameter, one fp32 tensor of its name and shape.

        Raises:
            FileError: the file cannot be written.
        """
        updates = {name: u.dense() if isinstance(u, LowRank) else u for name, u in self.updates.items()}
        with writing(path, "the updates could not be saved") as temporary:
            save_file({name: u.contiguous().cpu() for name, u in updates.items()}, temporary, {"format": "pt"})

    def save_undo(self, path: str | Path) -> None:
        """Write what `fastedit revert` needs to take the edit out of a checkpoint bit for bit.

        Raises:
            ModelError: the delta is not applied. FileError: the file cannot be written.
        """
        if self._model is None:
            raise ModelError("this delta is not applied to a model, so it does not know the weights before it")
        undo_of(self._originals, _parameters(self._model, self._originals), self.updates).save(path)

    @classmethod
    @plain_state
    def load(cls, path: str | Path) -> WeightDelta:
        """Read a file written by `save`.

        Raises:
            FileError: the file is missing, truncated, changed since it was written, or not a delta.
        """
        tensors, metadata, _ = load_tensors(path, (_DENSE, _FACTORED), "the delta")
        updates: dict[str, Update] = {}
        try:
            for key in tensors:
                if not key.endswith((_LEFT, _RIGHT)):
                    updates[key] = tensors[key]
                elif (name := key.removesuffix(_LEFT).removesuffix(_RIGHT)) not in updates:
                    updates[name] = LowRank(tensors[name + _LEFT], tensors[name + _RIGHT])
        except (KeyError, TensorError) as error:
            raise FileError(path, f"the delta is damaged ({error!r}); make the edit again") from error
        return cls(updates, metadata)


def _parameters(model: nn.Module, paths: Iterable[str]) -> dict[str, Tensor]:
    """The parameters at some paths, as they are in the model: adding updates anew could round differently."""
    parameters = dict(model.named_parameters())
    return {path: parameters[path] for path in paths}


def versions() -> dict[str, str]:
    """Versions of this package and of those that an edit's numbers depend on."""
    return {name: version_of(name) for name in ("fastedit", "torch", "transformers")}
