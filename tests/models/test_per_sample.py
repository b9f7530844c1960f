"""Batches in which every request meets its own edit, against the edits written into the weights one by one."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import WORDS, MakeEdits, tiny_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from fastedit import ConfigError, EditError, EditRequest, TensorError, WeightDelta
from fastedit.evaluation.predict import Prediction, Predictions, predict
from fastedit.models import Factors, Model, Topology, per_sample_updates, topology
from fastedit.weights import LowRank

FAMILIES = pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2", "gpt_neox", "opt_post_norm"])


def entangled(edits: list[EditRequest]) -> list[EditRequest]:
    """All ask the same neighbour, two the same prompt, and the prompts of each other."""
    first, *rest = edits
    rest[0] = replace(rest[0], prompt=first.prompt, target=first.target)
    shared = ((first.prompt + " w20", "w30 w31"), (rest[-1].prompt, rest[-1].target))
    return [
        replace(e, neighbours=(*e.neighbours[i % 3 :], *shared), portability=((e.paraphrases[0] + " w9", "w40"),))
        for i, e in enumerate([first, *rest])
    ]


def some_updates(model: Topology, n: int, seed: int) -> dict[nn.Module, Factors]:
    """Of two blocks, one of them the last, and of its attention; ranks 1 to 3; about as large as the weights."""
    rng = torch.Generator().manual_seed(seed)
    last = model.n_blocks - 1
    places = [(1, "down_proj"), (last, "down_proj"), (last, "up_proj"), (last, _output_of_attention(model))]
    updates = {}
    for k, (layer, name) in enumerate(places):
        module = model.resolve(layer, name)[1]
        out, inner = _weight(module).shape
        k = 1 + k % 3
        left, right = torch.randn(n, out, k, generator=rng), torch.randn(n, k, inner, generator=rng)
        updates[module] = (left / math.sqrt(k), right / inner)
    return updates


def _output_of_attention(model: Topology) -> str:
    names = {m: name for name, m in model.block(0).named_modules()}
    return next(names[m] for m in reversed(list(model.attn(0).modules())) if isinstance(m, nn.Linear | Conv1D))


def _weight(module: Any) -> torch.Tensor:
    """[out, in]"""
    weight: torch.Tensor = module.weight.detach()
    return weight.T if isinstance(module, Conv1D) else weight


def one_by_one(
    model: Topology, tokenizer: Any, edits: list[EditRequest], updates: dict[nn.Module, Factors], **options: Any
) -> list[Prediction]:
    """The results of `predict` with each edit in the weights, for its request alone."""
    paths = {module: f"{path}.weight" for path, module in model.model.named_modules()}
    found = []
    for i, edit in enumerate(edits):
        low = {}
        for module, (left, right) in updates.items():
            turned = isinstance(module, Conv1D)
            low[paths[module]] = LowRank(right[i].T, left[i].T) if turned else LowRank(left[i], right[i])
        delta = WeightDelta(low, {})
        delta.apply(model.model, force=True)
        found += all_of(predict(Model(model, tokenizer), [edit], **options))
        delta.revert()
    return found


def all_of(predictions: Predictions) -> list[Prediction]:
    return [p for answers in predictions.answers for found in answers.values() for p in found]


@FAMILIES
def test_answers_are_those_of_each_edit_alone(family: str, tokenizer: Any, make_edits: MakeEdits, seed: int) -> None:
    """In one batch and in several."""
    model, edits = topology(tiny_model(family, seed=seed)), entangled(make_edits(9))
    updates = some_updates(model, len(edits), seed)
    plain = predict(Model(model, tokenizer), edits, generate=False)
    wanted = one_by_one(model, tokenizer, edits, updates, generate=False)
    for batch_tokens in (4096, 70):
        found = predict(Model(model, tokenizer), edits, generate=False, updates=updates, batch_tokens=batch_tokens)
        assert len(all_of(found)) == len(wanted) == sum(4 + len(e.neighbours) - 1 for e in edits)
        for one, other in zip(all_of(found), wanted, strict=True):
            assert (one.prompt, one.answer, one.argmax) == (other.prompt, other.answer, other.argmax)
            assert one.logp == pytest.approx(other.logp, abs=2e-5)
            assert one.other_logp == (None if other.other_logp is None else pytest.approx(other.other_logp, abs=2e-5))
    moved = [abs(a.logp - b.logp) for a, b in zip(all_of(plain), wanted, strict=True)]
    assert sorted(moved)[len(moved) // 2] > 0.01  # the edits matter
    assert predict(Model(model, tokenizer), edits, generate=False) == plain  # and are gone


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_generated_texts_are_those_of_each_edit_alone(
    family: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random, but the same in every run: over hundreds of tokens two may come as close as rounding."""
    monkeypatch.setattr("fastedit.evaluation.questions._NEW_TOKENS", 12)
    rng = random.Random(5)

    def text(n: int) -> str:
        return " ".join(rng.choices(WORDS, k=n))

    shared = text(5)
    edits = [EditRequest(text(3), "w9", neighbours=((shared, "w9"), (text(5), "w9"))) for _ in range(4)]
    model = topology(tiny_model(family, seed=3))
    updates = {module: (2 * left, right) for module, (left, right) in some_updates(model, len(edits), 4).items()}
    wanted = [p.generated for p in one_by_one(model, tokenizer, edits, updates)]
    assert len({*wanted[1::3]}) > 1  # of the neighbour that all share
    for batch_tokens in (4096, 20):
        found = predict(Model(model, tokenizer), edits, updates=updates, batch_tokens=batch_tokens)
        assert [p.generated for p in all_of(found)] == wanted


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@torch.no_grad()
def test_a_map_adds_what_the_edit_of_each_token_says(kind: Any, dtype: torch.dtype, seed: int) -> None:
    """Whole rows with one edit, and tokens with one each; the sum is rounded once, from fp32."""
    rng = torch.Generator().manual_seed(seed)
    module = (kind(24, 40) if kind is nn.Linear else kind(40, 24)).to(dtype)
    left, right = torch.randn(50, 40, 2, generator=rng), torch.randn(50, 2, 24, generator=rng)
    x = torch.randn(5, 6, 24, generator=rng).to(dtype)
    plain = module(x)
    for n in (5, 30):
        owner = torch.randint(50, (n,), generator=rng)
        each = owner.repeat_interleave(30 // n).view(5, 6)
        with per_sample_updates({module: (left, right)}, owner):
            found, flat = module(x), module(x.view(30, 24))
            with pytest.raises(TensorError, match=f"{n - 1} tokens.* {n} owners"):
                module(x.view(30, 24)[: n - 1])
        added = torch.einsum("brok,brki,bri->bro", left[each].double(), right[each].double(), x.double())
        exact = plain.double() + added
        scale = torch.einsum("brok,brki,bri->bro", left[each].abs(), right[each].abs(), x.abs().float()) + plain.abs()
        allowed = exact.abs() * torch.finfo(dtype).eps / 2 + scale * 30 * min(
            torch.finfo(dtype).eps, torch.finfo(torch.float32).eps
        )
        assert found.dtype == dtype
        assert ((found - exact).abs() <= allowed).all()
        assert torch.equal(found.view(30, 40), flat)
    assert torch.equal(module(x), plain)


def test_what_breaks_is_named_and_leaves_no_edit_behind(tokenizer: Any, make_edits: MakeEdits, seed: int) -> None:
    model, edits = topology(tiny_model("llama", seed=seed)), make_edits(4)
    edits[0] = replace(edits[0], neighbours=edits[2].neighbours)
    updates = some_updates(model, 4, seed)
    plain = predict(Model(model, tokenizer), edits, generate=False)
    left, right = next(iter(updates.values()))
    named = r"NaN or infinity \((request edit-0-2, \w+(; )?)+\)"
    for bad, said in ((math.nan, r"not finite \(edit-0-2\)"), (3e38, named)):
        left[2] = right[2] = bad
        with pytest.raises(EditError, match=said):
            predict(Model(model, tokenizer), edits, updates=updates)
        assert predict(Model(model, tokenizer), edits, generate=False) == plain
    with pytest.raises(TensorError, match="of 4 edits do not fit 3 requests"):
        predict(Model(model, tokenizer), edits[:3], updates=updates)
    with pytest.raises(ConfigError, match="without updates"):
        predict(Model(model, tokenizer), edits, text=["w9 w10"], updates=updates)
