"""Statistics of a tiny model in folders, and what a store reads of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from helpers import made, tiny_model
from torch import Tensor

from fastedit import StreamingCovariance
from fastedit.models import fingerprint, topology
from fastedit.statistics.store import StatisticsStore, statistics_path

D = 56
parts = topology(tiny_model("llama"))
FP32 = 1e-7
OURS = fingerprint(parts.model)
FACTOR = "1.down_proj.factor.safetensors"


def keep(folder: Path, x: Tensor, layer: int = 1, of: str = OURS, **how: Any) -> StreamingCovariance:
    found = made(x, fingerprint=of, layer=layer, module="down_proj")
    found.save(statistics_path(parts, folder, layer), **how)
    return found


def loads(folder: Path | None = None, rounding: float = 1e-12) -> Tensor:
    L = StatisticsStore(parts, OURS, directory=folder).cholesky(1)
    C = StatisticsStore(parts, OURS, directory=folder).covariance(1)
    assert torch.equal(L, L.tril())
    assert float((L @ L.T - C).norm() / C.norm()) < rounding
    return C
