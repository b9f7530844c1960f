"""Linear maps with quantized weights, by any package: they may stay frozen while another matrix is edited.

They are recognized by their weight: it is not a plain floating-point tensor (bitsandbytes, torchao), or there is no
parameter of that name (GPTQ and its relatives).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fastedit.errors import ModelError, listed
from fastedit.models.block_parts import is_projection, widths
from fastedit.models.offload import read_weight

EDITABLE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def is_quantized(module: nn.Module) -> bool:
    """Whether a module is a linear map that computes with a quantized weight."""
    if not is_projection(module):
        return False
    weight = getattr(module, "weight", None)  # some layers have no such parameter
    if weight is None or type(weight.data) is not Tensor:
        return True
    if type(module) in (nn.Linear, Conv1D):  # these compute with the weight as it is stored
        return False
    return weight.dtype not in EDITABLE or tuple(weight.shape) != widths(module)[::-1]


def has_quantized(model: nn.Module) -> bool:
    """Whether some weights of a model are quantized."""
    return any(is_quantized(module) for module in model.modules())


def check_plain(model: nn.Module, paths: Iterable[str]) -> None:
    """Check that no linear map at or below these paths is quantized.

    Raises:
        ModelError: some are; names all of them, and says how to load the model.
    """
    maps: dict[str, nn.Module] = {}
    for path in paths:
        for name, module in model.get_submodule(path).named_modules():
            if is_quantized(module):
                maps[".".join(filter(None, (path, name)))] = module
    if maps:
        kinds = ", ".join(dict.fromkeys(type(module).__name__ for module in maps.values()))
        raise ModelError(
            f"{len(maps)} matrices to edit are quantized ({kinds}): {listed([*maps])}; choose others, or load the "
            f"model with these in floating point, by llm_int8_skip_modules={[*maps, 'lm_head']} of BitsAndBytesConfig "
            "(modules_to_not_convert of TorchAoConfig and others)"
        )


def plain(parameter: nn.Parameter) -> Tensor:
    """The values of a parameter, dequantized if they are not a plain tensor."""
    values = parameter.detach()
    return values if type(parameter.data) is Tensor else values.dequantize()


def stored(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Paths and values of all parameters, and of the buffers of quantized maps, as plain tensors."""
    for path, parameter in model.named_parameters():
        yield path, read_weight(model, path) if parameter.is_meta else plain(parameter)
    for path, module in model.named_modules():
        if is_quantized(module):
            yield from ((f"{path}.{name}", buffer) for name, buffer in module.named_buffers())
