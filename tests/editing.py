"""How the tests of the Editor edit, and what two models say of the neighbours of edits."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastedit import EditRequest

CONFIG: dict[str, Any] = {"layer": 2, "module": "mlp", "lr": 1e-2, "batch_size": 4, "epochs": 60}


def argmax_of_answers(model: nn.Module, tokenizer: Any, edits: list[EditRequest]) -> list[list[list[int]]]:
    """The likeliest token at each answer token of each neighbour of each edit, one plain forward each."""
    found: list[list[list[int]]] = []
    for edit in edits:
        found.append([])
        for prompt, answer in edit.neighbours:
            ids = tokenizer(f"{prompt} {answer}", return_tensors="pt").input_ids
            best = model(ids).logits[0].argmax(-1).tolist()
            found[-1].append(best[len(prompt.split()) - 1 : -1])
    return found


def share_that_agrees(one: list[list[list[int]]], other: list[list[list[int]]]) -> float:
    """Mean over edits of the mean over neighbours of the share of equal tokens."""
    edits = []
    for a, b in zip(one, other, strict=True):
        pairs = list(zip(a, b, strict=True))
        edits.append(sum(sum(map(int.__eq__, x, y)) / len(x) for x, y in pairs) / len(pairs))
    return sum(edits) / len(edits)
