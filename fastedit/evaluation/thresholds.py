"""Measures of an edited model, and their bounds from a JSON or TOML file."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastedit.errors import ConfigError, FileError, listed
from fastedit.files import read_json, read_text

TASK, TASK_CHANGE = "task:", "task_change:"
"""Prefixes of an lm-eval task's name: for its value, and for the change by the edit."""
_MOST_FLOAT = sys.float_info.max
_EXAMPLE = '{"reliability": {"min": 0.95}, "perplexity_ratio": {"max": 1.05}}'


@dataclass(frozen=True)
class Bound:
    """The smallest and the largest value that a measure may have; None is no limit."""

    min: float | None = None
    max: float | None = None

    def holds(self, value: float) -> bool:
        """Whether a value keeps the bound, up to the rounding of means; NaN does not keep any limit."""
        at_limit = any(end is not None and math.isclose(value, end, abs_tol=1e-12) for end in (self.min, self.max))
        return at_limit or ((self.min is None or value >= self.min) and (self.max is None or value <= self.max))


@dataclass(frozen=True)
class Measured:
    """A measure of the edited model, and its value ``before`` for the unedited one (None: not taken).

    ``value`` is None if it could not be taken; ``why`` says why. ``n`` counts the prompts. ``interval`` is the 95 %
    confidence interval if this is a share of a sample.
    """

    name: str
    says: str
    value: float | None
    before: float | None = None
    n: int = 0
    why: str = ""
    share: bool = True
    bound: Bound | None = None
    interval: tuple[float, float] | None = None

    @property
    def passed(self) -> bool | None:
        """Whether the measure was taken and keeps its bound; None without a bound."""
        return None if self.bound is None else self.value is not None and self.bound.holds(self.value)

    def shown(self, value: float | None) -> str:
        """A value of this measure, for tables."""
        if value is None:
            return "—"
        return f"{value:.1%}" if self.share else f"{value:.4g}"

    @property
    def wanted(self) -> str:
        """The bound, for tables."""
        ends = (("≥", self.bound.min), ("≤", self.bound.max)) if self.bound else ()
        return ", ".join(f"{sign} {self.shown(end)}" for sign, end in ends if end is not None)


def load_thresholds(path: Path, names: Collection[str], shares: Collection[str]) -> dict[str, Bound]:
    """The bounds of a file: {measure: {"min": …, "max": …}}.

    Args:
        names: the known measures; those of tasks are recognized by their prefix.
        shares: those of ``names`` that lie in 0 … 1.

    Raises:
        FileError: the file cannot be read, or is not JSON or TOML. ConfigError: it has no bounds, unknown measures, or
            values that are not bounds; names all of them.
    """
    return thresholds_of(_content(path), names, shares, str(path))


def thresholds_of(content: Any, names: Collection[str], shares: Collection[str], where: str) -> dict[str, Bound]:
    """The bounds of an object; see `load_thresholds`."""
    if not isinstance(content, Mapping) or not content:
        raise ConfigError(f"{where}: expected bounds of measures, such as {_EXAMPLE}")
    problems = []
    if unknown := [n for n in map(str, content) if n not in names and not n.startswith((TASK, TASK_CHANGE))]:
        problems.append(
            f"{len(unknown)} unknown {'measure' if len(unknown) == 1 else 'measures'} ({listed(unknown)}); there are "
            f"{', '.join(names)}, and {TASK}NAME and {TASK_CHANGE}NAME of an lm-eval task"
        )
    for name, bounds in content.items():
        if str(name) not in unknown and (problem := _problem(bounds, name in shares, name not in names)):
            problems.append(f"{name}: {problem}")
    if problems:
        raise ConfigError(f"{where}: {'; '.join(problems)}")
    return {name: Bound(**{end: float(value) for end, value in bounds.items()}) for name, bounds in content.items()}


def _problem(bounds: Any, share: bool, task: bool) -> str:
    """Say what is wrong with the bounds of one measure; empty if nothing is."""
    if not isinstance(bounds, Mapping) or not bounds or bounds.keys() - {"min", "max"}:
        return f'expected {{"min": …}}, {{"max": …}} or both, got {json.dumps(bounds, default=str):.60}'
    for end, value in bounds.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not -_MOST_FLOAT <= value <= _MOST_FLOAT:
            return f"{end} is {value!r:.40}; give a number"
        if value < 0 and not task:
            return f"{end} is {value:g}, but it is never below 0"
        if share and not 0 <= value <= 1:
            return f"{end} is {value:g}, but it is a share in 0 … 1; for {value:g} % give {value / 100:g}"
    if "min" in bounds and "max" in bounds and bounds["min"] > bounds["max"]:
        return f"min {bounds['min']:g} is above max {bounds['max']:g}"
    return ""


def _content(path: Path) -> Any:
    if path.suffix.lower() != ".toml":
        return read_json(path, _EXAMPLE)
    if sys.version_info < (3, 11):
        raise FileError(path, "TOML is read by Python 3.11 and later; write the thresholds as JSON")
    import tomllib

    try:
        return tomllib.loads(read_text(path))
    except (ValueError, RecursionError) as error:  # ValueError also for numbers of thousands of digits
        raise FileError(path, f"is not TOML: {error}") from None
