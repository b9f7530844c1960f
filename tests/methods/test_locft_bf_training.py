"""LocFT-BF in every dtype and family, the order of its batches, and what it tells of its progress."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import FAMILIES, MakeEdits, in_fp64, state, tiny_model
from locft_loop import DOWN_PROJ, changed, run
from torch import Tensor

from fastedit.methods.locft_bf import passes, trainer


@pytest.mark.parametrize("family", FAMILIES)
def test_fp32_learns_as_fp64(family: str, tokenizer: Any, make_edits: MakeEdits, seed: int) -> None:
    """Where rounding decides which way a weight goes, by lr = 3e-3, the loss moves by about lr² if at all."""
    model, edits = tiny_model(family, seed=seed), make_edits(13)
    with in_fp64():
        wanted = run(copy.deepcopy(model).double(), tokenizer, edits, module="block", epochs=2)
    result = run(model, tokenizer, edits, module="block", epochs=2)
    assert {update.dtype for update in result.updates.values()} == {torch.float32}
    assert result.losses == pytest.approx(wanted.losses, rel=1e-4)


def test_fp16_keeps_the_digits_of_small_gradients(
    tokenizer: Any, make_edits: MakeEdits, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the mean over a batch are below the smallest normal number of fp16, as near the end of training."""
    gradients: list[Tensor] = []

    def step(optimizer: Any, *args: Any) -> None:
        gradients.append(optimizer._masters["model.layers.2.mlp.down_proj.weight"].grad * (1e-8 / optimizer._eps))
        optimizer.clear()

    monkeypatch.setattr(trainer.Adam, "step", step)
    model, edits = tiny_model("llama", seed=seed), make_edits(64)
    model.lm_head.weight.data /= 2048
    model.model.norm.weight.data *= 2048
    model.half()
    for given in (copy.deepcopy(model).float(), model):
        run(given, tokenizer, edits, batch_size=64, epochs=1)
    wanted, mine = gradients
    assert (mine - wanted).norm() <= 0.01 * wanted.norm()


def test_cache_in_a_file_gives_the_same_edit(tokenizer: Any, make_edits: MakeEdits, seed: int) -> None:
    edits = make_edits(13)
    one, other = (run(tiny_model("llama"), tokenizer, edits, cache_bytes=n) for n in (0, None))
    for name, update in one.updates.items():
        # up to rounding: what is frozen beside the trained matrix runs in each pass, with other samples beside
        assert (update - other.updates[name]).norm() <= 1e-5 * update.norm()


def test_bf16_model_holds_the_rounded_fp32_edit(tokenizer: Any, make_edits: MakeEdits, seed: int) -> None:
    """The steps are below bf16's resolution: they add up in fp32 or are lost."""
    model, edits = tiny_model("llama", dtype=torch.bfloat16, seed=seed), make_edits(13)
    before, name = state(model), f"{DOWN_PROJ}.weight"
    result = run(model, tokenizer, edits, lr=1e-5, epochs=8)
    update = result.updates[name]
    assert update.dtype == torch.float32
    assert model.get_parameter(name).dtype == result.originals[name].dtype == torch.bfloat16
    assert torch.equal(model.get_parameter(name), (before[name].float() + update).bfloat16())
    assert changed(model, before) <= {name}
    assert update.abs().median() > 1e-5  # several steps of 1e-5, of a weight of 0.1 with 8 bits
    model = tiny_model("llama", dtype=torch.bfloat16, seed=seed)
    exact = run(model.float(), tokenizer, edits, lr=1e-5, epochs=8)
    cosine = torch.cosine_similarity(update.flatten(), exact.updates[name].flatten(), dim=0)
    assert cosine > 0.95


def test_bf16_model_learns_as_the_fp32_one(tokenizer: Any, make_edits: MakeEdits, seed: int) -> None:
    edits, config = make_edits(13), {"module": "block", "epochs": 8}
    model = tiny_model("llama", dtype=torch.bfloat16, seed=seed)
    wanted = run(copy.deepcopy(model).float(), tokenizer, edits, **config).losses
    assert run(model, tokenizer, edits, **config).losses == pytest.approx(wanted, rel=0.03)
    assert wanted[-1] < 0.7 * wanted[0]


def test_order_comes_from_the_seed(tokenizer: Any, make_edits: MakeEdits, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every epoch takes every edit once, in an order of its own; one seed, one order, one result."""
    edits, pack = make_edits(13), passes.pack
    seen: list[list[int]] = []

    def spy(samples: Any, select: Tensor, **kwargs: Any) -> Any:
        seen.append(select.tolist())
        return pack(samples, select, **kwargs)

    monkeypatch.setattr(passes, "pack", spy)

    def order(**config: Any) -> tuple[list[list[int]], Tensor]:
        seen.clear()
        result = run(tiny_model("llama"), tokenizer, edits, epochs=3, **config)
        flat = [i for batch in seen for i in batch]
        return [flat[i : i + 13] for i in range(0, len(flat), 13)], *result.updates.values()

    epochs, update = order(shuffle=True, seed=5)
    assert len(epochs) == 3
    assert all(sorted(epoch) == list(range(13)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    torch.manual_seed(123)  # the global state has no say
    again, same = order(shuffle=True, seed=5)
    assert again == epochs
    assert torch.equal(update, same)
    assert order(shuffle=True, seed=6)[0] != epochs
    assert order(shuffle=False)[0] == [list(range(13))] * 3


def test_progress_counts_epochs_and_tells_their_loss(tokenizer: Any, make_edits: MakeEdits) -> None:
    calls: list[tuple[Any, ...]] = []
    result = run(tiny_model("llama"), tokenizer, make_edits(13), lambda *args: calls.append(args))
    assert [call for call in calls if call[0] == "train"] == [
        ("train", i, 4, loss) for i, loss in enumerate(result.losses, 1)
    ]
    assert [call for call in calls if call[0] == "prefix"][-1][1:3] == (13, 13)


def test_an_epoch_that_takes_long_is_reported_on(
    tokenizer: Any, make_edits: MakeEdits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "_NEWS", -1.0)
    calls: list[tuple[Any, ...]] = []
    run(tiny_model("llama"), tokenizer, make_edits(13), lambda *args: calls.append(args), epochs=2, batch_size=5)
    within = [call for call in calls if call[0] == "epoch"]
    assert within == [("epoch", done, 26) for done in (5, 10, 13, 18, 23, 26)]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_learns(family: str, tokenizer: Any, make_edits: MakeEdits, seed: int) -> None:
    losses = run(tiny_model(family, seed=seed), tokenizer, make_edits(6), module="block", epochs=6).losses
    assert losses[-1] < 0.9 * losses[0]
