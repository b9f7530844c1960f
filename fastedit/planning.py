"""A method's plan, or one refusal of all edits that cannot be used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fastedit.errors import FastEditError, RequestError
from fastedit.methods import Method
from fastedit.methods.base import Plan
from fastedit.methods.naming import edit_name
from fastedit.models import Model
from fastedit.requests import EditRequest

# for a refusal alone: the folder may hold the run of all edits, and the model need not write contexts
_WITHOUT: dict[str, Any] = {"state": None, "augment": 0, "n_contexts": 0}


def planned(method: Method, model: Model, edits: Sequence[EditRequest], config: Any, **options: Any) -> Plan:
    """Plan these edits. A refusal names all edits that cannot be used, for whatever reason.

    A method that finds no subject in one edit does not get to the length of another, so that the plan is made again
    with the edits that are left.

    Args:
        edits: each has an id, so that its name stays the same among fewer edits.

    Raises:
        RequestError, ConfigError, ModelError: as for the method's `plan`.
    """
    try:
        return method.plan(model, edits, config, **options)
    except RequestError as error:
        errors = [error]
    left = list(edits)
    config = replace(config, **{name: value for name, value in _WITHOUT.items() if hasattr(config, name)})
    while errors[-1].edits and (left := [e for e in left if edit_name(e, 0) not in errors[-1].edits]):
        try:
            method.plan(model, left, config, **options)
            break
        except RequestError as error:
            errors.append(error)
        except FastEditError:  # not about edits; it comes again when these are mended
            break
    raise RequestError.joined([error for error in errors if error.edits] or errors) from None
