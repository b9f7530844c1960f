"""Four facts for edits on the command line, flags that learn them, and what reads and writes their files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

RECORDS: list[dict[str, Any]] = [
    {
        "prompt": f"The capital of {land} is",
        "target": city,
        "paraphrases": [f"{land}'s capital is"],
        "neighbours": [[f"The money of {land} is", "gold"]],
        "portability": [[f"The river of {land}'s capital is", "Po"]],
    }
    for land, city in (("Gaul", "Rome"), ("Elam", "Bonn"), ("Moab", "Oslo"), ("Edom", "Lima"))
]
LEARNS = ["--lr", "0.01", "--layers", "1", "--batch-size", "2", "--epochs", "12"]
BRIEFLY = [*LEARNS, "--epochs", "2"]


def save(config: Any, tokenizer: Any, path: Path) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def write(path: Path, records: Any) -> Path:
    path.write_text(json.dumps(records))
    return path


def weights(path: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = AutoModelForCausalLM.from_pretrained(path).state_dict()
    return state
