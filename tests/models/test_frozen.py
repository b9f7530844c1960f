"""The frozen part of an edited block: it runs once, in no pass of training, and nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import FAMILIES, ragged_samples, tiny_model
from torch import Tensor, nn

from fastedit.models import Budget, FrozenPart, PrefixCache, Topology, pack, resume, topology

SAMPLES = ragged_samples([9, 2, 18, 7, 3, 12])
LAYER = 1
ALL = torch.arange(len(SAMPLES))


def runs(module: nn.Module) -> list[int]:
    """Counts the calls of the module's own forward in the list's single number."""
    count, forward = [0], module.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        return forward(*args, **kwargs)

    module.forward = counted  # type: ignore[method-assign]
    return count


def gradient(
    parts: Topology, cache: PrefixCache, trained: nn.Module, select: Tensor, frozen: FrozenPart | None
) -> list[Tensor]:
    """The states at target rows, and gradients of their sum of squares in the trained weights."""
    rows = pack(SAMPLES, select, packed=parts.packs)
    overrides = [] if frozen is None else frozen.overrides(rows)
    states = resume(parts, cache.hidden(rows), rows, cache.layer, overrides)
    return [states.detach(), *torch.autograd.grad(states.square().sum(), list(trained.parameters()))]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["down_proj", "up_proj"])
def test_a_pass_runs_without_it_and_gives_the_same(family: str, name: str) -> None:
    model = tiny_model(family)
    parts = topology(model)
    trained, attention = parts.resolve(LAYER, name)[1], parts.attn(LAYER)
    up = parts.resolve(LAYER, "up_proj")[1]
    with PrefixCache(parts, SAMPLES, LAYER) as cache:
        frozen = FrozenPart(parts, cache, trained)
        with torch.no_grad():  # what is trained changes between passes
            for weight in trained.parameters():
                weight += 0.1 * torch.randn_like(weight)
        mixed = ALL[torch.tensor([5, 0, 3, 2, 4, 1])]
        wanted = gradient(parts, cache, trained, mixed, None)
        attended, raised = runs(attention), runs(up)
        found = gradient(parts, cache, trained, mixed, frozen)
    assert attended == [0]
    assert raised == [int(trained is up or family.startswith("opt"))]  # OPT has no MLP to stand in for
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * float(other.abs().max()))


@pytest.mark.parametrize(("name", "layer"), [("attn", 1), ("block", 1), ("input_layernorm", 1), ("down_proj", 3)])
def test_nothing_is_kept_that_training_changes_or_a_pass_leaves_out(name: str, layer: int) -> None:
    parts = topology(tiny_model("llama"))
    trained = parts.resolve(layer, name)[1]
    with PrefixCache(parts, SAMPLES, layer) as cache:
        assert FrozenPart(parts, cache, trained).overrides(pack(SAMPLES, ALL)) == []


@pytest.mark.parametrize(("room", "kept"), [(0, 0), (32, 1), (32 + 56, 2)])
def test_what_the_budget_does_not_hold_runs_again(room: int, kept: int) -> None:
    parts = topology(tiny_model("llama"))
    trained = parts.resolve(LAYER, "down_proj")[1]
    size = 4 * SAMPLES.input_ids.numel()  # of a column in fp32; the cache itself has 32
    with PrefixCache(parts, SAMPLES, LAYER, budget=Budget(host_bytes=size * (32 + room))) as cache:
        frozen = FrozenPart(parts, cache, trained)
        wanted = gradient(parts, cache, trained, ALL, None)
        assert len(frozen.overrides(pack(SAMPLES, ALL))) == kept
        for one, other in zip(gradient(parts, cache, trained, ALL, frozen), wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_an_mlp_that_goes_on_after_its_last_projection_runs_whole() -> None:
    parts = topology(tiny_model("llama"))
    trained, mlp = parts.resolve(LAYER, "down_proj")[1], parts.mlp(LAYER)
    forward = mlp.forward
    mlp.forward = lambda x: 2 * forward(x)  # type: ignore[method-assign]
    with PrefixCache(parts, SAMPLES, LAYER) as cache:
        frozen = FrozenPart(parts, cache, trained)
        wanted = gradient(parts, cache, trained, ALL, None)
        for one, other in zip(gradient(parts, cache, trained, ALL, frozen), wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
