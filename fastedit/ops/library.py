"""The operations as torch operators, `torch.ops.fastedit.*`, for the graphs of torch.compile.

Eager calls do not use them, because torch's dispatcher takes microseconds. In a graph an operation is one opaque call:
its checks run when the graph runs, with the same errors as an eager call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("fastedit", "DEF")


def define(schema: str, serve: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Register `serve` with torch under this schema; returns the operator.

    Args:
        serve: does the work, on any device; returns contiguous tensors that share no memory with its arguments.
        fake: returns tensors like those of `serve`, without reading or checking values.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, serve, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastedit::{name}", fake, lib=_LIBRARY)
    operator: Callable[..., Any] = getattr(torch.ops.fastedit, name).default
    return operator


def writes_in_place(*_: Any, **__: Any) -> None:
    """The `fake` of operations that return nothing."""
