"""Offloaded weights: they stay in the checkpoint's files, and accelerate's hooks read them when their module runs.

A hook reads a module's weights for one pass. Where the same blocks make several passes, `streamed` keeps the weights of
one block in memory over all of them. Blocks that are trained, and those above, get their weights for good
(`load_weights`).
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Generator, Iterable, Sequence
from itertools import groupby, takewhile
from typing import Any

import torch
from torch import Tensor, nn


def offloaded_parameters(model: nn.Module) -> set[int]:
    """The ids of all parameters that are offloaded."""
    owners = (module for module in model.modules() if _hook(module) is not None)
    return {id(parameter) for module in owners for parameter in module.parameters(recurse=False)}


def dispatched_parameters(model: nn.Module) -> set[int]:
    """The ids of all parameters to whose device accelerate moves what their module reads."""
    owners = (module for module in model.modules() if hasattr(module, "_hf_hook"))
    return {id(parameter) for module in owners for parameter in module.parameters(recurse=False)}


def is_offloaded(module: nn.Module) -> bool:
    """Whether weights of a module, or of modules in it, are offloaded."""
    return any(_hook(inner) is not None for inner in module.modules())


def offloaded_prefix(blocks: nn.ModuleList) -> int:
    """How many blocks are offloaded before the first one that is not."""
    return sum(1 for _ in takewhile(is_offloaded, blocks))


def read_weight(model: nn.Module, path: str) -> Tensor:
    """The values of a parameter or buffer of the model; an offloaded one is read from its file, to host memory."""
    owner, _, name = path.rpartition(".")
    module = model.get_submodule(owner)
    tensor: Tensor = getattr(module, name)
    hook = _hook(module) if tensor.is_meta else None
    return tensor.detach() if hook is None else hook.weights_map[name]


def load_weights(modules: Iterable[nn.Module]) -> None:
    """Read the offloaded weights of these modules for good, to the device where the model runs."""
    for module in (inner for outer in modules for inner in outer.modules()):
        if (hook := _hook(module)) is not None:
            hook.pre_forward(module)
            _remove_hook(module)


def drop_idle_hooks(model: nn.Module) -> None:
    """Remove accelerate's hooks from modules without offloaded weights: all of these are on one device."""
    for module in model.modules():
        if hasattr(module, "_hf_hook") and _hook(module) is None:
            _remove_hook(module)


def stages(blocks: nn.ModuleList, start: int, stop: int) -> list[range]:
    """Blocks ``start`` … ``stop - 1`` in ranges that run one after the other: each offloaded block is its own.

    Without blocks it is one empty range.
    """
    ranges: list[range] = []
    for offloaded, group in groupby(range(start, stop), lambda i: is_offloaded(blocks[i])):
        layers = [*group]
        ranges += [range(i, i + 1) for i in layers] if offloaded else [range(layers[0], layers[-1] + 1)]
    return ranges or [range(start, stop)]


def streamed(blocks: nn.ModuleList, parts: Sequence[range]) -> Generator[range, None, None]:
    """Yield ranges of blocks; until the next one is asked for, the weights of its blocks stay in memory.

    Close the iterator to free them.
    """
    for part in parts:
        held = _hold(blocks[part.start : part.stop])
        try:
            yield part
        finally:
            _release(held)


_Held = list[tuple[nn.Module, Any]]


def _hold(blocks: Iterable[nn.Module]) -> _Held:
    """Read the offloaded weights of these blocks; until they are released, passes neither read nor free them."""
    held: _Held = []
    try:
        for module in (inner for block in blocks for inner in block.modules()):
            if (hook := _hook(module)) is not None:
                held.append((module, hook))
                hook.pre_forward(module)
                hook.offload = False
    except BaseException:
        _release(held)
        raise
    return held


def _release(held: _Held) -> None:
    for module, hook in held:
        hook.offload = True
        hook.post_forward(module, None)
    if held and sys.platform == "linux" and torch.device(held[0][1].execution_device).type == "cpu":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)  # else glibc keeps the memory of several blocks, in pieces


def _hook(module: nn.Module) -> Any:
    """Accelerate's hook of a module whose own weights are offloaded; None for any other module."""
    outer = getattr(module, "_hf_hook", None)
    return next((hook for hook in getattr(outer, "hooks", [outer]) if getattr(hook, "offload", False)), None)


def _remove_hook(module: nn.Module) -> None:
    from accelerate.hooks import remove_hook_from_module

    remove_hook_from_module(module)
    if getattr(vars(module).get("forward"), "__func__", None) is type(module).forward:
        del module.forward  # accelerate leaves it on the instance, where it looks like a replacement
