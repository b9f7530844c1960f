"""Load models from checkpoints."""

from __future__ import annotations

import json
import logging
import os
import re
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from weakref import finalize

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastedit.errors import ConfigError, ModelError, reason
from fastedit.models import has_quantized, plain_state, topology
from fastedit.models.offload import drop_idle_hooks
from fastedit.saving import architecture_of

_log = logging.getLogger(__name__)

_DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
_PARTS = {
    "config.json": ("config.json",),
    "weights as *.safetensors": ("*.safetensors",),
    "the tokenizer's files": ("tokenizer.json", "tekken.json", "vocab*", "merges.txt", "*.model", "*.tiktoken"),
}
_BLOCK = re.compile(r"(?:^|\.)(?:layers|h)\.(\d+)\.")


@plain_state
def load_model(
    name: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    offload: str | None = None,
) -> tuple[Any, Any]:
    """Load model and tokenizer from a folder or by hub name. Reads only safetensors and runs no remote code.

    A path that ends in ".gguf" is read by transformers' GGUF reader, and its weights are dequantized.

    Args:
        dtype: dtype of the weights, such as "bfloat16" or torch.bfloat16; "auto" is the checkpoint's own, and for a
            GGUF file fp32 on a CPU and bf16 elsewhere.
        device: None is the GPU if there is one.
        offload: "prefix" leaves the weights of the blocks in the checkpoint's files. They are read when a block runs;
            an edit loads the blocks from the lowest edited one on.

    Raises:
        ModelError: the model cannot be found or loaded, or its weights do not match its config.json; the folder holds
            an adapter; the packages that read GGUF files, or offloaded weights, are not installed.
        ConfigError: an unknown dtype or offload, or a device that cannot be used.
    """
    if not isinstance(name, str | Path):
        raise ConfigError(f"name is {name!r}; give a folder or a hub name")
    if (dtype_name := str(dtype).removeprefix("torch.")) not in _DTYPES:
        raise ConfigError(f"dtype is {dtype!r}; give one of {', '.join(_DTYPES)}")
    if offload not in (None, "prefix"):
        raise ConfigError(f"offload is {offload!r}; give prefix, or None to load the whole model")
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device is None else device
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ConfigError(f"device is {device!r}, which cannot be used: {reason(error)}; give another") from error
    refuse_adapter(Path(name))
    source, gguf, options = name, {}, {}
    if str(name).lower().endswith(".gguf"):
        _check_gguf(Path(name))
        # the folder of a link, not of its target: the hub's cache consists of links to files with other names
        source, gguf = Path(name).absolute().parent, {"gguf_file": Path(name).name}
        if (gguf_config := getattr(transformers, "GgufConfig", None)) is not None:  # older versions always dequantize
            options = {"quantization_config": gguf_config(dequantize=True)}
        if dtype_name == "auto":
            dtype_name = "float32" if torch.device(device).type == "cpu" else "bfloat16"
    if offload:
        folder = TemporaryDirectory(prefix="fastedit-offload-")  # for weights whose form in the files is another one
        options = _offloaded(name, torch.device(device), folder.name)
    try:
        # without trust_remote_code=False transformers asks on stdin whether to run a checkpoint's code
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **gguf)
        model, loading = AutoModelForCausalLM.from_pretrained(
            source,
            **gguf,
            **options,
            dtype=dtype_name,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            output_loading_info=True,
        )
    except Exception as error:  # whatever a wrong file makes transformers, tokenizers or safetensors raise
        raise ModelError(_why_not_loaded(name, error)) from error
    _check_weights(name, model, loading)
    if gguf:
        if (quantizer := getattr(model, "hf_quantizer", None)) is not None:
            quantizer.remove_quantization_config(model)  # with this left, the model could not be saved
        model.config._name_or_path = str(name)
        _log.warning("%s was dequantized to %s; it is saved as an ordinary checkpoint in this dtype", name, dtype_name)
    if offload:
        finalize(model, folder.cleanup)
        drop_idle_hooks(model)
    elif not has_quantized(model) or model.device.type != torch.device(device).type:
        model = model.to(device)
    return model.eval(), tokenizer


def _offloaded(name: str | Path, device: torch.device, folder: str) -> dict[str, Any]:
    """Arguments of transformers' `from_pretrained` that leave the weights of the blocks in their files.

    Raises:
        ModelError: a GGUF file, or accelerate is not installed; the model cannot be found, or has no list of blocks.
    """
    if str(name).lower().endswith(".gguf"):
        raise ModelError(f"{name}: the weights of a GGUF file are dequantized once, and cannot be read block by block")
    if find_spec("accelerate") is None:
        raise ModelError("to offload weights accelerate must be installed: pip install 'fastedit-llm[offload]'")
    try:
        parts = topology(architecture_of(Path(name)))
    except (OSError, ModelError) as error:
        raise ModelError(_why_not_loaded(name, error)) from error
    device_name = (
        str(device) if device.type != "cuda" or device.index is not None else f"cuda:{torch.cuda.current_device()}"
    )
    device_map: dict[str, str] = {}
    outer, path = parts.model, ""
    for name_below in parts.blocks_path.split("."):
        device_map |= {f"{path}{child}": device_name for child, _ in outer.named_children() if child != name_below}
        outer, path = outer.get_submodule(name_below), f"{path}{name_below}."
    device_map |= {f"{path}{i}": "disk" for i in range(parts.n_blocks)}
    return {"device_map": device_map, "offload_folder": folder}


def slow_dtype_note(network: Any) -> list[str]:
    """A note if the weights are bf16 or fp16 and the CPU has no units for them: float32 is many times faster there."""
    dtype = next(network.parameters()).dtype
    names = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    if network.device.type != "cpu" or dtype not in names:
        return []
    supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{names[dtype]}_supported", None)
    if supported is None or supported():
        return []
    return [
        f"the weights are {names[dtype]}, for which this processor has no units; float32 (--dtype float32) is many "
        "times faster here and takes twice the memory"
    ]


def _check_weights(name: str | Path, model: Any, loading: dict[str, Any]) -> None:
    """Refuse a model whose weights are not those of its config.json."""
    if wrong := sorted(loading["mismatched_keys"]):
        path, *shapes = [wrong[0]] if isinstance(wrong[0], str) else wrong[0]  # transformers 4 gives only names
        comparison = ", but by its config.json it should be ".join(str(list(shape)) for shape in shapes)
        raise ModelError(f"{name}: {path} is {comparison or 'of another shape than its config.json says'}")
    if missing := sorted(loading["missing_keys"]):
        raise ModelError(f"{name} lacks {len(missing)} weights of its architecture, {missing[0]} among them")
    blocks = int(model.config.get_text_config().num_hidden_layers)
    # other unexpected weights are harmless, such as masks and rotations in old checkpoints
    if extra := [k for k in sorted(loading["unexpected_keys"]) if (m := _BLOCK.search(k)) and int(m[1]) >= blocks]:
        raise ModelError(
            f"{name} has {len(extra)} weights of blocks beyond the {blocks} of its config.json, {extra[0]} among "
            "them; give the config.json that belongs to the weights"
        )


def _check_gguf(file: Path) -> None:
    """Raise ModelError if there is no such file, or the packages that read it are not installed."""
    if not file.is_file():
        raise ModelError(f"there is no file {file}; give the path of a GGUF file on this machine")
    if missing := [name for name in ("gguf", "accelerate") if find_spec(name) is None]:
        raise ModelError(
            f"{file} is a GGUF file, and to read it {' and '.join(missing)} must be installed: pip install "
            "'fastedit-llm[gguf]'"
        )


def refuse_adapter(folder: Path) -> None:
    """Raise ModelError if a folder holds an adapter, with or without a model.

    With peft installed, transformers would load the adapter and the model that it was made for, wherever that is.
    """
    file = folder / "adapter_config.json"
    if not file.is_file():
        return
    try:
        base = json.loads(file.read_text("utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        base = None
    base = str(base or "MODEL")  # null if the model came from no folder
    alternative = ", or take adapter_config.json away to edit the model without it" if _has_model(folder) else ""
    raise ModelError(
        f"{folder} holds an adapter of {base}, with which edits would not be saved. Merge it: "
        f"peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base!r}), {str(folder)!r})"
        f".merge_and_unload().save_pretrained(NEW), and give the folder NEW with the tokenizer's files{alternative}"
    )


def _has_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any(folder.glob("model*.safetensors"))


def _why_not_loaded(name: str | Path, error: Exception) -> str:
    """The reason why a checkpoint could not be loaded: a fault of the folder, or the hub's answer."""
    folder = Path(name)
    if not os.path.exists(folder):
        return f"no folder {name}, and no model could be loaded from the hub: {reason(error)}"
    gguf = folder.suffix.lower() == ".gguf"
    why = reason(error) if folder.is_dir() or gguf else "it is neither a folder nor a GGUF file"
    if folder.is_dir():
        files = {part: [path for glob in names for path in folder.glob(glob)] for part, names in _PARTS.items()}
        if missing := [part for part, paths in files.items() if not paths]:
            why = f"it lacks {' and '.join(missing)}"
        for path in (path for paths in files.values() for path in paths):
            try:
                path.open("rb").close()
            except OSError as unreadable:
                why = f"{path.name} cannot be read: {unreadable.strerror}"
    return f"no model could be loaded from {name}: {why}"
