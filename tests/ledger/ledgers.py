"""Four facts, ways to edit them, and what a ledger of them holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from helpers import CONTEXTS, random_edits, tiny_model
from torch import Tensor

from fastedit import Editor, Ledger
from fastedit.weights import LowRank

SOLVER: dict[str, Any] = {
    "layers": (1, 2), "contexts": tuple(CONTEXTS[:1]), "steps": 3, "lr": 0.3, "unchecked_statistics": True,
}  # fmt: skip
ONE_LAYER = {**SOLVER, "layers": (1,)}
LOCFT: dict[str, Any] = {"method": "locft-bf", "layer": 1, "lr": 3e-3, "epochs": 2, "batch_size": 2, "published": True}
WAYS: dict[str, dict[str, Any]] = {
    "memit": {**SOLVER, "method": "memit"},
    "alphaedit": {**SOLVER, "method": "alphaedit"},
    "rome": {**ONE_LAYER, "method": "rome"},
    "emmet": {**ONE_LAYER, "method": "emmet"},
    "locft-bf": LOCFT,
    "buffered": {**LOCFT, "buffered": True},
    "bf16": {**SOLVER, "method": "memit", "dtype": torch.bfloat16},
}
Open = Callable[..., Ledger]
EDITS = [replace(edit, id=name) for edit, name in zip(random_edits(4, 5), "ABCD", strict=True)]
A, B, C, D = EDITS


def editor_of(tokenizer: Any, statistics: Path, way: str = "memit", seed: int = 1, **more: Any) -> Editor:
    options = {**WAYS[way], **more}
    for name in ("dtype", "buffered"):
        options.pop(name, None)
    if options["method"] != "locft-bf":
        options["statistics"] = statistics
    return Editor(tiny_model("llama", seed=seed, dtype=WAYS[way].get("dtype", torch.float32)), tokenizer, **options)


def bits(ledger: Ledger, entry: int | None = None) -> dict[str, Tensor]:
    delta = ledger.delta(entry)
    updates = delta.updates if delta else {}
    return {path: u.dense() if isinstance(u, LowRank) else u for path, u in updates.items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[path], other[path]) for path in one)


def near(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[path] - other[path]).norm() / other[path].norm()) for path in one)


def ids(ledger: Ledger) -> str:
    return "".join(fact.id for fact in ledger.facts)
