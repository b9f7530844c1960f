"""Which backend serves an operation: declared by each op, decided once per call.

An op lists its backends from the most to the least wanted; torch, its reference, ends every list and serves everything.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Literal, get_args

import torch

from fastedit.errors import ConfigError

Backend = Literal["auto", "triton", "cuda", "cpp", "torch"]
VARIABLE = "FASTEDIT_BACKEND"
"""Environment variable with the backend of a whole run, for calls that leave `backend` at auto."""


@dataclass(frozen=True)
class Call:
    """The properties of a call that decide its backend. `sizes` is empty if nobody calls and `describe` asks."""

    device: torch.device
    dtype: torch.dtype
    sizes: Mapping[str, int]


Reason = Callable[[Call], str | None]
"""Why not, as a clause such as "N = 256 is above 128"; None for no reason."""


def _none(call: Call) -> None:
    return None


@dataclass(frozen=True)
class Option:
    """A backend of an op.

    Attributes:
        cannot: why it cannot serve a call; then an explicit choice is an error.
        slower: why auto leaves out a call that it can serve, such as a measured crossover.
    """

    backend: Backend
    cannot: Reason
    slower: Reason = _none


_OPTIONS: dict[str, tuple[Option, ...]] = {}


def register(op: str, *options: Option) -> None:
    """Declare the backends of an op, the most wanted first, its torch reference left out."""
    _OPTIONS[op] = (*options, Option("torch", _none))


def environment_backend() -> str | None:
    """FASTEDIT_BACKEND, None if it is not set. Raises ConfigError if no op has such a backend."""
    wanted = os.environ.get(VARIABLE)
    if wanted is not None and wanted not in get_args(Backend):
        raise ConfigError(f"{VARIABLE}={wanted}: there is no such backend; set one of {', '.join(get_args(Backend))}")
    return wanted


def choose(op: str, backend: Backend = "auto", *, device: torch.device, dtype: torch.dtype, **sizes: int) -> str:
    """The backend of this call: the one asked for, else FASTEDIT_BACKEND's if the op has it, else the first able.

    Raises:
        ConfigError: the backend asked for, here or by FASTEDIT_BACKEND, cannot serve the call (says why), or is not
            one of the op's.
    """
    call, options = Call(device, dtype, sizes), {option.backend: option for option in _OPTIONS[op]}
    name = f"backend={backend!r}"
    if backend == "auto" and (wanted := environment_backend()):
        name = f"{VARIABLE}={wanted}"
        backend = wanted if wanted in options else "auto"
    if backend == "auto":
        return next(o.backend for o in options.values() if not (o.cannot(call) or o.slower(call)))
    if backend not in options:
        raise ConfigError(f"ops.{op} has no {name}; it has auto, {', '.join(options)}")
    if reason := options[backend].cannot(call):
        raise ConfigError(f"ops.{op} cannot take {name}: {reason}; leave it at auto, or take torch")
    return backend


def describe(device: torch.device, dtype: torch.dtype = torch.float32) -> list[tuple[str, str, str]]:
    """(op, the backend it takes on this device, why not the others that it has), for `fastedit env`."""
    call, rows = Call(device, dtype, {}), []
    for op, options in sorted(_OPTIONS.items()):
        try:
            taken = choose(op, device=device, dtype=dtype)
        except ConfigError as error:
            rows.append((op, "none", str(error)))
            continue
        reasons = ((o.backend, o.cannot(call) or o.slower(call)) for o in options if o.backend != taken)
        rows.append((op, taken, "; ".join(f"{name}: {reason}" for name, reason in reasons if reason)))
    return rows


def no_triton(call: Call) -> str | None:
    """Why Triton cannot run on these tensors; the `cannot` that every Triton backend starts from."""
    if not _installed("triton"):
        return "triton is not installed"
    if call.device.type != "cuda" and not interpreted():
        return f"the tensors are on {call.device.type}, where Triton runs only in its interpreter (TRITON_INTERPRET=1)"
    return None


def only_interpreted(call: Call) -> str | None:
    """Reason why auto leaves Triton alone if only its interpreter runs; the `slower` to start from."""
    return None if call.device.type == "cuda" else "Triton's interpreter is for tests"


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, a matter of the environment when triton is first imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _installed(package: str) -> bool:
    return find_spec(package) is not None
