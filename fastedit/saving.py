"""Checkpoints from models, which are read again before they count.

What transformers writes depends on the model's Python objects: an adapter, a shared tensor or a wrapped module changes
the names in the files, or leaves weights out, without an error. So the files are compared with the architecture that
their own config.json describes, and with the model's weights, bit for bit.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
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
from fastedit.models import Model, has_quantized


def save_model(model: Model, directory: str | Path) -> None:
    """Write model and tokenizer as an ordinary Hugging Face checkpoint that appears whole or not at all.

    Raises:
        FileError: `directory` exists and is not an empty folder or a checkpoint, or it holds what the
            model was loaded from; the model cannot be saved so that it is read as it is; the disk is full.
    """
    network: Any = model.network
    directory, source = Path(directory), str(network.config._name_or_path)
    if os.path.exists(source) and Path(source).resolve() != directory.resolve():
        check_directory(directory, {"the model": Path(source)})
    try:
        with replacing_directory(directory) as temporary:
            write_checkpoint(model, temporary)
    except (OSError, ModelError) as error:
        if isinstance(error, FileError):  # about the folder itself
            raise
        raise FileError(directory, f"the model could not be saved: {error}; nothing was written") from error


def check_saves(model: Model, directory: Path) -> None:
    """See before the work that `write_checkpoint` could write the model at the end; `directory` stays as it is.

    Raises:
        ModelError: quantized weights; the configuration, the settings of generation or the tokenizer cannot be
            written; the weights are not those of an architecture. FileError: there is no room for the weights.
    """
    state = model.network.state_dict()
    with trying_directory(directory) as temporary:
        _separate(state, _write_all_but_weights(model, temporary))
    check_room(directory, sum({tensor.data_ptr(): tensor.nbytes for tensor in state.values()}.values()))


def check_room(directory: Path, needed: int) -> None:
    """See before the work that a folder has room for a model of so many bytes. Raises FileError."""
    place = next(parent for parent in directory.resolve().parents if parent.is_dir())
    room = shutil.disk_usage(place)
    if room.total and room.free < needed:  # some file systems do not tell
        gigabytes = f"needs {needed / 1e9:.1f} GB for the model, and {room.free / 1e9:.1f} GB are free in {place}"
        raise FileError(directory, f"{{path}} {gigabytes}; make room, or give another place")


def write_checkpoint(model: Model, folder: Path) -> None:
    """Write model and tokenizer to a folder, and read the weights again.

    Raises:
        ModelError: what `check_saves` refuses; other weights were written than the model has. OSError.
    """
    network: Any = model.network
    layout = _write_all_but_weights(model, folder)
    state = _separate(network.state_dict(), layout)
    _attempt(network.save_pretrained, folder, state_dict=dict(state))
    _check_files(folder, state, layout)
    _write_index(folder)


def _write_index(folder: Path) -> None:
    """Name the one file of weights in an index: without one some servers read all safetensors files, a delta too."""
    file, index = folder / SAFE_WEIGHTS_NAME, folder / SAFE_WEIGHTS_INDEX_NAME
    if index.exists() or not file.exists():
        return
    with safe_open(file, "pt") as weights:
        places = {name: file.name for name in weights.keys()}  # noqa: SIM118  # not a mapping
    with file.open("rb") as content:  # which begins with the length of its header
        header = 8 + int.from_bytes(content.read(8), "little")
    about = {"metadata": {"total_size": file.stat().st_size - header}, "weight_map": places}
    index.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class _Layout:
    """How a reader of a checkpoint sees its weights.

    Attributes:
        shapes: of the weights of the architecture, by their names in the model.
        names: these names -> those in the files; what transformers leaves out is not there. None if a weight is split
            or joined on its way to the files, as fused experts are.
        ties: groups of names that the architecture makes one tensor.
    """

    shapes: Mapping[str, torch.Size]
    names: Mapping[str, str] | None
    ties: tuple[frozenset[str], ...]

    def group(self, name: str) -> frozenset[str]:
        """The names that are one tensor with this one, itself included."""
        return next((group for group in self.ties if name in group), frozenset([name]))


def _write_all_but_weights(model: Model, folder: Path) -> _Layout:
    """Write the tokenizer, write all the rest elsewhere as a trial, and look at what a reader will see."""
    network: Any = model.network
    if has_quantized(network):
        raise ModelError(
            "some of its weights are quantized, and a checkpoint would keep them so; save the delta, and put it onto "
            "the model in floating point: WeightDelta.load(FILE).apply(model, force=True)"
        )
    _attempt(model.tokenizer.save_pretrained, folder)
    own = list(network.state_dict())
    with tempfile.TemporaryDirectory(dir=folder) as trial:
        found = names_in_files(network, Path(trial))
        architecture = architecture_of(Path(trial)).state_dict(keep_vars=True)
    groups: dict[int, set[str]] = {}
    for name, parameter in architecture.items():
        groups.setdefault(id(parameter), set()).add(name)
    left_out = set(network._keys_to_ignore_on_save or ())
    return _Layout(
        {name: parameter.shape for name, parameter in architecture.items()},
        found and {name: found.get(name, name) for name in own if name in found or name not in left_out},
        tuple(frozenset(group) for group in groups.values() if len(group) > 1),
    )


def names_in_files(network: Any, trial: Path) -> dict[str, str] | None:
    """Names of a model's weights -> those that transformers gives them in files; None if it splits or joins some.

    Args:
        trial: an empty folder, which has all of a checkpoint then but its weights.

    Raises:
        ModelError: transformers cannot write the model.
    """
    # numbers instead of weights: the numbers tell which is which
    own = list(network.state_dict())
    marks = {name: torch.tensor([i]) for i, name in enumerate(own)}
    try:
        _attempt(network.save_pretrained, trial, state_dict=marks)
        return {own[int(tensor)]: saved for saved, tensor in _tensors(trial)}
    except ModelError:
        _attempt(network.save_pretrained, trial, state_dict={})  # or it was not about the weights
        return None


def architecture_of(folder: Path) -> Any:
    """The model, on the meta device, that a config.json describes. Raises ModelError."""
    return _attempt(_made_of_nothing, folder)


def _made_of_nothing(folder: Path) -> Any:
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def _separate(state: Mapping[str, Tensor], layout: _Layout) -> dict[str, Tensor]:
    """The weights, of which only those share memory that a reader ties again.

    Raises:
        ModelError: they are not those of the architecture.
    """
    _compare_names(state, layout.shapes, "the model")
    other = [
        f"{name} of shape {list(state[name].shape)} instead of {list(shape)}"
        for name, shape in layout.shapes.items()
        if state[name].shape != shape
    ]
    if other:
        raise ModelError(f"{len(other)} weights are not as the model's config describes them: {listed(other)}")
    for group in layout.ties:
        first, *others = sorted(group)
        if differ := [name for name in others if not _same(state[name], state[first])]:
            raise ModelError(
                f"the model's config ties {listed(differ)} to {first}, but their values differ; set "
                "tie_word_embeddings to False in the config"
            )
    held: dict[tuple[Any, ...], frozenset[str]] = {}
    separate = {}
    for name, tensor in state.items():
        group, place = layout.group(name), (tensor.device, tensor.data_ptr())
        shared = tensor.numel() > 0 and held.setdefault(place, group) != group
        separate[name] = tensor.clone() if shared else tensor
    return separate


def _check_files(folder: Path, state: Mapping[str, Tensor], layout: _Layout) -> None:
    """See that the files hold exactly the weights of the architecture, with the bits of the model.

    Raises:
        ModelError: names what is missing, too much or different.
    """
    if (names := layout.names) is None:
        _check_loaded(folder, state)
        return
    owners, written, wrong = {saved: name for name, saved in names.items()}, set(), []
    for saved, tensor in _tensors(folder):
        written.add(saved)
        if saved in owners and not _same(tensor, state[owners[saved]]):
            wrong.append(saved)
    tied = {saved for name, saved in names.items() if any(names.get(n) in written for n in layout.group(name))}
    _compare_names(written | tied, owners, "what was written")
    if wrong:
        raise ModelError(f"{len(wrong)} weights in the files are not the model's: {listed(wrong)}")


def _check_loaded(folder: Path, state: Mapping[str, Tensor]) -> None:
    """See that the files are read as the model is. Takes its memory once more; raises ModelError."""
    loaded: Any = _attempt(AutoModelForCausalLM.from_pretrained, folder, dtype="auto", use_safetensors=True)
    again: Mapping[str, Tensor] = loaded.state_dict()
    _compare_names(again, state, "what was written")
    wrong = [name for name, tensor in again.items() if not _same(tensor, state[name])]
    if wrong:
        raise ModelError(f"{len(wrong)} weights are not read as the model has them: {listed(wrong)}")


def _compare_names(found: Iterable[str], wanted: Iterable[str], what: str) -> None:
    """Raises ModelError: names too few or too many."""
    more, fewer = sorted({*found} - {*wanted}), sorted({*wanted} - {*found})
    problems = [f"lacks {len(fewer)} weights of its architecture: {listed(fewer)}"] if fewer else []
    problems += [f"has {len(more)} that are not of its architecture: {listed(more)}"] if more else []
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
    """Bit for bit, NaN and the sign of zero too."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    if one.device == other.device and one.data_ptr() == other.data_ptr() and one.stride() == other.stride():
        return True
    pair = (t.detach().to(one.device).contiguous().reshape(-1).view(torch.uint8) for t in (one, other))
    return torch.equal(*pair)


def _attempt(function: Any, *args: Any, **kwargs: Any) -> Any:
    """What a function of transformers returns; whatever it raises, beside OSError, is a ModelError."""
    try:
        return function(*args, **kwargs)
    except OSError:
        raise
    except Exception as error:
        raise ModelError(reason(error).rstrip(".")) from error  # the message goes on
