"""Detect adapters that are not merged: a model with one would be saved without its edits, or under wrong names.

Adapters are recognized without importing peft, by what it leaves in a model: wrappers with a `peft_config`, layers with
a `base_layer` or an `original_module`, and the mark that transformers sets for its own adapters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from fastedit.errors import ModelError, listed

_INSIDE = ("base_layer", "original_module")  # where an adapter's layer keeps the layer that it replaces
_WHAT_TO_DO = (
    "edits would not be saved with it. Merge it first, by model = model.merge_and_unload() of the PeftModel (which "
    "peft.PeftModel.from_pretrained makes of a model and a folder of its adapter), or load the model without it"
)


def check_no_adapter(model: nn.Module, network: nn.Module) -> None:
    """Raise ModelError if a model carries an adapter.

    Args:
        model: the model as it was given.
        network: the Hugging Face model inside it, or `model` itself.

    Raises:
        ModelError: names the adapters and their modules, and says what to do.
    """
    wrappers = list(_wrappers(model, network))
    layers = [path for path, module in network.named_modules() if any(name in module._modules for name in _INSIDE)]
    marked = bool(getattr(network, "_hf_peft_config_loaded", False))
    if not (wrappers or layers or marked):
        return
    configs = [getattr(module, "peft_config", None) for module in (*wrappers, network)]
    names = sorted({str(name) for config in configs if isinstance(config, Mapping) for name in config})
    which = (
        f"the {'adapter' if len(names) == 1 else 'adapters'} {listed([repr(name) for name in names])}"
        if names
        else "an adapter"
    )
    where = f" in {len(layers)} modules, {layers[0]} among them" if layers else ""
    raise ModelError(f"{type(network).__name__} carries {which}{where}, not merged: {_WHAT_TO_DO}")


def _wrappers(model: nn.Module, network: nn.Module) -> Iterator[nn.Module]:
    """The modules around the network that have a `peft_config` of their own.

    The network itself keeps one after `merge_and_unload`, and a wrapper such as torch.compile's passes it on.
    """
    for module in model.modules():
        if module is network:
            return
        if "peft_config" in vars(module) or hasattr(type(module), "peft_config"):
            yield module
