"""The editing methods: each a function of a topology, a tokenizer, the edits and its configuration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from fastedit.methods.base import EachResult, Edit, History, MethodResult, Progress
from fastedit.methods.locate_then_edit import locate_then_edit, locate_then_edit_each
from fastedit.methods.locft_bf import LocFTBFConfig, locft_bf
from fastedit.methods.plan import PAIRS, LocateThenEditConfig
from fastedit.models import Topology


def _locft_bf(
    topology: Topology,
    tokenizer: Any,
    edits: Sequence[Edit],
    config: LocFTBFConfig,
    progress: Progress,
    *,
    history: History,
) -> MethodResult:
    return locft_bf(topology, tokenizer, edits, config, progress)  # what was edited before does not matter to it


METHODS: dict[str, tuple[type[Any], Callable[..., MethodResult]]] = {
    "locft-bf": (LocFTBFConfig, _locft_bf),
    **{name: (LocateThenEditConfig, partial(locate_then_edit, method=name)) for name in PAIRS},
}
"""Name of a method -> (its configuration, the function that runs it)."""

EACH: dict[str, Callable[..., EachResult]] = {name: partial(locate_then_edit_each, method=name) for name in PAIRS}
"""Name of a method that solves independent edits -> the function that does so."""

__all__ = [
    "EACH",
    "METHODS",
    "EachResult",
    "Edit",
    "History",
    "LocFTBFConfig",
    "LocateThenEditConfig",
    "MethodResult",
    "Progress",
    "locate_then_edit",
    "locate_then_edit_each",
    "locft_bf",
]
