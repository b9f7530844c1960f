"""Choose the backend of an operation: each op declares its backends, and every call decides once.

An op lists its backends in order of preference; torch, its reference, ends every list and serves every call.
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
"""Environment variable with the backend of a whole run, for calls with `backend` "auto"."""


@dataclass(frozen=True)
class Call:
    """The properties of a call that decide its backend. `sizes` is empty if `describe` asks without a call."""

    device: torch.device
    dtype: torch.dtype
    sizes: Mapping[str, int]


Reason = Callable[[Call], str | None]
"""Function that returns why not, as a clause such as "N = 256 is above 128"; None if there is no reason."""


def _none(call: Call) -> None:
    return None


@dataclass(frozen=True)
class Option:
    """A backend of an op.

    Attributes:
        cannot: why it cannot serve a call; choosing it explicitly is then an error.
        slower: why auto does not choose it although it can serve, such as a measured crossover.
    """

    backend: Backend
    cannot: Reason
    slower: Reason = _none


_OPTIONS: dict[str, tuple[Option, ...]] = {}


def register(op: str, *options: Option) -> None:
    """Declare the backends of an op in order of preference, without its torch reference."""
    _OPTIONS[op] = (*options, Option("torch", _none))


def environment_backend() -> str | None:
    """The value of FASTEDIT_BACKEND, None if it is not set. Raises ConfigError if there is no such backend."""
    wanted = os.environ.get(VARIABLE)
    if wanted is not None and wanted not in get_args(Backend):
        raise ConfigError(f"{VARIABLE}={wanted}: there is no such backend; set one of {', '.join(get_args(Backend))}")
    return wanted


def choose(op: str, backend: Backend = "auto", *, device: torch.device, dtype: torch.dtype, **sizes: int) -> str:
    """The backend of a call: the one asked for, else FASTEDIT_BACKEND's if the op has it, else the first that can.

    Raises:
        ConfigError: the backend that was asked for, here or by FASTEDIT_BACKEND, cannot serve the call (says why), or
            the op does not have it.
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
    """(op, its backend on this device, why not its other backends) for each op; for `fastedit env`."""
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
    """Why Triton cannot run on these tensors; every Triton backend begins its `cannot` with this."""
    if not _installed("triton"):
        return "triton is not installed"
    if call.device.type != "cuda" and not interpreted():
        return f"the tensors are on {call.device.type}, where Triton runs only in its interpreter (TRITON_INTERPRET=1)"
    return None


def only_interpreted(call: Call) -> str | None:
    """Why auto does not choose Triton if only its interpreter can run; the beginning of a `slower`."""
    return None if call.device.type == "cuda" else "Triton's interpreter is for tests"


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter; the environment at the first import of triton decides this."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _installed(package: str) -> bool:
    return find_spec(package) is not None
