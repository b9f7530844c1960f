"""Passes that run a part of the model equal the same part of the whole."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from helpers import FAMILIES, WithoutCache, ragged_samples, tiny_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from fastedit.models import (
    BlockCalls,
    HeldTokens,
    PrefixCache,
    Rows,
    at_tokens,
    held_tokens,
    observe,
    pack,
    resume,
    topology,
)

LENGTHS = [12, 18, 7, 3, 12, 9, 18, 5, 2, 4]
HELD = torch.tensor([6, 11, 0, 1, 10, 3, 16, 2, 0, 1])  # tokens of each sample in front of the first that runs
SAMPLES = ragged_samples(LENGTHS)
SAMPLES = replace(SAMPLES, target_start=SAMPLES.target_start.maximum(HELD + 1))
GROUPS = [0, 1, 2, 3], [6, 5, 7]
LAST = 3


def moved(hidden: Tensor, rows: Rows, select: list[int], by: float) -> Tensor:
    """The state with what a loop changes: the first token of each sample that is not held."""
    first = torch.arange(len(select)) * rows.index.shape[1]
    if int(rows.position_ids.view(-1)[first].max()) == 0:  # rows of whole samples
        first = first + HELD[select]
    flat = hidden.reshape(-1, hidden.shape[-1])
    return flat.index_add(0, first, flat.new_full((len(select), flat.shape[1]), by)).view_as(hidden)


def gradient_in(hidden: Tensor, rows: Rows, select: list[int]) -> Tensor:
    """Of the tokens that are not held, sample after sample."""
    assert hidden.grad is not None
    at = rows.token_rows
    running = rows.position_ids.view(-1)[at] >= HELD[select][at // rows.index.shape[1]]
    return hidden.grad.view(-1, hidden.shape[-1])[at[running]]


@pytest.mark.parametrize("family", FAMILIES)
def test_held_tokens_change_nothing_and_do_not_run(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(family).train()  # dropout must not act
    parts = topology(model)
    with PrefixCache(parts, SAMPLES, 2) as cache:
        held = HeldTokens(parts, cache, SAMPLES, HELD)
        ran = count_rows(parts.blocks, monkeypatch)
        for group in GROUPS:
            ran.clear()
            held.record(torch.tensor(group))
            assert {n for name, n in ran.items() if name[0] == "2"} == {int(HELD[group].sum())}
            assert {n for name, n in ran.items() if name[0] == "3"} == {int(HELD[group].sum()), 0}  # no target there
        assert held.supported
        entered: list[int] = []
        parts.backbone.register_forward_pre_hook(lambda *_: entered.append(1))
        before = [(m.training, m.__dict__.get("forward"), len(m._forward_pre_hooks)) for m in model.modules()]
        everything = sum(len(x) for pair in held._recorded.values() for x in pair)
        # some of both groups in another order, others while all are recorded, some of these, one with a single token
        for select, keep in (([7, 2, 6, 1], False), ([1, 3], False), ([7, 2, 6, 1], True), ([6, 1], True), ([6], True)):
            if keep:
                held.keep(torch.tensor(select))
            assert keep or everything == sum(len(x) for pair in held._recorded.values() for x in pair)
            rows, past = held.remaining(torch.tensor(select))
            assert len(rows.token_rows) == int((SAMPLES.lengths - 1 - HELD)[select].sum())
            whole = pack(SAMPLES, select, packed=False)
            calls = BlockCalls(parts, rows, 2, at_tokens(parts, rows, 2), past)
            entered.clear()
            for step in range(3):
                leaf = moved(cache.hidden(rows), rows, select, 0.3 * step).requires_grad_()
                ran.clear()
                found = calls.resume(leaf)
                assert len(entered) == 1  # by the first alone
                assert len(ran) == sum(isinstance(m, nn.Linear | Conv1D) for m in parts.blocks[2:].modules())
                assert max(ran.values()) == len(rows.token_rows)
                assert min(ran.values()) == len(rows.target_rows)  # pruned
                plain = moved(cache.hidden(whole), whole, select, 0.3 * step).requires_grad_()
                wanted = resume(parts, plain, whole, 2)
                entered.pop()
                torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * float(wanted.detach().abs().max()))
                wanted.square().sum().backward()
                found.square().sum().backward()
                one, other = gradient_in(leaf, rows, select), gradient_in(plain, whole, select)
                torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * float(other.abs().max()))
        kept = held._recorded[LAST]
        assert held.nbytes == sum(x.nbytes for x in kept) * 2
        assert len(kept[0]) == int(HELD[6])  # the others are forgotten
    assert [(m.training, m.__dict__.get("forward"), len(m._forward_pre_hooks)) for m in model.modules()] == before


def test_held_tokens_run_in_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = topology(tiny_model("llama"))
    passes: list[int] = []
    with PrefixCache(parts, SAMPLES, 2) as cache:
        at_once, in_passes = (HeldTokens(parts, cache, SAMPLES, HELD) for _ in range(2))
        everything = torch.arange(len(HELD))
        at_once.record(everything)
        monkeypatch.setattr(held_tokens, "pass_tokens", lambda _: 12)
        parts.blocks[2].register_forward_pre_hook(lambda _, args: passes.append(len(args[0])))
        in_passes.record(everything)
    assert len(passes) > 1
    assert sum(passes) == int((HELD > 0).sum())
    assert torch.equal(in_passes._tokens, at_once._tokens)
    for block, wanted in at_once._recorded.items():
        torch.testing.assert_close(in_passes._recorded[block], wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_attention_to_held_tokens_is_products_on_a_cpu(family: str) -> None:
    """Of as many heads of keys as of queries; the fused kernel's gradient of what is held is most of its time."""

    class Counted(TorchDispatchMode):
        n = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.n += "scaled_dot_product" in str(func)
            return func(*args, **(kwargs or {}))

    model = tiny_model(family)
    parts = topology(model)
    with PrefixCache(parts, SAMPLES, 2) as cache:
        held = HeldTokens(parts, cache, SAMPLES, HELD)
        held.record(torch.tensor([0, 1]))
        rows, past = held.remaining(torch.tensor([0, 1]))
        calls = BlockCalls(parts, rows, 2, at_tokens(parts, rows, 2), past)
        with Counted() as fused:
            hidden = cache.hidden(rows).requires_grad_()
            for _ in range(2):
                calls.resume(hidden).sum().backward()
            assert fused.n == 0
            resume(parts, hidden, rows, 2, past=past)
            assert fused.n > 0


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


def test_nothing_is_held_where_attention_asks_no_cache() -> None:
    model = tiny_model("llama")
    model.model.layers[LAST].self_attn = WithoutCache(model.model.layers[LAST].self_attn)
    parts = topology(model)
    with PrefixCache(parts, SAMPLES, 2) as cache:
        held = HeldTokens(parts, cache, SAMPLES, HELD)
        held.record(torch.tensor([0, 1]))
        assert not held.supported
        rows, past = held.remaining(torch.tensor([0, 1]))
    assert past is None
    assert len(rows.token_rows) == int((SAMPLES.lengths - 1)[:2].sum())


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
