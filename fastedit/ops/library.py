"""The operations as torch knows them, `torch.ops.fastedit.*`: what torch.compile puts into its graphs.

An eager call does not pass here, as torch's dispatcher takes microseconds. In a graph an operation is one opaque call:
its checks run when it runs, with the errors that an eager call has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("fastedit", "DEF")


def define(schema: str, serve: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Make `serve` known to torch by this schema; returns the operator.

    Args:
        serve: does the work, on any device; gives contiguous tensors that share no memory with what it is given.
        fake: gives tensors like those of `serve`, and reads and checks none of the values.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, serve, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastedit::{name}", fake, lib=_LIBRARY)
    operator: Callable[..., Any] = getattr(torch.ops.fastedit, name).default
    return operator


def writes_in_place(*_: Any, **__: Any) -> None:
    """The `fake` of operations that return nothing."""
