"""Import other editing code from its checkout and run it unchanged, without its dependencies and on a CPU.

Its surroundings are adapted instead: packages that are not installed are empty modules, "cuda" means the CPU, and
blocks return tuples as in transformers 4.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch.overrides import TorchFunctionMode

_TOP = ("easyeditor", "rome", "memit", "emmet", "AlphaEdit", "util", "dsets", "baselines", "experiments")
_STUBS = ("datasets", "matplotlib", "matplotlib.style", "matplotlib.pyplot")
_SHELLS = ("easyeditor", "easyeditor.models", "easyeditor.util")  # their __init__ would import all methods


class _Stub(ModuleType):
    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class _OnCpu(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        named = {name: _cpu(value) for name, value in (kwargs or {}).items()}
        return func(*map(_cpu, args), **named)


def _cpu(value: Any) -> Any:
    return "cpu" if isinstance(value, str) and value == "cuda" else value


def load(directory: Path, names: Sequence[str]) -> list[Any]:
    """Import modules of a checkout; `sys.modules` and the working directory are as before afterwards.

    Raises:
        ImportError: a module is missing, or needs more than is stubbed.
    """
    kept = {name: sys.modules.pop(name) for name in [*sys.modules] if name.partition(".")[0] in _TOP}
    there, before = os.getcwd(), {*sys.modules}
    stubs = [name for name in _STUBS if name.partition(".")[0] not in sys.modules and not _found(name)]
    try:
        os.chdir(directory)  # globals.yml is there
        sys.path.insert(0, str(directory))
        sys.modules.update({name: _Stub(name) for name in stubs})
        for name in _SHELLS:
            if (directory / name.replace(".", "/")).is_dir():
                sys.modules[name] = ModuleType(name)
                sys.modules[name].__path__ = [str(directory / name.replace(".", "/"))]
        return [import_module(name) for name in names]
    finally:
        os.chdir(there)
        sys.path.remove(str(directory))
        for name in {*sys.modules} - before:
            if name.partition(".")[0] in _TOP or name in stubs:
                del sys.modules[name]
        sys.modules.update(kept)


def _found(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        return False


@contextmanager
def running(model: Any, nethook: Any = None) -> Iterator[None]:
    """A context for running code of a checkout; give `nethook` if that code supports only GPUs and tuples."""
    with ExitStack() as stack:
        stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        if nethook is not None:
            stack.enter_context(_tuples(model, nethook))
            stack.enter_context(_OnCpu())
        yield


@contextmanager
def _tuples(model: Any, nethook: Any) -> Iterator[None]:
    """Let hooks on blocks see (hidden states,), whatever the blocks return."""
    trace = nethook.Trace

    class Tupled(trace):  # type: ignore[valid-type, misc]
        def __init__(self, module: Any, layer: Any = None, **options: Any) -> None:
            target = nethook.get_module(module, layer) if layer is not None else module
            is_block = any(target is block for block in model.model.layers)
            self._around = [target.register_forward_hook(_wrap)] if is_block else []
            super().__init__(module, layer, **options)
            self._around += [target.register_forward_hook(_unwrap)] if is_block else []

        def close(self) -> None:
            super().close()
            for hook in self._around:
                hook.remove()

    nethook.Trace = Tupled
    try:
        yield
    finally:
        nethook.Trace = trace


def _wrap(_: Any, __: Any, output: Any) -> Any:
    return (output,) if isinstance(output, torch.Tensor) else None


def _unwrap(_: Any, __: Any, output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else None
