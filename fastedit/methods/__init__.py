"""The editing methods by name: each has a configuration class, and a plan that makes every check before the work.

Importing this package does not import torch; `Method.plan` imports what it runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastedit.errors import ConfigError
from fastedit.methods.locate_then_edit.config import RECIPES, LocateThenEditConfig
from fastedit.methods.locft_bf.config import LocFTBFConfig
from fastedit.progress import Progress, no_progress

if TYPE_CHECKING:
    from fastedit.methods.base import Edit, History, Plan
    from fastedit.models import Model


@dataclass(frozen=True)
class Method:
    """An editing method.

    Attributes:
        config: its configuration class.
        module: the module that has its function `plan`.
        recipe: the fields that the method itself sets, if several methods share one configuration class.
        starts: configurations that a search tries first, beside the method's own choices.
    """

    config: type[Any]
    module: str
    recipe: Any = None
    starts: tuple[dict[str, Any], ...] = ()

    @property
    def solves_each(self) -> bool:
        """Whether a plan can solve each edit by itself (`run_each`)."""
        return self.recipe is not None

    def plan(
        self,
        model: Model,
        edits: Sequence[Edit],
        config: Any,
        *,
        history: History | None = None,
        progress: Progress = no_progress,
    ) -> Plan:
        """Make every choice and check; `plan.run()` then does the work.

        Raises:
            ConfigError, ModelError, RequestError: the edits cannot be made; all offending edits and layers are named.
        """
        options = {} if self.recipe is None else {"method": self.recipe}
        function = import_module(self.module).plan
        made: Plan = function(model, edits, config, history=history, progress=progress, **options)
        return made


DEFAULT_METHOD = "locft-bf"
METHODS: dict[str, Method] = {
    DEFAULT_METHOD: Method(
        LocFTBFConfig,
        "fastedit.methods.locft_bf.method",
        starts=({"published": True}, {"preserve": "both"}),
    ),
    **{
        name: Method(LocateThenEditConfig, "fastedit.methods.locate_then_edit.method", recipe)
        for name, recipe in RECIPES.items()
    },
}
"""The editing methods by name."""


def method_of(name: str, given: Iterable[str] = ()) -> Method:
    """The method of that name. Raises ConfigError if there is none, or if its configuration lacks a given field."""
    if name not in METHODS:
        raise ConfigError(f"unknown method {name!r}; known methods: {', '.join(METHODS)}")
    known = [field.name for field in fields(METHODS[name].config)]
    for field in given:
        if field not in known:
            raise ConfigError(f"{name} has no field {field!r}; its fields: {', '.join(known)}")
    return METHODS[name]


__all__ = ["DEFAULT_METHOD", "METHODS", "LocFTBFConfig", "LocateThenEditConfig", "Method", "method_of"]
