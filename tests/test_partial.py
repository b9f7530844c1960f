"""Passes that run a part of the model equal the same part of the whole."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, ragged_samples, tiny_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fastedit.models import BlockCalls, HeldTokens, PrefixCache, Rows, observe, pack, resume, topology

LENGTHS = [12, 18, 7, 3, 12, 9, 18, 5, 2, 4]
HELD = torch.tensor([6, 11, 0, 1, 10, 3, 16, 2, 0, 1])  # tokens of each sample in front of the first that runs
SAMPLES = ragged_samples(LENGTHS)
SAMPLES = replace(SAMPLES, target_start=SAMPLES.target_start.maximum(HELD + 1))
GROUPS = [0, 1, 2, 3], [6, 5, 7]
LAST = 3


def rows_of(select: list[int]) -> tuple[Rows, Tensor, Tensor]:
    """One sample a row; the places of its held tokens and of the others."""
    rows = pack(SAMPLES, select, packed=False)
    width = rows.index.shape[1]
    held = rows.token_rows % width < HELD[select][rows.token_rows // width]
    return rows, rows.token_rows[held], rows.token_rows[~held]


@pytest.mark.parametrize("family", FAMILIES)
def test_held_tokens_change_nothing_and_do_not_run(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = topology(tiny_model(family))
    held = HeldTokens(parts, 2)
    assert held.supported
    with PrefixCache(parts, SAMPLES, 2) as cache:
        for select in GROUPS:
            rows, places, _ = rows_of(select)
            with held.record(rows, places):
                resume(parts, cache.hidden(rows), rows, 2)
        select = [7, 2, 6, 1]  # some of both groups, in another order
        rows, places, running = rows_of(select)
        ran = count_rows(parts.blocks, monkeypatch)
        overrides = held.overrides(rows, places, running)
        hidden = cache.hidden(rows)
        hidden.view(-1, 32)[running] += 0.3  # what a loop changes
        plain = hidden.clone().requires_grad_()
        wanted = resume(parts, plain, rows, 2)
        hidden.view(-1, 32)[places] = 1e3  # nobody reads these any more
        ran.clear()
        found = resume(parts, hidden.requires_grad_(), rows, 2, overrides)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * float(wanted.detach().abs().max()))
    wanted.square().sum().backward()
    found.square().sum().backward()
    one, other = (x.grad.view(-1, 32)[running] for x in (hidden, plain))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * float(other.abs().max()))
    assert {name[0] for name in ran} == {"2", "3"}
    assert len(ran) == sum(isinstance(m, nn.Linear | Conv1D) for m in parts.blocks[2:].modules())
    assert max(ran.values()) == len(running)
    others = [6, 1]  # those that have left are forgotten, the others are not
    rows, places, running = rows_of(others)
    with torch.no_grad():
        hidden = cache_of(parts, rows)
        again = resume(parts, hidden, rows, 2, held.overrides(rows, places, running))
        torch.testing.assert_close(again, resume(parts, hidden, rows, 2), rtol=0, atol=1e-4)
    assert held.nbytes == sum(m.weight.numel() // 32 for m in held._attended) * 4 * int(HELD[others].sum())


def cache_of(parts: Any, rows: Rows) -> Tensor:
    with PrefixCache(parts, SAMPLES, 2) as cache:
        return cache.hidden(rows)


def count_rows(blocks: nn.ModuleList, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """The rows of each linear map's input, filled as they run."""
    ran: dict[str, int] = {}
    names = {module: name for name, module in blocks.named_modules()}

    def counting(plain: Any) -> Any:
        def forward(self: nn.Module, x: Tensor) -> Tensor:
            if self in names:
                ran[names[self]] = x.numel() // x.shape[-1]
            return plain(self, x)

        return forward

    for kind in (nn.Linear, Conv1D):
        monkeypatch.setattr(kind, "forward", counting(kind.forward))
    return ran


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_calls_again_equal_a_resume(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(family).train()  # dropout must not act
    parts = topology(model)
    held = HeldTokens(parts, 2)
    rows, places, running = rows_of([7, 2, 6, 1])
    with PrefixCache(parts, SAMPLES, 2) as cache:
        hidden = cache.hidden(rows)
    with held.record(rows, places), torch.no_grad():
        resume(parts, hidden, rows, 2)
    ran = count_rows(parts.blocks, monkeypatch)
    calls = BlockCalls(parts, rows, 2, held.overrides(rows, places, running))
    work = []
    entered: list[int] = []
    parts.backbone.register_forward_pre_hook(lambda *_: entered.append(1))
    before = [(m.training, m.__dict__.get("forward"), len(m._forward_pre_hooks)) for m in model.modules()]
    for step in range(3):
        moved = hidden.clone()
        moved.view(-1, 32)[running] += 0.3 * step
        leaf = moved.clone().requires_grad_()
        ran.clear()
        found = calls.resume(leaf)
        work.append(dict(ran))
        found.square().sum().backward()
        assert sum(entered) == 1  # by the first alone
        assert work[-1] == work[0]  # held and pruned as in a resume
        assert max(ran.values()) == len(running)
        plain = moved.requires_grad_()
        wanted = resume(parts, plain, rows, 2)
        wanted.square().sum().backward()
        entered.pop()
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * float(wanted.detach().abs().max()))
        one, other = (x.grad.view(-1, 32)[running] for x in (leaf, plain))
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * float(other.abs().max()))
    assert [(m.training, m.__dict__.get("forward"), len(m._forward_pre_hooks)) for m in model.modules()] == before


def test_a_rebuilt_block_holds_nothing() -> None:
    model = tiny_model("llama")

    class Rebuilt(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) + 0.5 * x[..., :16]

    attention = topology(model).attn(LAST)
    attention.v_proj = Rebuilt(attention.v_proj)
    parts = topology(model)
    held = HeldTokens(parts, 2)
    rows, places, running = rows_of([0, 1])
    with held.record(rows, places), torch.no_grad():
        resume(parts, cache_of(parts, rows), rows, 2)
    assert not held.supported
    assert held.overrides(rows, places, running) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_observe_sees_what_a_hook_on_the_model_sees(family: str) -> None:
    model = tiny_model(family)
    parts = topology(model)
    rows = pack(SAMPLES, [7, 1, 0, 8, 4], packed=parts.packs, min_row=24)
    down, block = parts.resolve(2, "down_proj")[1], parts.blocks[LAST]
    seen: dict[str, list[Tensor]] = {"input": [], "output": [], "block": []}
    handles = [
        down.register_forward_pre_hook(lambda _, args: seen["input"].append(args[0])),
        down.register_forward_hook(lambda _, __, y: seen["output"].append(y)),
        block.register_forward_hook(lambda _, __, y: seen["block"].append(y[0] if isinstance(y, tuple) else y)),
    ]
    with torch.no_grad():
        for i in (7, 1, 0, 8, 4):
            first, end = SAMPLES.offsets[i], SAMPLES.offsets[i + 1] - 1
            model(input_ids=SAMPLES.input_ids[None, first:end], use_cache=False)
    for handle in handles:
        handle.remove()
    starts = [int(SAMPLES.target_start[i]) - 1 for i in (7, 1, 0, 8, 4)]
    wanted = {
        name: torch.cat([x.reshape(-1, x.shape[-1])[start:] for x, start in zip(each, starts, strict=True)])
        for name, each in seen.items()
    }
    ran: list[nn.Module] = []
    parts.blocks[LAST].register_forward_hook(lambda *_: ran.append(block))
    with PrefixCache(parts, SAMPLES, 1) as cache:
        hidden = cache.hidden(rows)
        found = {
            "input": observe(parts, hidden, rows, 1, down),
            "output": observe(parts, hidden, rows, 1, down, output=True),
        }
        assert not ran
        found["block"] = observe(parts, hidden, rows, 1, block, output=True)
    for name, values in wanted.items():
        torch.testing.assert_close(found[name], values, rtol=0, atol=1e-5 * float(values.abs().max()))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in down.modules())


def test_a_sample_alone_in_its_row_keeps_its_values_to_itself() -> None:
    """In a packed row a value that is not finite reaches every sample, since 0 times it is not 0."""
    model = tiny_model("llama")
    parts = topology(model)
    with torch.no_grad():
        model.get_input_embeddings().weight[SAMPLES.input_ids[0]] = torch.nan
    rows = pack(SAMPLES, range(len(SAMPLES)), packed=False)
    with PrefixCache(parts, SAMPLES, 2, packed=False) as cache, torch.no_grad():
        cache.advance(LAST)
        states = resume(parts, cache.hidden(rows), rows, LAST)
    has_it = torch.tensor([SAMPLES.input_ids[0] in SAMPLES.input_ids[a : b - 1] for a, b in pairs()])
    assert 0 < has_it.sum() < 5
    assert states[~has_it[rows.sample_of]].isfinite().all()


def pairs() -> list[tuple[int, int]]:
    offsets = SAMPLES.offsets.tolist()
    return list(pairwise(offsets))
