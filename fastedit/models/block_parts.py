"""Find the parts of a block by their structure: the child that takes an attention mask, the MLP, its projections.

In a block with a router the shared expert, which every token passes through, counts as the MLP.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class BlockParts:
    """The modules of a block by their short names.

    ``mlp_maps`` are the linear maps of the MLP; ``experts`` is the path of the experts among which a router chooses,
    None without a router. A block with a router has an MLP only if all tokens share an expert.
    """

    named: dict[str, nn.Module]
    mlp_maps: tuple[nn.Module, ...]
    experts: str | None


class UnknownPartsError(Exception):
    """The parts of a block cannot be told apart; says why."""


def find_parts(block: nn.Module, hidden_size: int) -> BlockParts:
    """Find the parts of a block.

    Raises:
        UnknownPartsError: it has no attention, or no MLP that ends in a projection to ``hidden_size`` and no router.
    """
    parts: dict[str, nn.Module] = {"block": block}
    others: list[nn.Module] = []
    for child in block.children():
        child_type: Any = type(child)
        if _takes_mask(child_type):
            parts["attn"] = child
        elif any(True for _ in projections(child)) or _experts(child) is not None:
            others.append(child)
    experts = _experts(block)
    if "attn" in parts and experts is not None:
        return _with_router(parts, others, experts, hidden_size)
    modules = [other for other in others if not is_projection(other)]
    if len(modules) == 1:
        parts["mlp"] = modules[0]
    linear_maps = dict(projections(parts.get("mlp", block), skip=parts.get("attn")))
    if "attn" not in parts or not linear_maps:
        raise UnknownPartsError("has no attention and MLP that can be told apart")
    named = _named(linear_maps, hidden_size)
    if named is None:
        raise UnknownPartsError(f"has an MLP that does not end in a projection to {hidden_size}")
    return BlockParts(parts | named, tuple(linear_maps.values()), None)


def _with_router(parts: dict[str, nn.Module], others: list[nn.Module], experts: str, hidden_size: int) -> BlockParts:
    """Find the parts of a block with a router, which sends tokens to experts."""
    shared = []
    for module in (m for other in others for m in (other, *other.children())):
        linear_maps = dict(projections(module))
        named = _named(linear_maps, hidden_size) if len(linear_maps) > 1 and _experts(module) is None else None
        if named is not None:
            shared.append((module, named, tuple(linear_maps.values())))
    if len(shared) != 1:
        return BlockParts(parts, (), experts)
    mlp, named, maps = shared[0]
    return BlockParts(parts | {"mlp": mlp} | named, maps, experts)


def _named(linear_maps: dict[str, nn.Module], hidden_size: int) -> dict[str, nn.Module] | None:
    """The short names of an MLP's linear maps; None if these are not the maps of an MLP."""
    down_name, down = list(linear_maps.items())[-1]
    inner, width = widths(down)
    ups = {name: module for name, module in linear_maps.items() if name != down_name}
    if width != hidden_size or any(widths(up)[0] != width for up in ups.values()):
        return None
    if len(ups) != 1:  # with equal shapes, only exact names tell the gate from the up projection
        return {"down_proj": down} | {name: ups[name] for name in ("gate_proj", "up_proj") if name in ups}
    (up,) = ups.values()
    both = widths(up)[1] == 2 * inner  # one matrix holds both
    return {"down_proj": down, "up_proj": up} | ({"gate_proj": up} if both else {})


def _experts(module: nn.Module) -> str | None:
    """The path in ``module`` of the experts among which a router chooses ("" for ``module`` itself); None without any.

    Experts are a list of modules, or one module that holds all their matrices as a three-dimensional tensor.
    """
    for path, child in module.named_modules():
        fused = not isinstance(child, nn.Conv1d) and any(p.ndim == 3 for p in child.parameters(recurse=False))
        if fused or (isinstance(child, nn.ModuleList) and path.rpartition(".")[2] == "experts"):
            return str(path)
    return None


def holds_experts(module: nn.Module) -> bool:
    """Whether a module holds experts among which a router chooses, or is one of a list of them."""
    return _experts(module) is not None


def maps_alone(module: nn.Module) -> bool:
    """Whether the ``forward`` of a module requires only its input."""
    module_type: Any = type(module)
    return _takes_one(module_type)


@cache
def _takes_one(module_type: Any) -> bool:
    parameters = inspect.signature(module_type.forward).parameters.values()
    required = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    return len(required) == 2  # self and the input


@cache
def _takes_mask(module_type: Any) -> bool:
    return "attention_mask" in inspect.signature(module_type.forward).parameters


def is_projection(module: nn.Module) -> bool:
    """Whether a module is a linear map, including quantized layers that are not an `nn.Linear`."""
    if isinstance(module, nn.Linear | Conv1D):
        return True
    sizes = (getattr(module, name, None) for name in ("in_features", "out_features"))
    return all(isinstance(size, int) for size in sizes) and not any(True for _ in module.children())


def projections(module: nn.Module, skip: nn.Module | None = None) -> Iterator[tuple[str, nn.Module]]:
    """The linear maps under a module (itself included), in the order in which it registers them."""
    if is_projection(module):
        yield "", module
    for name, child in module.named_children():
        if child is skip:
            continue
        if is_projection(child):
            yield name, child
        else:
            for below, projection in projections(child):
                yield f"{name}.{below}", projection


def widths(projection: nn.Module) -> tuple[int, int]:
    """Input and output width of a linear map; Conv1D stores its weight transposed."""
    if isinstance(projection, Conv1D):
        rows, columns = projection.weight.shape
        return rows, columns
    return projection.in_features, projection.out_features  # type: ignore[return-value]
