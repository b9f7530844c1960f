"""Greedy continuations in shared batches are those of one prompt at a time, and cost what is asked of them."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from helpers import FAMILIES, VOCAB, tiny_model
from torch import Tensor, nn

from fastedit.models import Continuations, Topology, topology
from fastedit.models import continuations as module_under_test

_RNG = random.Random(7)
PROMPTS = [[_RNG.randrange(2, VOCAB) for _ in range(n)] for n in (9, 3, 17, 1, 9, 12, 5, 2, 8, 6)]
LIMITS = [8, 3, 12, 5, 1, 12, 7, 12, 2, 9]
ENDS = torch.tensor(range(0, VOCAB, 9))


@torch.no_grad()
def alone(model: Any, i: int) -> list[int]:
    """By plain passes over everything."""
    ids = list(PROMPTS[i])
    while len(ids) - len(PROMPTS[i]) < LIMITS[i]:
        ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] in ENDS:
            break
    return ids[len(PROMPTS[i]) :]


def together(parts: Topology, capacity: int) -> dict[int, list[int]]:
    def ended(which: Tensor, tokens: Tensor) -> Tensor:
        return torch.isin(tokens, ENDS)

    options: dict[str, Any] = {"capacity": capacity, "updates": {}, "edits": torch.zeros(len(PROMPTS)).long()}
    return dict(Continuations(parts, PROMPTS, LIMITS, ended, **options))


def count(parts: Topology, monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], list[tuple[int, int]]]:
    """Lists that will hold the rows of each call of the head and the shape of each call of the backbone."""
    heads: list[int] = []
    shapes: list[tuple[int, int]] = []
    own, forward = parts.head.forward, parts.backbone.forward

    def head(x: Tensor) -> Any:
        heads.append(len(x))
        return own(x)

    def backbone(input_ids: Tensor, **kwargs: Any) -> Any:
        shapes.append((input_ids.shape[0], input_ids.shape[1]))
        return forward(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(parts.head, "forward", head)
    monkeypatch.setattr(parts.backbone, "forward", backbone)
    return heads, shapes


@pytest.mark.parametrize("family", FAMILIES)
def test_as_one_at_a_time(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one batch, in several whose places are taken again, and one by one."""
    model = tiny_model(family, seed=2)
    wanted = {i: alone(model, i) for i in range(len(PROMPTS))}
    parts = topology(model.train())  # dropout must not act
    assert module_under_test.reads_caches(parts)
    heads, shapes = count(parts, monkeypatch)
    for capacity in (1000, 100, 1):
        heads.clear()
        assert together(parts, capacity) == wanted
        assert sum(heads) == sum(map(len, wanted.values()))  # no row after its end, none but the last token's
    assert model.training
    shapes.clear()
    together(parts, 1000)
    # after the trial's passes one over all prompts, then single tokens
    assert shapes[3:] == [(10, 17), *((n, 1) for n in heads[-len(shapes[4:]) :])]


@pytest.mark.parametrize("family", ["granite", "bloom", "mpt", "gpt_neo", "lfm2", "falcon_h1", "deepseek_v3"])
def test_measured_families_as_one_at_a_time(family: str) -> None:
    """Whether they read caches or, as those with recurrent blocks, want one of their own kind."""
    model = tiny_model(family, seed=2)
    wanted = {i: alone(model, i) for i in range(len(PROMPTS))}
    assert together(topology(model), 100) == wanted


def test_half_precision_reads_caches() -> None:
    for family in FAMILIES:
        assert module_under_test.reads_caches(topology(tiny_model(family, dtype=torch.bfloat16)))


class _Blind(nn.Module):
    """An attention that hides the cache from the one that it holds."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, *args: Any, past_key_values: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:
        return self.attention(*args, past_key_values=None, attention_mask=attention_mask, **kwargs)


class _Counting(nn.Module):
    """Position embeddings that count columns, whatever positions they are given."""

    def __init__(self, positions: nn.Module) -> None:
        super().__init__()
        self.positions = positions

    def forward(self, ids: Tensor) -> Tensor:
        result: Tensor = self.positions(torch.arange(ids.shape[1]).expand_as(ids))
        return result


@pytest.mark.parametrize("what", ["cache", "pads"])
def test_a_model_that_does_not_read_caches_runs_equal_lengths(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama" if what == "cache" else "gpt2", seed=2)
    if what == "cache":
        model.model.layers[2].self_attn = _Blind(model.model.layers[2].self_attn)
    else:
        model.transformer.wpe = _Counting(model.transformer.wpe)
    parts = topology(model)
    assert not module_under_test.reads_caches(parts)
    shapes = count(parts, monkeypatch)[1]
    assert together(parts, 1000) == {i: alone(model, i) for i in range(len(PROMPTS))}
    assert (2, 9) in shapes
    assert (10, 17) not in shapes
