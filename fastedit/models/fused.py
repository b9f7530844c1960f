"""Fused forwards for the frozen modules between the matrix products of a pass: RMS norms, and gated MLPs.

On a GPU a norm of ten operations, or act(gate)·up of two, moves its rows once in each of them; `ops.rms_norm` and
`ops.gated_activation` move them once. Modules are found by their structure. An operation takes a module's place only if
it gives what the module's own ``forward`` gives for random rows, and its gradient: families differ in ε, in 1 + weight,
and in what they round when.
"""

from __future__ import annotations

import inspect
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import permutations, product
from typing import Any, get_args

import torch
from torch import Tensor, nn

from fastedit import ops
from fastedit.models.block_parts import UnknownPartsError, find_parts, widths
from fastedit.models.hooks import Override, eval_mode, forwards
from fastedit.models.topology import Topology
from fastedit.ops.gated_activation import Activation
from fastedit.ops.registry import Backend, choose

log = logging.getLogger(__name__)
Forward = Callable[[Tensor], Tensor]
_ROWS = 16  # random ones, at which formulas are compared


@dataclass(frozen=True)
class _Lookalike:
    """A module with the parts of a norm or of a gated MLP.

    ``own`` is the part of its forward, from rows of ``width``, that one of ``candidates`` may compute as well; that one
    ``completed`` is the module's forward.
    """

    module: nn.Module
    width: int
    own: Forward
    candidates: list[Forward]
    completed: Callable[[Forward], Forward]


def fuse(topology: Topology, trained: Iterable[nn.Parameter] = (), *, backend: Backend = "auto") -> list[Override]:
    """Overrides that run the norms and gated MLPs of all blocks, and the norm after them, by fused operations.

    There are none on a CPU, or where the user chose torch: passes then keep every bit. A module that has the parts of a
    norm or of a gated MLP, and other numbers, keeps its own ``forward``; a warning names it, once per process.

    Args:
        trained: parameters that get gradients: norms that hold one keep their ``forward``. Those of an MLP's
            projections may be among them.
        backend: as for the operations; "torch" takes their references.
    """
    overrides, unlike = list[Override](), defaultdict[tuple[str, str], list[str]](list)
    paths = {module: path for path, module in topology.model.named_modules()}
    dtype = next(topology.backbone.parameters()).dtype
    with eval_mode(topology.backbone), torch.enable_grad():
        for lookalike in (*_norms(topology, trained, backend), *_gated_mlps(topology, backend)):
            module = lookalike.module
            forward = _same(lookalike, _random_rows(lookalike.width, next(module.parameters()).device, dtype))
            if isinstance(forward, str):
                unlike[type(module).__name__, forward].append(paths[module])
            else:
                overrides.append((module, lookalike.completed(forward)))
    for (kind, why), places in unlike.items():
        others = f" and {len(places) - 1} more" if len(places) > 1 else ""
        _warn_once(f"{kind} runs by its own forward, because {why}: {places[0]}{others}")
    return overrides


def _norms(topology: Topology, trained: Iterable[nn.Parameter], backend: Backend) -> Iterator[_Lookalike]:
    """Norms with a weight and without a bias, in the blocks and beside them."""
    skip = {id(p) for p in trained}
    beside = (child for child in topology.backbone.children() if child is not topology.blocks)
    for module in (m for part in (*topology.blocks, *beside) for m in part.modules()):
        parameters = dict(module.named_parameters(recurse=False))
        weight = parameters.get("weight")
        if weight is None or weight.ndim != 1 or len(parameters) > 1 or any(True for _ in module.children()):
            continue
        sizes = {"device": weight.device, "dtype": weight.dtype, "D": len(weight)}
        taken = None if id(weight) in skip or isinstance(module, nn.LayerNorm) else _chosen("rms_norm", backend, sizes)
        if taken is not None:
            floats = [value for value in vars(module).values() if isinstance(value, float)]
            candidates = [_norm(weight.detach(), floats[0], *how, taken) for how in _NORMS] if len(floats) == 1 else []
            yield _Lookalike(
                module, len(weight), module.forward, candidates, partial(_at_its_dtype, module, weight.dtype)
            )


_NORMS = ((0.0, True), (1.0, False), (0.0, False))
"""Whether 1 is added to the weight, and whether rows are rounded before they are scaled: Llama, Gemma, OLMo 2."""


def _norm(weight: Tensor, eps: float, offset: float, round_first: bool, backend: Backend) -> Forward:
    return lambda x: ops.rms_norm(x, weight, eps=eps, offset=offset, round_first=round_first, backend=backend)


def _at_its_dtype(module: nn.Module, dtype: torch.dtype, fused: Forward) -> Forward:
    """The norm's forward: by the operation for rows of the dtype that it was compared in, else its own."""
    own = module.forward

    def run(x: Tensor) -> Tensor:
        if x.dtype == dtype:
            return fused(x)
        _warn_once(f"{type(module).__name__} runs by its own forward, because its rows are {x.dtype} and not {dtype}")
        y: Tensor = own(x)
        return y

    return run


def _gated_mlps(topology: Topology, backend: Backend) -> Iterator[_Lookalike]:
    """MLPs of a last projection, and two before it, or one that is twice as wide."""
    dtype = next(topology.backbone.parameters()).dtype
    for block in topology.blocks:
        taken = _chosen("gated_activation", backend, {"device": next(block.parameters()).device, "dtype": dtype})
        if taken is None:
            continue
        try:
            parts = find_parts(block, topology.hidden_size)
        except UnknownPartsError:
            continue
        mlp, down = parts.named.get("mlp"), parts.named.get("down_proj")
        ups = [module for module in parts.mlp_maps if module is not down]
        if mlp is None or down is None or len(ups) not in (1, 2):
            continue
        inner, (width, out) = widths(down)[0], widths(ups[0])
        if out == (2 * inner if len(ups) == 1 else inner):
            orders = permutations(range(2))
            candidates = [_inside(ups, *how, taken) for how in product(orders, get_args(Activation))]
            yield _Lookalike(mlp, width, _without(down, mlp), candidates, _before(down))


def _inside(ups: list[nn.Module], order: tuple[int, ...], activation: Activation, backend: Backend) -> Forward:
    """act(gate)·up; ``order`` says which of two projections, or of the halves of one, is the gate and which is up."""

    def run(x: Tensor) -> Tensor:
        both = [up(x) for up in ups] if len(ups) == 2 else ups[0](x).chunk(2, -1)
        gate, up = (both[i] for i in order)
        return ops.gated_activation(gate, up, activation=activation, backend=backend)

    return run


def _without(down: nn.Module, mlp: nn.Module) -> Forward:
    """The MLP's own forward without its last projection."""
    forward = mlp.forward

    def run(x: Tensor) -> Tensor:
        with forwards([(down, lambda inside: inside)]):
            y: Tensor = forward(x)
        return y

    return run


def _before(down: nn.Module) -> Callable[[Forward], Forward]:
    return lambda inside: lambda x: down(inside(x))


def _chosen(op: str, backend: Backend, sizes: dict[str, Any]) -> Any:
    """The backend that serves such calls; None if that is torch, and nobody asked for it here."""
    taken = choose(op, backend, **sizes)
    return None if taken == "torch" and backend == "auto" else taken


def _random_rows(width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Rows [1, 16, width] of many sizes, so that an ε shows; the same at every call."""
    x = torch.randn(1, _ROWS, width, generator=torch.Generator().manual_seed(0))
    return (x * torch.logspace(-3, 0.5, _ROWS)[:, None]).to(device, dtype)


def _same(lookalike: _Lookalike, x: Tensor) -> Forward | str:
    """The first candidate that computes the same as the module, within rounding; or why there is none."""
    kind: Any = type(lookalike.module)
    if "forward" in vars(lookalike.module) or not _takes_only_input(kind):
        return "that was replaced, or takes more than rows"
    try:
        wanted = _with_gradient(lookalike.own, x)
        for candidate in lookalike.candidates:
            if _close(*_with_gradient(candidate, x), *wanted):
                return candidate
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # called in the wrong way, modules raise anything; or a kernel cannot be compiled
        said = next(iter(str(error).splitlines()), "")
        return f"what would replace that cannot be tried ({type(error).__name__}: {said})"
    return "no fused kernel is known to do the same"


def _with_gradient(forward: Forward, x: Tensor) -> tuple[Tensor, Tensor]:
    """The result of a function, and a gradient in its input."""
    x = x.detach().requires_grad_()
    y = forward(x)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.device, y.dtype)
    return y.detach(), torch.autograd.grad(y, x, grad)[0]


def _close(y: Tensor, slope: Tensor, wanted: Tensor, wanted_slope: Tensor) -> bool:
    """Whether only the order of sums differs: rarely, then, a value is rounded to the next one in half precision.

    Gradients differ more, because kernels round once where separate operations round several times.
    """
    if y.dtype != wanted.dtype or y.shape != wanted.shape:
        return False
    eps, wide = torch.finfo(y.dtype).eps, torch.finfo(torch.float32).eps
    apart = (y.float() - wanted.float()).abs().mean() <= (0.01 * eps + 4 * wide) * wanted.float().abs().mean()
    slopes = (slope.float() - wanted_slope.float()).norm() <= 8 * eps * wanted_slope.float().norm()
    return bool(apart & slopes)


@cache
def _takes_only_input(kind: Any) -> bool:
    return len(inspect.signature(kind.forward).parameters) == 2  # self and the input


@cache
def _warn_once(what: str) -> None:
    log.warning(what)
