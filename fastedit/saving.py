"""Save models as checkpoints, and verify the written files.

What transformers writes depends on the model's Python objects: an adapter, a shared tensor or a wrapped module changes
the names in the files, or leaves weights out, without an error. So the files are compared with the architecture that
their own config.json describes, and with the model's weights, bit for bit.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from fastedit.errors import FileError, ModelError, listed, reason
from fastedit.files import check_directory, replacing_directory, trying_directory
from fastedit.models import Model, has_quantized, is_offloaded, read_weight

_REPORTS = ("report.json", "report.html")  # of the edit that made the checkpoint
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".undo"}


def save_model(model: Model, directory: str | Path) -> None:
    """Write model and tokenizer as an ordinary Hugging Face checkpoint that appears whole or not at all.

    In the folder that the model was loaded from, subfolders and files beside its weights stay, such as a README.

    Raises:
        FileError: `directory` exists and is not an empty folder or a checkpoint, or it holds what the
            model was loaded from; the model cannot be saved in a way that loads as the same model; the disk is full.
    """
    network: Any = model.network
    directory, source = Path(directory), str(network.config._name_or_path)
    in_place = os.path.exists(source) and Path(source).resolve() == directory.resolve()
    if os.path.exists(source) and not in_place:
        check_directory(directory, {"the model": Path(source)})
    try:
        with replacing_directory(directory) as temporary:
            write_checkpoint(model, temporary)
            if in_place:
                copy_settings(directory, temporary, all_folders=True)
    except (OSError, ModelError) as error:
        if isinstance(error, FileError):  # about the folder itself
            raise
        raise FileError(directory, f"the model could not be saved: {error}; nothing was written") from error


def check_saves(model: Model, directory: Path) -> None:
    """Check before the work that `write_checkpoint` can write the model at the end; `directory` stays as it is.

    Raises:
        ModelError: quantized weights; the configuration, the settings of generation or the tokenizer cannot be
            written; the weights are not those of an architecture. FileError: there is no room for the weights.
    """
    state = model.network.state_dict()
    with trying_directory(directory) as temporary:
        _separate(state, _write_all_but_weights(model, temporary))
    check_room(directory, sum({_memory(name, tensor): tensor.nbytes for name, tensor in state.items()}.values()))


def check_room(directory: Path, needed: int) -> None:
    """Check before the work that the disk has room for a model of `needed` bytes. Raises FileError."""
    folder = next(parent for parent in directory.resolve().parents if parent.is_dir())
    room = shutil.disk_usage(folder)
    if room.total and room.free < needed:  # some file systems do not tell
        shortage = f"needs {needed / 1e9:.1f} GB for the model, and {room.free / 1e9:.1f} GB are free in {folder}"
        raise FileError(directory, f"{{path}} {shortage}; make room, or give another place")


def write_checkpoint(model: Model, folder: Path) -> None:
    """Write model and tokenizer to a folder, and verify the weights by reading them again.

    Raises:
        ModelError: as for `check_saves`; the files do not hold the model's weights. OSError: writing failed.
    """
    network: Any = model.network
    layout = _write_all_but_weights(model, folder)
    state = _separate(network.state_dict(), layout)
    shards = {"max_shard_size": 2 * _largest(model)} if is_offloaded(network) else {}
    _attempt(network.save_pretrained, folder, state_dict=dict(state), **shards)
    _check_files(network, folder, state, layout)
    _write_index(folder)
    if source := str(network.config._name_or_path):  # how images are read is in no object that there is here
        copy_settings(Path(source), folder, "*processor_config.json")


def copy_settings(checkpoint: Path, folder: Path, pattern: str = "*", *, all_folders: bool = False) -> None:
    """Copy what a checkpoint holds beside weights, if the folder has nothing of that name yet.

    Reports and undo files are no settings, nor are subfolders that are hidden or hold weights, unless `all_folders`.
    """
    for path in checkpoint.glob(pattern):
        target = folder / path.name
        if target.exists() or path.suffix in _WEIGHTS or path.name in _REPORTS:
            continue
        if path.is_file():
            shutil.copyfile(path, target)
        elif all_folders or not (path.name.startswith(".") or any(p.suffix in _WEIGHTS for p in path.rglob("*"))):
            shutil.copytree(path, target, symlinks=all_folders)


def _largest(model: Model) -> int:
    """Bytes of the largest block: of an offloaded model, no more than two are in host memory."""
    return max(sum(p.nbytes for p in block.parameters()) for block in model.topology.blocks)


def _write_index(folder: Path) -> None:
    """Write an index for a single file of weights: without one, some servers read all safetensors files, deltas too."""
    file, index = folder / SAFE_WEIGHTS_NAME, folder / SAFE_WEIGHTS_INDEX_NAME
    if index.exists() or not file.exists():
        return
    with safe_open(file, "pt") as weights:
        weight_map = {name: file.name for name in weights.keys()}  # noqa: SIM118  # not a mapping
    with file.open("rb") as content:  # it begins with the length of its header
        header = 8 + int.from_bytes(content.read(8), "little")
    entries = {"metadata": {"total_size": file.stat().st_size - header}, "weight_map": weight_map}
    index.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class _Layout:
    """How a reader of a checkpoint sees its weights.

    Attributes:
        shapes: name in the model -> shape, for each weight of the architecture.
        names: name in the model -> name in the files, without weights that transformers leaves out. None if it splits
            or joins weights when it saves them, as it does with fused experts.
        ties: groups of names that the architecture ties to one tensor.
    """

    shapes: Mapping[str, torch.Size]
    names: Mapping[str, str] | None
    ties: tuple[frozenset[str], ...]

    def group(self, name: str) -> frozenset[str]:
        """The names that are tied to this one, itself included."""
        return next((group for group in self.ties if name in group), frozenset([name]))


def _write_all_but_weights(model: Model, folder: Path) -> _Layout:
    """Write the tokenizer, save all but the weights to a trial folder, and return the layout that a reader will see."""
    network: Any = model.network
    if has_quantized(network):
        raise ModelError(
            "some of its weights are quantized, and a checkpoint would keep them so; save the delta, and put it onto "
            "the model in floating point: WeightDelta.load(FILE).apply(model, force=True)"
        )
    _attempt(model.tokenizer.save_pretrained, folder)
    names = list(network.state_dict())
    with tempfile.TemporaryDirectory(dir=folder) as trial:
        file_names = names_in_files(network, Path(trial))
        architecture = architecture_of(Path(trial)).state_dict(keep_vars=True)
    groups: dict[int, set[str]] = {}
    for name, parameter in architecture.items():
        groups.setdefault(id(parameter), set()).add(name)
    left_out = set(network._keys_to_ignore_on_save or ())
    return _Layout(
        {name: parameter.shape for name, parameter in architecture.items()},
        file_names
        and {name: file_names.get(name, name) for name in names if name in file_names or name not in left_out},
        tuple(frozenset(group) for group in groups.values() if len(group) > 1),
    )


def names_in_files(network: Any, trial: Path) -> dict[str, str] | None:
    """Name of each weight in the model -> its name in the files; None if transformers splits or joins weights.

    Args:
        trial: an empty folder; afterwards it holds a checkpoint without its weights.

    Raises:
        ModelError: transformers cannot write the model.
    """
    # save numbers in place of the weights, to see which weight has which name
    names = list(network.state_dict())
    marks = {name: torch.tensor([i]) for i, name in enumerate(names)}
    try:
        _attempt(network.save_pretrained, trial, state_dict=marks)
        return {names[int(tensor)]: saved for saved, tensor in _tensors(trial)}
    except ModelError:
        _attempt(network.save_pretrained, trial, state_dict={})  # raises if the cause is something else
        return None


def architecture_of(folder: Path) -> Any:
    """The model that a folder's config.json describes, on the meta device. Raises ModelError."""
    return _attempt(_made_of_nothing, folder)


def _made_of_nothing(folder: Path) -> Any:
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def _separate(state: Mapping[str, Tensor], layout: _Layout) -> dict[str, Tensor]:
    """The weights by name; weights that share memory are cloned, unless the architecture ties them.

    Raises:
        ModelError: they are not the weights of the architecture.
    """
    _compare_names(state, layout.shapes, "the model")
    wrong = [
        f"{name} of shape {list(state[name].shape)} instead of {list(shape)}"
        for name, shape in layout.shapes.items()
        if state[name].shape != shape
    ]
    if wrong:
        raise ModelError(f"{len(wrong)} weights are not as the model's config describes them: {listed(wrong)}")
    for group in layout.ties:
        first, *others = sorted(group)
        if differ := [name for name in others if not _same(state[name], state[first])]:
            raise ModelError(
                f"the model's config ties {listed(differ)} to {first}, but their values differ; set "
                "tie_word_embeddings to False in the config"
            )
    groups: dict[tuple[Any, ...], frozenset[str]] = {}
    separate = {}
    for name, tensor in state.items():
        group = layout.group(name)
        shared = tensor.numel() > 0 and groups.setdefault(_memory(name, tensor), group) != group
        separate[name] = tensor.clone() if shared else tensor
    return separate


def _memory(name: str, tensor: Tensor) -> tuple[Any, ...]:
    """Where a weight is in memory; offloaded ones are nowhere, and have only their names."""
    return (name,) if tensor.is_meta else (tensor.device, tensor.data_ptr())


def _check_files(network: Any, folder: Path, state: Mapping[str, Tensor], layout: _Layout) -> None:
    """Check that the files hold exactly the weights of the architecture, with the bits of the model.

    Raises:
        ModelError: names weights that are missing, unexpected or different.
    """
    if (names := layout.names) is None:
        _check_loaded(network, folder, state)
        return
    owners, written, wrong = {saved: name for name, saved in names.items()}, set(), []
    for saved, tensor in _tensors(folder):
        written.add(saved)
        if saved in owners and not _same(tensor, _values(network, owners[saved], state[owners[saved]])):
            wrong.append(saved)
    tied = {saved for name, saved in names.items() if any(names.get(n) in written for n in layout.group(name))}
    _compare_names(written | tied, owners, "what was written")
    if wrong:
        raise ModelError(f"{len(wrong)} weights in the files are not the model's: {listed(wrong)}")


def _values(network: Any, name: str, tensor: Tensor) -> Tensor:
    """The values of a weight, which is read from its file if it is offloaded."""
    return read_weight(network, name) if tensor.is_meta else tensor


def _check_loaded(network: Any, folder: Path, state: Mapping[str, Tensor]) -> None:
    """Check that loading the files gives the model's weights. Takes memory for a second model; raises ModelError."""
    loaded: Any = _attempt(AutoModelForCausalLM.from_pretrained, folder, dtype="auto", use_safetensors=True)
    loaded_state: Mapping[str, Tensor] = loaded.state_dict()
    _compare_names(loaded_state, state, "what was written")
    wrong = [name for name, tensor in loaded_state.items() if not _same(tensor, _values(network, name, state[name]))]
    if wrong:
        raise ModelError(f"{len(wrong)} weights are not read as the model has them: {listed(wrong)}")


def _compare_names(names: Iterable[str], wanted: Iterable[str], what: str) -> None:
    """Raise ModelError if names are missing or unexpected."""
    unexpected, missing = sorted({*names} - {*wanted}), sorted({*wanted} - {*names})
    problems = [f"lacks {len(missing)} weights of its architecture: {listed(missing)}"] if missing else []
    problems += [f"has {len(unexpected)} that are not of its architecture: {listed(unexpected)}"] if unexpected else []
    if problems:
        raise ModelError(f"{what} {', and '.join(problems)}; is a part of the model wrapped, or replaced?")


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of all safetensors files of a folder, one at a time."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118  # not a mapping
                    yield name, file.get_tensor(name)
        except SafetensorError as error:
            raise ModelError(f"{path.name} cannot be read again: {error}") from error


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same bits, those of NaN and of the sign of zero included."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    if one.device == other.device and one.data_ptr() == other.data_ptr() and one.stride() == other.stride():
        return True
    pair = (t.detach().to(one.device).contiguous().reshape(-1).view(torch.uint8) for t in (one, other))
    return torch.equal(*pair)


def _attempt(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a function of transformers; any exception that is not an OSError becomes a ModelError."""
    try:
        with warnings.catch_warnings():  # about the size of shards, which is chosen here
            warnings.filterwarnings("ignore", "Attempting to save a model with offloaded modules")
            return function(*args, **kwargs)
    except OSError:
        raise
    except Exception as error:
        raise ModelError(reason(error).rstrip(".")) from error  # callers continue the sentence
