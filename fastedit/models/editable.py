"""Whether this package can edit the weights of a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from fastedit.errors import ModelError, listed
from fastedit.models.block_parts import is_projection
from fastedit.models.offload import dispatched_parameters, load_weights, offloaded_parameters
from fastedit.models.quantized import EDITABLE, is_quantized
from fastedit.models.topology import Topology

_WHOLE = 'load it on one device, by Editor.from_pretrained(…, offload="prefix") if it is too large for that'
_OUTSIDE = (
    "load the model in fp32, bf16 or fp16, or with nothing quantized but linear maps of its blocks, by "
    "llm_int8_skip_modules of BitsAndBytesConfig (modules_to_not_convert of TorchAoConfig and others)"
)


def check_editable(topology: Topology) -> None:
    """Check that this package can edit the weights: they are whole, in reach of the last block, in floating point.

    Linear maps of the blocks may be quantized, unless they are to be edited (`quantized.check_plain`). Weights may be
    offloaded by accelerate; those that an edit trains are then loaded. They may be on several devices if accelerate
    moves what passes between these, and the head is where the last block is.

    Raises:
        ModelError: other weights are quantized, or weights are sharded, never loaded or on another device; names the
            parameter.
    """
    parameters = dict(topology.model.named_parameters())
    frozen = {id(p) for module in topology.blocks.modules() if is_quantized(module) for p in module.parameters()}
    offloaded = offloaded_parameters(topology.model)
    moved = dispatched_parameters(topology.model)
    needed = {id(p) for p in topology.head.parameters()}  # every edit computes losses
    for path, parameter in parameters.items():
        if parameter.dtype not in EDITABLE and id(parameter) not in frozen:
            raise ModelError(f"{path} holds {parameter.dtype}: it is quantized; {_OUTSIDE}")
        if id(parameter) in offloaded:
            continue
        if parameter.is_meta:
            raise ModelError(f"{path} is on the meta device: it was never loaded; {_WHOLE}")
        if parameter.is_inference():
            raise ModelError(f"{path} was made in torch.inference_mode() and cannot change; load the model outside it")
        if parameter.device != topology.device and (id(parameter) in needed or id(parameter) not in moved):
            raise ModelError(f"{path} is on {parameter.device}, but the last block on {topology.device}; {_WHOLE}")
    if is_quantized(topology.head):
        raise ModelError(f"the head to the vocabulary, a {type(topology.head).__name__}, is quantized; {_OUTSIDE}")
    if not isinstance(getattr(topology.head, "weight", None), Tensor):
        kind = type(topology.head).__name__
        raise ModelError(f"the head of {topology.name} is a {kind} without a weight; a linear map was expected")
    for path, module in topology.blocks.named_modules():
        if type(module) is nn.Linear and module.weight.shape != (module.out_features, module.in_features):
            expected = (module.out_features, module.in_features)
            raise ModelError(
                f"{topology.blocks_path}.{path}.weight has shape {tuple(module.weight.shape)}, expected {expected}: it "
                "is quantized or sharded; load the model in fp32, bf16 or fp16, on one device"
            )


def load_suffix(topology: Topology, layer: int) -> None:
    """Read the offloaded weights of block ``layer`` and those above it for good: an edit of it runs all of these.

    Raises:
        ModelError: they are not all on one device; names the blocks.
    """
    load_weights(topology.blocks[layer:])
    if elsewhere := [i for i in blocks_elsewhere(topology) if i >= layer]:
        raise ModelError(
            f"{len(elsewhere)} blocks from the edited block {layer} on are not on {topology.device} like the last one: "
            f"{listed([str(i) for i in elsewhere])}. Edit a block above {elsewhere[-1]}, or load the model with "
            "another device_map: an edit runs all blocks from its own on"
        )


def blocks_elsewhere(topology: Topology) -> list[int]:
    """The blocks with weights on another device than that of the last block; offloaded weights are on none."""
    here = {topology.device, torch.device("meta")}
    return [i for i, block in enumerate(topology.blocks) if {p.device for p in block.parameters()} - here]


def check_own(topology: Topology, layers: Iterable[int], module: str) -> None:
    """See that the weights of what ``module`` names in these blocks are parameters, and of no other block.

    One that is made of other tensors, as by weight_norm or pruning, is made anew in each pass, without the edit. An
    edit of a weight of two blocks would change both, and passes that run the lower blocks once would not see that.

    Raises:
        ModelError: names the weights that are not parameters, or the parameter and the other block.
    """
    resolved = {layer: topology.resolve(layer, module) for layer in layers}
    if made := [path for path_and_module in resolved.values() for path in _no_parameters(*path_and_module)]:
        raise ModelError(
            f"{len(made)} weights to edit are not parameters: {listed(made)}. They are made of other tensors, or are "
            "buffers; make them parameters first, by torch.nn.utils.parametrize.remove_parametrizations, prune.remove "
            "or remove_weight_norm"
        )
    owners: dict[int, list[int]] = {}
    for i, block in enumerate(topology.blocks):
        for parameter in block.parameters():
            owners.setdefault(id(parameter), []).append(i)
    for layer, (path, edited) in resolved.items():
        for name, parameter in edited.named_parameters():
            if others := [i for i in owners[id(parameter)] if i != layer]:
                text = f"{path}.{name} is a weight of block {', '.join(map(str, others))} too, and cannot be edited in"
                raise ModelError(f"{text} one of them; choose another module, or give each block its own copy")


def _no_parameters(path: str, edited: nn.Module) -> Iterator[str]:
    """The weights and biases of a module's linear maps that are tensors, but no parameters."""
    for name, submodule in edited.named_modules():
        for kind in ("weight", "bias") if is_projection(submodule) else ():
            if kind not in submodule._parameters and isinstance(getattr(submodule, kind, None), Tensor):
                yield ".".join(filter(None, (path, name, kind)))
