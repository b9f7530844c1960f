"""Ways to change a pass through a model: hooks, replaced modules, evaluation mode, gradients, torch's global state."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

_P = ParamSpec("_P")
_R = TypeVar("_R")


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Register hooks for the duration of a block: `with hooked(m.register_forward_hook(f) for m in modules):`."""
    registered: list[RemovableHandle] = []
    try:
        registered.extend(handles)
        yield
    finally:
        for handle in registered:
            handle.remove()


Override = tuple[nn.Module, Callable[..., Any]]
"""A module, and the function that replaces its ``forward`` during a pass."""


def own_forward(module: nn.Module) -> Any:
    """The `forward` that somebody has put into this instance of a module, unless accelerate did; else None."""
    return None if hasattr(module, "_hf_hook") else vars(module).get("forward")


@contextmanager
def forwards(overrides: Iterable[Override]) -> Iterator[None]:
    """Replace ``forward`` on module instances; afterwards the instances are as before."""
    undo: list[tuple[dict[str, Any], Any]] = []
    try:
        for module, forward in overrides:
            undo.append((module.__dict__, module.__dict__.get("forward")))
            module.__dict__["forward"] = forward
        yield
    finally:
        for attributes, before in reversed(undo):
            if before is None:
                attributes.pop("forward", None)
            else:
                attributes["forward"] = before


class Stopped(Exception):  # noqa: N818  # not an error: it ends a forward pass early
    """Raised by a hook to end a pass, with what the hook has seen."""

    def __init__(self, seen: Any) -> None:
        self.seen = seen


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Set evaluation mode (no dropout) inside the block; afterwards every sub-module has its own flag again."""
    training = [m for m in module.modules() if m.training]
    for m in training:
        m.training = False
    try:
        yield
    finally:
        for m in training:
            m.training = True


@contextmanager
def only_trainable(model: nn.Module, chosen: Iterable[nn.Parameter]) -> Iterator[None]:
    """Let only the chosen parameters require gradients inside the block; then restore all flags and gradients."""
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    try:
        for p, _, _ in before:
            p.requires_grad_(False)
            p.grad = None
        for p in chosen:
            p.requires_grad_(True)
        yield
    finally:
        for p, flag, grad in before:
            p.requires_grad_(flag)
            p.grad = grad


def plain_state(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Run a function with torch's global state as at the start of a program, whatever its caller has set.

    The default dtype is fp32, the default device the CPU, gradients are on, and inference mode and autocast are off
    (autocast would keep the first cast of a weight that then changes). Modules that were compiled in place run eagerly,
    because hooks come and go here. Settings that only choose kernels stay the caller's: deterministic algorithms, the
    precision of products, threads, anomaly detection.
    """

    @wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        dtype = torch.get_default_dtype()
        with ExitStack() as stack:
            stack.enter_context(torch.autocast("cpu", enabled=False))
            stack.enter_context(torch.autocast("cuda", enabled=False))
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            if "torch._dynamo" in sys.modules:  # else nothing was compiled, and the import takes a second
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            if torch.get_default_device().type != "cpu":  # the context slows every call
                stack.enter_context(torch.device("cpu"))
            if dtype != torch.float32:
                stack.callback(torch.set_default_dtype, dtype)
                torch.set_default_dtype(torch.float32)
            return function(*args, **kwargs)

    return run
