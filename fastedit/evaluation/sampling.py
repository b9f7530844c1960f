"""Samples of requests, and confidence intervals for shares of a sample."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch

from fastedit.errors import ConfigError

_Item = TypeVar("_Item")
_Z = 1.96  # ± this many standard deviations hold 95 % of a normal distribution


def draw(items: Sequence[_Item], n: int | None, seed: int = 0) -> list[_Item]:
    """Draw n items, usually requests, without replacement, and keep their order; return all if there are not more.

    Raises:
        ConfigError: n is less than 1.
    """
    if n is None:
        return list(items)
    if n < 1:
        raise ConfigError(f"sample is {n}; give at least 1")
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed))
    return [items[i] for i in order[:n].sort().values.tolist()]


def mean(values: Iterable[float | None]) -> float | None:
    """The mean of the values that are not None; None if there are none."""
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None


def interval(values: Sequence[float | None], total: int) -> tuple[float, float] | None:
    """The 95 % confidence interval of a share, from values in 0 … 1 for a sample of ``total``; None without any.

    It is Wilson's, from the normal approximation of the mean over requests. Unlike mean ± 1.96 standard errors it does
    not vanish if all values are 0 or all are 1. It treats each value as 0 or 1, so it is exact or a bit too wide.
    """
    present = [value for value in values if value is not None]
    if not present:
        return None
    mean, n = sum(present) / len(present), float(len(present))
    if len(values) >= total:
        return mean, mean
    n *= (total - 1) / (total - len(values))  # drawn without replacement
    scale, centre = 1 + _Z**2 / n, mean + _Z**2 / (2 * n)
    half = _Z * math.sqrt(max(mean * (1 - mean), 0) / n + _Z**2 / (4 * n**2))
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)
