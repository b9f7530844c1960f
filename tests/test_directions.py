"""Directions of behaviours: found between prompts, ablated from what is written to the residual stream."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import moments, same, tiny_model, values
from torch import Tensor, nn

from fastedit import ConfigError, ModelError, WeightDelta
from fastedit.directions import Direction, ablate, ablate_preserving, find
from fastedit.models import topology
from fastedit.statistics.store import StatisticsStore

HAVING = [f"w{i} w20 w{i + 3}" for i in range(30, 40)]
LACKING = [f"w{i} w21 w{i + 3}" for i in range(30, 40)]


@torch.no_grad()
def behind_blocks(model: nn.Module, tokenizer: Any, prompt: str) -> Tensor:
    """The residual stream after each block but the last, whose output is given with the final norm, [L - 1, T, h]."""
    ids = torch.tensor([tokenizer(prompt).input_ids])
    return torch.cat(model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states[1:-1])


def test_a_direction_is_the_difference_of_means_at_the_last_token(tokenizer: Any) -> None:
    model = tiny_model("llama")
    found = find(model, tokenizer, HAVING, LACKING)
    assert [d.layer for d in found] == [0, 1, 2, 3]
    a, b = (
        torch.stack([behind_blocks(model, tokenizer, p)[:, -1] for p in some]).mean(0) for some in (HAVING, LACKING)
    )
    for d, gap in zip(found, a - b, strict=False):
        torch.testing.assert_close(d.vector, gap / gap.norm(), atol=1e-5, rtol=0)
    noise = find(model, tokenizer, HAVING[::2] + LACKING[::2], HAVING[1::2] + LACKING[1::2])
    assert max(abs(d.separation) for d in noise) < max(d.separation for d in found)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_nothing_is_written_along_ablated_directions(family: str, tokenizer: Any, rng: torch.Generator) -> None:
    """Of all blocks, with matrices that are transposed (GPT-2), with biases, and of the embeddings."""
    model = tiny_model(family)
    before, Q = values(model), torch.linalg.qr(torch.randn(32, 2, generator=rng)).Q
    delta = ablate(model, Q.T * torch.tensor([[3.0], [0.1]]), embeddings=True)
    assert same(model, before)
    delta.apply(model)
    stream = behind_blocks(model, tokenizer, HAVING[0])
    assert (stream @ Q).abs().max() < 1e-4
    assert stream.norm(dim=-1).min() > 0.1
    delta.revert()
    assert same(model, before)
    assert (behind_blocks(model, tokenizer, HAVING[0]) @ Q).abs().max() > 1e-2


def test_layers_alone_keep_the_others_and_a_delta_is_saved(tokenizer: Any, tmp_path: Path) -> None:
    model = tiny_model("llama")
    before, r = values(model), torch.eye(32)[5]
    ablate(model, r, layers=[1]).save(tmp_path / "delta.safetensors")
    WeightDelta.load(tmp_path / "delta.safetensors").apply(model)
    changed = {name for name, value in values(model).items() if not torch.equal(value, before[name])}
    assert changed == {"model.layers.1.mlp.down_proj.weight", "model.layers.1.self_attn.o_proj.weight"}
    for name in changed:
        wanted = before[name].clone()
        wanted[5] = 0
        torch.testing.assert_close(values(model)[name], wanted)


def test_an_ablation_that_preserves_is_the_least_squares_update(tokenizer: Any, tmp_path: Path) -> None:
    model = tiny_model("llama")
    moments(model, tmp_path, seed=3)
    r = find(model, tokenizer, HAVING, LACKING)[1].vector
    delta = ablate_preserving(model, tokenizer, r, HAVING, layers=[2], weight=0.5, statistics=tmp_path)
    parts = topology(model)
    (path,) = delta.updates
    down = parts.resolve(2, "down_proj")[1]
    keys: list[Tensor] = []
    handle = down.register_forward_hook(lambda _, args, __: keys.append(args[0][0, -1]))
    for prompt in HAVING:
        model(input_ids=torch.tensor([tokenizer(prompt).input_ids]))
    handle.remove()
    K, C = torch.stack(keys).detach().double(), StatisticsStore(parts, delta.metadata["fingerprint"],
                                                                directory=tmp_path).covariance(2).double()  # fmt: skip
    R = -torch.outer(r, r).double() @ down.weight.detach().double() @ K.T
    wanted = R @ K @ torch.linalg.inv(0.5 * len(K) * C + K.T @ K)
    update: Any = delta.updates[path]
    assert update.left.shape == (32, 1)
    torch.testing.assert_close(update.dense().double(), wanted, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m, t: find(m, t, HAVING[:3], LACKING), ConfigError, "3 prompts having it and 10 lacking it"),
        (
            lambda m, t: find(m, t, HAVING, [*LACKING, "w9 " * 90]),
            ConfigError,
            "1 prompts have no tokens, or more than",
        ),
        (lambda m, t: find(m, t, HAVING, HAVING), ModelError, "the same mean after block 0"),
        (lambda m, t: ablate(m, torch.ones(31)), ConfigError, "expected finite ones of width 32"),
        (lambda m, t: ablate(m, torch.full((32,), float("nan"))), ConfigError, "expected finite ones"),
        (lambda m, t: ablate(m, torch.ones(2, 32)), ConfigError, "2 directions depend on one another"),
        (lambda m, t: ablate(m, torch.ones(32), layers=[9]), ModelError, "layer 9 does not exist"),
        *(
            (lambda m, t, layers=layers: ablate(m, torch.ones(32), layers=layers), ConfigError, said)
            for layers, said in [
                (3, "layers is 3; give a list of whole numbers"),
                ("12", "layers is '12'; give a list"),
                ([1.0], r"layers is \[1\.0\]; give a list of whole numbers"),
                ([True], r"layers is \[True\]; give a list of whole numbers"),
                ([], r"layers is \[\]; give a list"),
                ([1, 2, 1], r"layers is \[1, 2, 1\]; give each block once"),
            ]
        ),
        *(
            (lambda m, t, given=given: ablate(m, given), ConfigError, f"direction is {said}")
            for given, said in [
                ([1.0] * 32, r"a list: expected a dense tensor of floating-point numbers, \[32\] or \[k, 32\]"),
                (Direction(1, torch.ones(32), 1.0), "a Direction: .*the `vector` of a `Direction`"),
                (torch.ones(32, dtype=torch.bool), "torch.bool, torch.strided, on cpu: expected"),
                (torch.ones(32, dtype=torch.complex64), "torch.complex64"),
                (torch.ones(32).to_sparse(), "torch.float32, torch.sparse_coo"),
                (torch.ones(32, device="meta"), "torch.float32, torch.strided, on meta"),
            ]
        ),
        (lambda m, t: find(m, t, "w9 w10", LACKING), ConfigError, "having is 'w9 w10'; give a list of texts"),
        (lambda m, t: find(m, t, HAVING, [*LACKING, 5]), ConfigError, r"1 of lacking are not texts: 10 \(counted"),
        (lambda m, t: ablate_preserving(m, t, torch.ones(32), []), ConfigError, r"prompts is \[\]; give a list"),
        (
            lambda m, t: ablate_preserving(m, t, torch.ones(32), HAVING, weight=float("inf")),
            ConfigError,
            "weight is inf; give more than 0",
        ),
        (lambda m, t: ablate_preserving(m, t, torch.ones(32), HAVING, weight=0), ConfigError, "give more than 0"),
        (lambda m, t: ablate_preserving(m, t, torch.ones(32), HAVING), ModelError, "fastedit covariance"),
    ],
)
def test_what_cannot_be_ablated(
    call: Callable[[Any, Any], Any], error: type[Exception], message: str, tokenizer: Any
) -> None:
    with pytest.raises(error, match=message):
        call(tiny_model("llama"), tokenizer)


def test_models_that_write_through_a_norm_are_refused() -> None:
    with pytest.raises(ModelError, match="has a norm or a factor after its MLPs"):
        ablate(tiny_model("gemma2"), torch.ones(32))
