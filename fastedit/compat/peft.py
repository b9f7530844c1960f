"""Edits as LoRA adapters in PEFT's format, which vLLM and others serve beside the unedited model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fastedit.delta import WeightDelta
from fastedit.errors import ConfigError, FileError, ModelError, listed
from fastedit.files import BY_ADAPTER, check_directory, replacing_directory
from fastedit.models import plain_state, topology
from fastedit.weights import LowRank, truncated

_INSTEAD = "write the whole delta: fastedit export --dense or --merge"


@dataclass(frozen=True)
class Adapter:
    """An edit that consists of LoRA factors.

    Attributes:
        delta: what the adapter adds to the model.
        errors: path of each matrix -> the relative error of its factors; 0 if they are the edit's own.
        conv1d: the matrices that are stored [in, out], such as those of GPT-2.
        base: folder or hub name of the model.
    """

    delta: WeightDelta
    errors: dict[str, float]
    conv1d: frozenset[str]
    base: str

    @property
    def ranks(self) -> dict[str, int]:
        """Path of each matrix -> rank."""
        return {path: update.left.shape[1] for path, update in self._factors().items()}

    def save(self, directory: str | Path) -> None:
        """Write adapter_model.safetensors and adapter_config.json; the folder appears whole or not at all.

        An empty folder, or one that holds only an adapter, is replaced.

        Raises:
            FileError: the folder is something else, or cannot be written.
        """
        directory = Path(directory)
        metadata = {"format": "pt", "fastedit": json.dumps(self.delta.metadata)}
        try:
            with replacing_directory(directory, BY_ADAPTER) as folder:
                save_file(self._tensors(), folder / "adapter_model.safetensors", metadata)
                text = json.dumps(self._config(), indent=1) + "\n"
                (folder / "adapter_config.json").write_text(text, encoding="utf-8")
        except OSError as error:
            raise FileError(directory, f"the adapter could not be written: {error}; nothing was changed") from error

    def _factors(self) -> dict[str, LowRank]:
        return {path: update for path, update in self.delta.updates.items() if isinstance(update, LowRank)}

    def _tensors(self) -> dict[str, Tensor]:
        """lora_A [rank, in] and lora_B [out, rank] of each matrix."""
        tensors: dict[str, Tensor] = {}
        for path, update in self._factors().items():
            b, a = (update.right.T, update.left.T) if path in self.conv1d else (update.left, update.right)
            module = f"base_model.model.{path.removesuffix('.weight')}"
            tensors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
        return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}

    def _config(self) -> dict[str, Any]:
        """The configuration. The scale alpha / rank is 1 everywhere, also for readers that ignore the patterns."""
        ranks = {path.removesuffix(".weight"): rank for path, rank in self.ranks.items()}
        highest = max(ranks.values())
        pattern = {module: rank for module, rank in ranks.items() if rank != highest}
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.base,
            "r": highest,
            "lora_alpha": highest,
            "rank_pattern": pattern,
            "alpha_pattern": pattern,
            "target_modules": sorted(ranks),
            "fan_in_fan_out": bool(self.conv1d),
            "lora_dropout": 0.0,
            "bias": "none",
            "modules_to_save": None,
            "init_lora_weights": True,
            "inference_mode": True,
        }


@plain_state
def as_adapter(delta: WeightDelta, model: nn.Module, *, rank: int | None = None) -> Adapter:
    """Turn an edit into LoRA factors.

    Edits of MEMIT, EMMET, ROME and AlphaEdit are factors, whose rank is at most the number of edits: they are used as
    they are. Other edits, such as those of LocFT-BF, are truncated to a rank.

    Args:
        model: the model that the edit was made for, unedited or with this edit.
        rank: largest rank of each matrix; None leaves factors as they are.

    Raises:
        ModelError: the edit was made for another model, or changes weights that LoRA cannot represent: biases, norms,
            embeddings, tied or fused expert weights.
        ConfigError: no rank for an update that is not in factors, or a rank below 1.
    """
    if not delta.applied_to(model):
        delta.check(model)
    if rank is not None and rank < 1:
        raise ConfigError(f"rank is {rank}; give a number above 0")
    network: Any = topology(model).model
    conv1d = _carried(delta, network)
    dense = [path for path, update in delta.updates.items() if not isinstance(update, LowRank)]
    if dense and rank is None:
        raise ConfigError(
            f"{len(dense)} updates are not in factors: {listed(dense)}; give the rank to cut them to, such as 64, "
            f"or {_INSTEAD}"
        )
    updates, errors = {}, {}
    for path, update in delta.updates.items():
        most = min(*update.shape, rank or max(update.shape))
        exact = isinstance(update, LowRank) and update.left.shape[1] <= most
        updates[path], errors[path] = (update, 0.0) if exact else truncated(update, most)
    return Adapter(WeightDelta(updates, delta.metadata), errors, conv1d, str(network.config._name_or_path))


def export_peft(delta: WeightDelta, model: nn.Module, directory: str | Path, *, rank: int | None = None) -> Adapter:
    """Write an edit as a LoRA adapter: `as_adapter`, then `Adapter.save`.

    Raises:
        FileError, ModelError, ConfigError: as for these; whether the folder can be written is checked first.
    """
    check_directory(Path(directory), over=BY_ADAPTER)
    adapter = as_adapter(delta, model, rank=rank)
    adapter.save(directory)
    return adapter


def _carried(delta: WeightDelta, network: nn.Module) -> frozenset[str]:
    """The updated matrices that are stored [in, out]. Raises ModelError if LoRA cannot represent an update."""
    names: dict[int, list[str]] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    conv1d, refused = set(), []
    for path in delta.updates:
        owner, _, last = path.rpartition(".")
        module, same = network.get_submodule(owner), names[id(network.get_parameter(path))]
        if last != "weight" or not isinstance(module, nn.Linear | Conv1D):
            refused.append(f"{path} (of {type(module).__name__})")
        elif len(same) > 1:
            refused.append(f"{path} (tied to {listed([name for name in same if name != path])})")
        elif isinstance(module, Conv1D):
            conv1d.add(path)
    if refused or not delta.updates:
        raise ModelError(
            f"a LoRA adapter cannot carry {len(refused)} of the {len(delta.updates)} updates: {listed(refused)}; it "
            f"carries untied matrices of linear layers. {_INSTEAD[0].upper()}{_INSTEAD[1:]}"
            if refused
            else "the delta changes nothing; there is nothing to export"
        )
    return frozenset(conv1d)
