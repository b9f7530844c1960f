"""LocFT-BF against the published loop, and what an edit must leave alone."""

from __future__ import annotations

import copy
import inspect
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from families import DENSE, SHARED
from helpers import FAMILIES, MakeEdits, in_fp64, state, tiny_model
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoConfig, AutoModelForCausalLM

from fastedit import ConfigError, EditError, EditRequest, ModelError, RequestError, ops
from fastedit.methods import LocFTBFConfig, contexts
from fastedit.methods.base import LIKELY, MethodResult
from fastedit.methods.locft_bf import trainer
from fastedit.methods.locft_bf.choices import batch_size_for
from fastedit.methods.locft_bf.method import plan
from fastedit.methods.presets import locft_bf_preset
from fastedit.models import Model, Samples, pack, tokenize, topology

Pairs = Sequence[tuple[str, str]]
DOWN_PROJ = "model.layers.2.mlp.down_proj"  # of llama
PLAIN: dict[str, Any] = {"lr": 3e-3, "batch_size": 4, "epochs": 4, "skip_loss": 0.0, "stop_loss": 0.0}


@pytest.fixture
def double() -> Iterator[None]:
    with in_fp64():
        yield


@dataclass
class Published:
    """What the published loop did."""

    updates: dict[str, Tensor]
    losses: list[float]
    batch_losses: list[float]

    def check(self, result: MethodResult) -> None:
        """In fp64 the result is the same, every weight and every epoch's loss.

        The key bias needs most of the 1e-9: rounding of 1e-17 over Adam's epsilon. Others come out to 1e-13.
        """
        assert result.updates.keys() == self.updates.keys()
        size = torch.stack([wanted.norm() for wanted in self.updates.values()]).norm()
        for name, wanted in self.updates.items():
            assert wanted.dtype == result.updates[name].dtype == torch.float64
            assert (result.updates[name] - wanted).norm() <= 1e-9 * size, name
        assert result.losses == pytest.approx(self.losses, rel=1e-12)


def published(
    model: nn.Module,
    tokenizer: Any,
    pairs: Pairs,
    prefix: str,
    *,
    lr: float,
    batch_size: int,
    epochs: int,
    skip_loss: float,
    stop_loss: float,
    loss_average: str = "sample",
    weight_decay: float = 0.0,
    lr_schedule: str = "constant",
) -> Published:
    """The published loop: padded batches, the whole model every step, logits at all positions."""
    model = copy.deepcopy(model).eval().requires_grad_(False)
    names = [name for name, _ in model.named_parameters() if name.startswith(f"{prefix}.")]
    weights = [model.get_parameter(name).requires_grad_() for name in names]
    before = [weight.detach().clone() for weight in weights]
    optimizer = torch.optim.Adam(weights, lr=lr, weight_decay=weight_decay)
    n_steps = epochs * -(-len(pairs) // batch_size) if lr_schedule == "linear" else None
    rate = LambdaLR(optimizer, lambda step: 1 - step / n_steps if n_steps else 1.0)
    run = Published({}, [], [])
    for _ in range(epochs):
        total = 0.0
        for start in range(0, len(pairs), batch_size):
            batch = pairs[start : start + batch_size]
            nll, counts = padded_nll(model, tokenizer, batch)
            loss = (nll.sum(1) / counts).mean() if loss_average == "sample" else nll.sum() / counts.sum()
            run.batch_losses.append(loss.item())
            total += loss.item() * len(batch)
            if loss.item() < skip_loss:
                continue
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rate.step()
        run.losses.append(total / len(pairs))
        if run.losses[-1] < stop_loss:
            break
    run.updates = {n: w.detach() - b for n, w, b in zip(names, weights, before, strict=True)}
    return run


def padded_nll(model: nn.Module, tokenizer: Any, batch: Pairs) -> tuple[Tensor, Tensor]:
    """NLL of the target tokens and EOS [B, L-1], 0 elsewhere, and their number [B]."""
    eos = tokenizer.eos_token_id
    prompts = [tokenizer(prompt).input_ids for prompt, _ in batch]
    targets = [[*tokenizer(target).input_ids, eos] for _, target in batch]
    longest = max(len(p) + len(t) for p, t in zip(prompts, targets, strict=True))
    ids = torch.full((len(batch), longest), eos)
    labels = torch.full_like(ids, -100)
    mask = torch.zeros_like(ids)
    for i, (p, t) in enumerate(zip(prompts, targets, strict=True)):
        ids[i, : len(p) + len(t)] = torch.tensor(p + t)
        labels[i, len(p) : len(p) + len(t)] = torch.tensor(t)
        mask[i, : len(p) + len(t)] = 1
    logits = model(input_ids=ids, attention_mask=mask).logits.float()
    nll = cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
    return nll, torch.tensor([len(t) for t in targets])


def pairs_of(edits: Sequence[EditRequest]) -> list[tuple[str, str]]:
    return [(edit.prompt, edit.target) for edit in edits]


def run(
    model: nn.Module, tokenizer: Any, edits: Sequence[EditRequest], progress: Any = None, **config: Any
) -> MethodResult:
    settings = {"layer": 2, "module": "down_proj", "shuffle": False} | PLAIN | config
    options = {"progress": progress} if progress else {}
    return plan(Model.of(model, tokenizer), edits, LocFTBFConfig(**settings), **options).run()


def bits(value: Tensor) -> Tensor:
    return value.contiguous().view(torch.uint8)


def changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    """Names of weights that are not bitwise what they were; NaN equals itself."""
    now = model.state_dict()
    assert now.keys() == before.keys()
    return {name for name in before if not torch.equal(bits(now[name]), bits(before[name]))}


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("schedule", ["breadth-first", "depth-first"])
@pytest.mark.parametrize("epochs", [9, 10])
def test_long_training_ends_with_the_losses_of_the_final_weights(
    schedule: str, epochs: int, tokenizer: Any, make_edits: MakeEdits, seed: int
) -> None:
    """At this rate the last steps change what was learned before them; shorter training is not looked at again."""
    model, edits, told = tiny_model("llama", seed=seed), make_edits(13), []

    def progress(stage: str, done: int, total: int, loss: float | None = None) -> None:
        told.append((stage, done))

    result = run(model, tokenizer, edits, progress, epochs=epochs, schedule=schedule, lr=3e-2)
    with torch.no_grad():
        nll, counts = padded_nll(model, tokenizer, pairs_of(edits))
    final = (-nll.sum(1) / counts).exp()
    assert torch.allclose(result.probability, final, rtol=1e-9) == (epochs == 10)
    assert result.learned[-1] == int((result.probability >= LIKELY).sum())
    assert told[-1] == ("learned", result.learned[-1])


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("module", ["down_proj", "attn", "block"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_published_loop(family: str, module: str, tokenizer: Any, make_edits: MakeEdits, seed: int) -> None:
    model, edits, settings = tiny_model(family, seed=seed), make_edits(9), PLAIN | {"epochs": 2}
    path, _ = topology(model).resolve(2, module)
    wanted = published(model, tokenizer, pairs_of(edits), path, **settings)
    model.train()  # the published loop has no dropout, whatever mode the caller left
    wanted.check(run(model, tokenizer, edits, module=module, **settings))


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("family", [family for family in (*DENSE, *SHARED) if family != "xglm"])  # its masks overflow
def test_equals_the_published_loop_where_the_model_was_measured(
    family: str, tokenizer: Any, make_edits: MakeEdits, seed: int
) -> None:
    model, edits, settings = tiny_model(family, seed=seed), make_edits(5), PLAIN | {"epochs": 2}
    path, _ = topology(model).resolve(2, "down_proj")
    published(model, tokenizer, pairs_of(edits), path, **settings).check(run(model, tokenizer, edits, **settings))


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


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("most", [20, 5])
@pytest.mark.parametrize("loss_average", ["sample", "token"])
def test_steps_of_several_passes_equal_the_published_loop(
    loss_average: str, most: int, tokenizer: Any, make_edits: MakeEdits, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No pass has more tokens than it may, except where one sample has."""
    passes: list[list[int]] = []

    def spy(samples: Samples, select: torch.Tensor, **kwargs: Any) -> Any:
        passes.append(samples.lengths[select].tolist())
        return pack(samples, select, **kwargs)

    monkeypatch.setattr(trainer, "pass_tokens", lambda _: most)
    monkeypatch.setattr(trainer, "pack", spy)
    model, edits = tiny_model("llama", seed=seed), make_edits(13)
    settings = PLAIN | {"loss_average": loss_average, "epochs": 2}
    wanted = published(model, tokenizer, pairs_of(edits), DOWN_PROJ, **settings)
    wanted.check(run(model, tokenizer, edits, **settings))
    assert sum(map(len, passes)) == 13 * 2
    assert len(passes) > 4 * 2
    assert all(sum(lengths) <= most or len(lengths) == 1 for lengths in passes)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(
    ("layer", "module", "path"),
    [
        (2, "up_proj", "model.layers.2.mlp.up_proj"),
        (1, "mlp", "model.layers.1.mlp"),
        (2, "attn", "model.layers.2.self_attn"),
        (0, "block", "model.layers.0"),
        (3, "block", "model.layers.3"),
        (3, "down_proj", "model.layers.3.mlp.down_proj"),
        (2, "self_attn.o_proj", "model.layers.2.self_attn.o_proj"),
        (2, "model.layers.2.mlp.gate_proj", "model.layers.2.mlp.gate_proj"),
    ],
)
def test_every_module_equals_the_published_loop(
    layer: int, module: str, path: str, tokenizer: Any, make_edits: MakeEdits, seed: int
) -> None:
    model, edits, settings = tiny_model("llama", seed=seed), make_edits(9), PLAIN | {"epochs": 2}
    before = state(model)
    wanted = published(model, tokenizer, pairs_of(edits), path, **settings)
    result = run(model, tokenizer, edits, layer=layer, module=module, **settings)
    wanted.check(result)
    assert changed(model, before) == wanted.updates.keys()  # and not one bit of a frozen weight
    for name, update in result.updates.items():
        assert torch.equal(result.originals[name], before[name])
        assert torch.equal(model.get_parameter(name), before[name] + update)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("extra", [{"loss_average": "token"}, {"weight_decay": 0.1}, {"lr_schedule": "linear"}])
def test_options_equal_the_published_loop(
    extra: dict[str, Any], tokenizer: Any, make_edits: MakeEdits, seed: int
) -> None:
    model, edits = tiny_model("llama", seed=seed), make_edits(13)
    pairs, path = pairs_of(edits), DOWN_PROJ
    wanted = published(model, tokenizer, pairs, path, **PLAIN, **extra)
    usual = published(model, tokenizer, pairs, path, **PLAIN)
    assert (wanted.updates[f"{path}.weight"] - usual.updates[f"{path}.weight"]).abs().max() > 1e-4
    wanted.check(run(model, tokenizer, edits, **extra))


@pytest.mark.usefixtures("double")
def test_batches_below_skip_loss_change_nothing(tokenizer: Any, make_edits: MakeEdits, seed: int) -> None:
    """Neither the weights nor Adam's moments; the loss of a skipped batch still counts."""
    model, edits = tiny_model("llama", seed=seed), make_edits(13)

    def reference(skip_loss: float) -> Published:
        settings = PLAIN | {"skip_loss": skip_loss, "epochs": 6}
        return published(model, tokenizer, pairs_of(edits), DOWN_PROJ, **settings)

    losses = sorted(reference(0.0).batch_losses)
    for skip_loss in [(a + b) / 2 for a, b in pairwise(losses[8:])]:
        wanted = reference(skip_loss)
        if min(abs(loss - skip_loss) for loss in wanted.batch_losses) > 1e-3:  # no matter of rounding
            break
    skipped = sum(loss < skip_loss for loss in wanted.batch_losses)
    assert 0 < skipped < len(wanted.batch_losses)
    wanted.check(run(model, tokenizer, edits, skip_loss=skip_loss, epochs=6))


@pytest.mark.usefixtures("double")
def test_stops_after_the_epoch_below_stop_loss(tokenizer: Any, make_edits: MakeEdits, seed: int) -> None:
    """The mean is over edits: a last batch of one does not weigh as much as the full ones."""
    model, edits = tiny_model("llama", seed=seed), make_edits(13)
    settings = PLAIN | {"epochs": 8}
    full = published(model, tokenizer, pairs_of(edits), DOWN_PROJ, **settings)
    settings["stop_loss"] = (full.losses[3] + full.losses[4]) / 2
    wanted = published(model, tokenizer, pairs_of(edits), DOWN_PROJ, **settings)
    assert 1 < len(wanted.losses) < 8
    wanted.check(run(model, tokenizer, edits, **settings))


@pytest.mark.usefixtures("double")
def test_depth_first_is_one_batch_after_the_other(tokenizer: Any, make_edits: MakeEdits, seed: int) -> None:
    """A fresh optimizer for each batch, which is trained to stop_loss before the next is looked at."""
    model, edits = tiny_model("llama", seed=seed), make_edits(13)
    settings = PLAIN | {"lr": 1e-2, "epochs": 6}
    first = published(model, tokenizer, pairs_of(edits)[:4], DOWN_PROJ, **settings).losses
    settings["stop_loss"] = (first[2] + first[3]) / 2
    reference, steps, total = copy.deepcopy(model), [], Published({}, [0.0], [])
    for i in range(0, 13, 4):
        part = pairs_of(edits)[i : i + 4]
        one = published(reference, tokenizer, part, DOWN_PROJ, **settings)
        for name, update in one.updates.items():
            reference.get_parameter(name).data += update
            total.updates[name] = total.updates.get(name, 0) + update
        total.losses[0] += one.losses[-1] * len(part) / 13
        steps.append(len(one.losses))
    assert steps[0] == 4  # it stopped by its loss
    total.check(run(model, tokenizer, edits, schedule="depth-first", **settings))


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
    edits, pack = make_edits(13), trainer.pack
    seen: list[list[int]] = []

    def spy(samples: Any, select: Tensor, **kwargs: Any) -> Any:
        seen.append(select.tolist())
        return pack(samples, select, **kwargs)

    monkeypatch.setattr(trainer, "pack", spy)

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


@pytest.mark.parametrize("fails", [False, True])
def test_flags_modes_and_gradients_are_put_back(
    fails: bool, tokenizer: Any, make_edits: MakeEdits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a caller who is in the middle of training something else; their gradients have no say."""
    edits = make_edits(13)
    reference = run(tiny_model("gpt2"), tokenizer, edits)
    model = tiny_model("gpt2")
    rng = torch.Generator().manual_seed(0)
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 3 > 0)
        parameter.grad = torch.randn(parameter.shape, generator=rng) if i % 2 else None
    model.get_parameter("transformer.h.2.mlp.c_proj.weight").grad = torch.ones(128, 32)
    for i, part in enumerate(model.modules()):
        part.training = i % 4 > 0
    before = [(p.requires_grad, p.grad, copy.deepcopy(p.grad)) for p in model.parameters()]
    modes = [part.training for part in model.modules()]
    if fails:
        monkeypatch.setattr(ops, "target_cross_entropy", interrupted_after(5))
        with pytest.raises(KeyboardInterrupt):
            run(model, tokenizer, edits, augment=1)
    else:
        result = run(model, tokenizer, edits)
        for name, update in reference.updates.items():
            assert torch.equal(result.updates[name], update)
    for parameter, (flag, grad, value) in zip(model.parameters(), before, strict=True):
        assert parameter.requires_grad == flag
        assert parameter.grad is grad
        assert grad is None or torch.equal(grad, value)
    assert [part.training for part in model.modules()] == modes
    assert not any("forward" in vars(part) for part in model.modules())
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in model.modules())


def test_edits_where_gradients_are_switched_off(tokenizer: Any, make_edits: MakeEdits) -> None:
    edits = make_edits(5)
    wanted = run(tiny_model("llama"), tokenizer, edits)
    with torch.no_grad():
        result = run(tiny_model("llama"), tokenizer, edits)
        assert not torch.is_grad_enabled()
    assert result.losses == wanted.losses


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("schedule", ["breadth-first", "depth-first"])
def test_edits_that_are_broken_by_themselves_are_named_and_no_others(
    schedule: str, value: float, tokenizer: Any, make_edits: MakeEdits
) -> None:
    """Two of 13 hold a word whose embedding is not finite. All 13 share two rows in the prefix cache."""
    model, edits = tiny_model("llama"), make_edits(13)
    for i in (6, 11):
        edits[i] = replace(edits[i], prompt=f"Because {edits[i].prompt}")
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer.vocab["Because"], 5] = value
    before = state(model)
    said = "the loss is not finite for edit edit-0-6, edit edit-0-11, with the original"
    with pytest.raises(EditError, match=said) as error:
        run(model, tokenizer, edits, schedule=schedule, shuffle=True)
    assert error.value.edits == ("edit edit-0-6", "edit edit-0-11")
    assert not changed(model, before)


@pytest.mark.parametrize(
    ("schedule", "place"),
    [("breadth-first", "epoch 2, batch 2 of 4"), ("depth-first", "batch 2 of 4, step 2")],
)
def test_nan_loss_of_no_edit_names_time_and_batch(
    schedule: str, place: str, tokenizer: Any, make_edits: MakeEdits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sixth step breaks, and with it the eighth: of the edits of the sixth and no others."""
    model, edits = tiny_model("llama"), make_edits(13)
    before, real, calls = state(model), ops.target_cross_entropy, 0

    def broken(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        nonlocal calls
        calls += 1
        loss, grad = real(*args, **kwargs)
        return (loss * torch.nan if calls in (6, 8) else loss), grad

    monkeypatch.setattr(ops, "target_cross_entropy", broken)
    with pytest.raises(EditError, match=f"not finite, first in {place}: edit edit-0-4,") as caught:
        run(model, tokenizer, edits, schedule=schedule)
    message = str(caught.value)
    assert [i for i in range(13) if re.search(rf"edit-0-{i}\b", message)] == [4, 5, 6, 7]
    assert "below 0.003" in message
    assert not caught.value.edits
    assert not changed(model, before)


@pytest.mark.parametrize(
    ("schedule", "place"),
    [
        ("breadth-first", "epoch 1, batch 2 of 4: edit 4, edit 5"),
        ("depth-first", "batch 1 of 4, step 2: edit 0, edit 1"),
    ],
)
def test_diverging_rate_is_an_error_that_restores_the_model(
    schedule: str, place: str, tokenizer: Any, make_edits: MakeEdits
) -> None:
    """No edit is to blame, though with the weights of that moment none has a finite loss."""
    model = tiny_model("gpt2", dtype=torch.bfloat16)
    before = state(model)
    edits = [replace(edit, id=None) for edit in make_edits(13)]
    with pytest.raises(EditError, match=rf"first in {place}, .*diverged.* below 1e\+38"):  # by position, without ids
        run(model, tokenizer, edits, lr=1e38, module="mlp", schedule=schedule)
    assert not changed(model, before)


def test_weights_that_no_loss_has_seen_are_checked_too(
    tokenizer: Any, make_edits: MakeEdits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The very last of 16 steps breaks them: its loss was still good."""
    model, real, calls = tiny_model("llama"), ops.target_cross_entropy, 0
    before = state(model)

    def overflowing(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        nonlocal calls
        calls += 1
        loss, grad = real(*args, **kwargs)
        return loss, grad * torch.inf if calls == 16 else grad

    monkeypatch.setattr(ops, "target_cross_entropy", overflowing)
    with pytest.raises(EditError, match="not finite after the last step"):
        run(model, tokenizer, make_edits(13))
    assert calls == 16
    assert not changed(model, before)


def interrupted_after(n: int) -> Callable[..., Any]:
    """target_cross_entropy, with Ctrl-C in its n-th call."""
    calls, real = 0, ops.target_cross_entropy

    def function(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == n:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    return function


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ctrl_c_restores_the_model(
    dtype: torch.dtype, tokenizer: Any, make_edits: MakeEdits, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, edits = tiny_model("llama", dtype=dtype), make_edits(13)
    before = state(model)
    monkeypatch.setattr(ops, "target_cross_entropy", interrupted_after(11))
    with pytest.raises(KeyboardInterrupt):
        run(model, tokenizer, edits, lr=1e-2)
    assert not changed(model, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ctrl_c_keeps_the_last_whole_epoch(
    dtype: torch.dtype, tokenizer: Any, make_edits: MakeEdits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of four batches each: 11 steps are two epochs and a part of the third, which is dropped."""
    edits, model = make_edits(13), tiny_model("llama", dtype=dtype)
    wanted = run(model, tokenizer, edits, lr=1e-2, epochs=2)
    held = state(model)
    model = tiny_model("llama", dtype=dtype)
    with monkeypatch.context() as patch:
        patch.setattr(ops, "target_cross_entropy", interrupted_after(11))
        result = run(model, tokenizer, edits, lr=1e-2, keep_partial=True)
    assert result.losses == wanted.losses
    assert "interrupted; kept the weights of epoch 2" in result.notes
    for name, update in wanted.updates.items():
        assert torch.equal(result.updates[name], update)
    assert not changed(model, held)
    with monkeypatch.context() as patch:  # before the first epoch is done there is nothing to keep
        patch.setattr(ops, "target_cross_entropy", interrupted_after(3))
        model = tiny_model("llama", dtype=dtype)
        before = state(model)
        with pytest.raises(KeyboardInterrupt):
            run(model, tokenizer, edits, lr=1e-2, keep_partial=True)
    assert not changed(model, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ctrl_c_depth_first_keeps_the_last_batch_that_is_done(
    dtype: torch.dtype, tokenizer: Any, make_edits: MakeEdits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of four batches of four steps each: 11 steps are two batches and a part of the third, which is dropped."""
    edits, losses, config = make_edits(13), list[Any](), {"lr": 1e-2, "schedule": "depth-first", "keep_partial": True}
    model = tiny_model("llama", dtype=dtype)
    before, held = state(model), dict[str, Tensor]()

    def progress(stage: str, done: int, total: int, loss: float | None = None) -> None:
        if stage == "train" and done <= 8:
            losses.append(loss)
            held.update(state(model))

    run(model, tokenizer, edits, progress, **config)
    model = tiny_model("llama", dtype=dtype)
    with monkeypatch.context() as patch:
        patch.setattr(ops, "target_cross_entropy", interrupted_after(11))
        result = run(model, tokenizer, edits, **config)
    assert "interrupted; kept the weights after batch 2 of 4" in result.notes
    assert result.losses == pytest.approx([(losses[0] + losses[1]) / 2])
    name = f"{DOWN_PROJ}.weight"
    torch.testing.assert_close(model.state_dict()[name], held[name], rtol=torch.finfo(dtype).eps, atol=1e-7)
    assert changed(model, before) == {name}
    with monkeypatch.context() as patch:  # before the first batch is done there is nothing to keep
        patch.setattr(ops, "target_cross_entropy", interrupted_after(3))
        model = tiny_model("llama", dtype=dtype)
        with pytest.raises(KeyboardInterrupt):
            run(model, tokenizer, edits, **config)
    assert not changed(model, before)


def test_any_failure_restores_the_model(tokenizer: Any, make_edits: MakeEdits) -> None:
    """Such as one of the caller's own progress bar."""
    model = tiny_model("llama")
    before = state(model)

    def progress(stage: str, done: int, total: int, loss: float | None = None) -> None:
        if done == 2 and stage == "train":
            raise RuntimeError("the terminal is gone")

    with pytest.raises(RuntimeError, match="terminal"):
        run(model, tokenizer, make_edits(13), progress)
    assert not changed(model, before)


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


@pytest.mark.usefixtures("double")
def test_augment_trains_copies_behind_contexts_of_the_model(
    tokenizer: Any, make_edits: MakeEdits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each edit as it is and after two contexts that end a sentence; equal to the published loop on them."""
    edits = make_edits(6)
    seen: list[list[tuple[str, str]]] = []

    def spy(tokenizer: Any, pairs: Pairs, **kwargs: Any) -> Any:
        seen.append(list(pairs))
        return tokenize(tokenizer, pairs, **kwargs)

    monkeypatch.setattr("fastedit.models.model.tokenize", spy)
    random_state = torch.get_rng_state()
    wanted = tiny_model("llama")
    result = run(tiny_model("llama"), tokenizer, edits, augment=2, seed=3)
    assert torch.equal(torch.get_rng_state(), random_state)
    for edit in edits:
        copies = [p for p, t in seen[0] if p.endswith(edit.prompt) and t == edit.target]
        fronts = [prompt.removesuffix(edit.prompt) for prompt in copies]
        assert len(set(fronts)) == len(fronts) == 3
        assert fronts.count("") == 1
        assert all(front.endswith(". ") and len(front.split()) > 5 for front in fronts if front)
    assert len(seen[0]) == 18
    published(wanted, tokenizer, seen[0], DOWN_PROJ, **PLAIN).check(result)
    run(tiny_model("llama"), tokenizer, edits, augment=2, seed=3)
    run(tiny_model("llama"), tokenizer, edits, augment=2, seed=4)
    assert seen[0] == seen[1] != seen[2]


def test_contexts_are_many_and_different(tokenizer: Any) -> None:
    texts = contexts.sample_contexts(Model.of(tiny_model("llama"), tokenizer), 23, seed=1)
    assert len(texts) == 23
    assert len(set(texts)) > 15
    assert texts != contexts.sample_contexts(Model.of(tiny_model("llama"), tokenizer), 23, seed=2)


def test_contexts_are_written_without_dropout(tokenizer: Any) -> None:
    model = tiny_model("gpt2")
    texts = contexts.sample_contexts(Model.of(model, tokenizer), 10, seed=1)
    model.train()
    assert contexts.sample_contexts(Model.of(model, tokenizer), 10, seed=1) == texts
    assert all(part.training for part in model.modules())


def test_contexts_follow_neither_the_model_s_generation_config_nor_an_eos(tokenizer: Any) -> None:
    """What a chat checkpoint ships; and a tokenizer that ends every text."""
    model, ended = tiny_model("llama"), copy.deepcopy(tokenizer)
    texts = contexts.sample_contexts(Model.of(model, tokenizer), 10, seed=1)
    ended.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    assert ended("The").input_ids[-1] == ended.eos_token_id
    assert contexts.sample_contexts(Model.of(model, ended), 10, seed=1) == texts
    own = model.generation_config
    own.num_beams, own.repetition_penalty, own.suppress_tokens = 2, 5.0, list(range(20, 60))
    assert contexts.sample_contexts(Model.of(model, tokenizer), 10, seed=1) == texts
    assert model.generation_config is own


def test_batch_size_is_the_published_one_and_keeps_30_steps() -> None:
    assert batch_size_for(3000) == batch_size_for(100_000) == 100
    assert batch_size_for(200) == 6
    assert batch_size_for(3) == 1
    for n in range(30, 4000, 7):
        assert -(-n // batch_size_for(n)) >= 30


def published_model(kind: str, h: int, blocks: int, vocabulary: int) -> Any:
    """A model of these shapes without memory."""
    config = AutoConfig.for_model(
        kind,
        hidden_size=h,
        num_hidden_layers=blocks,
        vocab_size=vocabulary,
        intermediate_size=64,
        num_attention_heads=32 if h % 32 == 0 else 28,
        num_key_value_heads=4,
    )
    with torch.device("meta"):
        return topology(AutoModelForCausalLM.from_config(config))


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [
        (("llama", 4096, 32, 128256), (22, "down_proj", 5e-4)),  # Llama-3-8B
        (("qwen2", 3584, 28, 152064), (6, "down_proj", 5e-4)),  # Qwen2.5-7B
        (("mistral", 4096, 32, 32000), (23, "block", 5e-5)),  # Mistral-7B-v0.1
        (("qwen2", 8192, 80, 152064), (19, "down_proj", None)),  # Qwen2.5-72B
    ],
)
def test_published_models_get_their_preset(shape: Any, wanted: tuple[Any, ...]) -> None:
    preset, is_published = locft_bf_preset(published_model(*shape))
    assert is_published
    assert (preset.layer, preset.module, preset.lr) == wanted


@pytest.mark.parametrize(
    "shape",
    [
        ("llama", 4096, 32, 32000),  # Llama-2-7B: the shape of Mistral-7B, and Llama-3-8B but for its tokens
        ("mistral", 4096, 32, 128256),
        ("llama", 4096, 16, 128256),
    ],
)
def test_other_models_get_two_thirds_of_their_depth(shape: Any) -> None:
    preset, is_published = locft_bf_preset(published_model(*shape))
    assert not is_published
    assert (preset.layer, preset.module, preset.lr) == (22 * shape[2] // 32, "down_proj", None)


def test_a_preset_is_used_and_noted(tokenizer: Any, make_edits: MakeEdits, monkeypatch: pytest.MonkeyPatch) -> None:
    module = inspect.getmodule(locft_bf_preset)
    preset = module.LocFTBFPreset(1, "block", 2e-4)
    monkeypatch.setitem(module._LOCFT_BF, ("llama", 32, 4, 97), preset)
    result = plan(Model.of(tiny_model("llama"), tokenizer), make_edits(5), LocFTBFConfig(epochs=1)).run()
    assert (result.config["layer"], result.config["module"], result.config["lr"]) == (1, "block", 2e-4)
    assert sum("published preset" in note for note in result.notes) == 3


def test_what_is_chosen_is_said_and_fits_the_weights(tokenizer: Any, make_edits: MakeEdits) -> None:
    """The rate is 5e-4 for weights of 0.02: it grows with the scale of the weights that it moves."""
    rates = []
    for scale in (1, 10):
        model = tiny_model("llama")
        weight = model.get_parameter("model.layers.2.mlp.down_proj.weight")
        weight.data *= scale * 0.02 / weight.square().mean().sqrt()
        result = plan(Model.of(model, tokenizer), make_edits(61), LocFTBFConfig(epochs=1)).run()
        assert list(result.updates) == ["model.layers.2.mlp.down_proj.weight"]  # 22/32 of 4 blocks
        assert result.config["batch_size"] == 2
        rates.append(result.config["lr"])
        notes = "\n".join(result.notes)
        for said in ("layer 2", "module down_proj", f"lr {rates[-1]:.3g}", "batch_size 2"):
            assert said in notes
    assert rates == pytest.approx([5e-4, 5e-3], rel=1e-5)


def test_absent_layers_and_modules_are_errors_that_list_what_there_is(tokenizer: Any, make_edits: MakeEdits) -> None:
    model = tiny_model("gpt2")
    before = state(model)
    with pytest.raises(ModelError, match=r"layer 4 .*blocks 0 to 3"):
        run(model, tokenizer, make_edits(5), layer=4)
    with pytest.raises(ModelError, match=r"no gate_proj.*down_proj"):
        run(model, tokenizer, make_edits(5), module="gate_proj")
    with pytest.raises(ModelError, match=r"'mlp\.w1'.*mlp\.c_proj"):
        run(model, tokenizer, make_edits(5), module="mlp.w1")
    with pytest.raises(ModelError, match="no weights"):
        run(model, tokenizer, make_edits(5), module="mlp.act")
    assert not changed(model, before)


def test_weights_from_which_no_rate_follows_are_named(tokenizer: Any, make_edits: MakeEdits) -> None:
    """Where a rate is given, the weights may be zeros."""
    cases = ((torch.nan, f"{DOWN_PROJ}.weight is not finite"), (0.0, f"{DOWN_PROJ} are all zero, .*give lr"))
    for value, said in cases:
        model = tiny_model("llama")
        weight = model.get_parameter(f"{DOWN_PROJ}.weight").data
        weight[1 if value else slice(None)] = value
        before = state(model)
        with pytest.raises(ModelError, match=said):
            run(model, tokenizer, make_edits(3), epochs=1, lr=None)
        assert value or not changed(model, before)
    run(model, tokenizer, make_edits(3), epochs=1, lr=1e-3)


@pytest.mark.parametrize("augment", [0, 2])
def test_a_prompt_longer_than_the_context_names_its_edit(augment: int, tokenizer: Any, make_edits: MakeEdits) -> None:
    """63 words and two of the target fill the context of 64 tokens but for one; a context does not fit."""
    edits = make_edits(5)
    longest = EditRequest(" ".join(["w9"] * 63), "w10", id="just fits")
    run(tiny_model("llama"), tokenizer, [*edits, longest], epochs=1)
    if not augment:
        longest = replace(longest, prompt=longest.prompt + " w9", id="too long")
    remedy = "prompt, or take shorter contexts" if augment else "prompt that begins 'w9"
    with pytest.raises(RequestError, match=f"edit {longest.id}.*context of 64; shorten the {remedy}"):
        run(tiny_model("llama"), tokenizer, [*edits, longest], augment=augment)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("batch_size", 0),
        ("batch_size", "all"),
        ("epochs", 0),
        ("lr", 0.0),
        ("lr", float("nan")),
        ("augment", -1),
        ("stop_loss", float("nan")),
        ("skip_loss", -0.1),
        ("weight_decay", -0.1),
        ("loss_average", "batch"),
        ("schedule", "width-first"),
        ("lr", "x"),
        ("lr", True),
        ("epochs", "3"),
        ("epochs", 1.5),
        ("augment", None),
        ("weight_decay", None),
        ("layer", "3"),
        ("layer", 3.0),
        ("module", 5),
        ("shuffle", "yes"),
        ("cache_bytes", "1G"),
        ("cache_bytes", -5),
        ("seed", None),
        ("seed", 1.5),
        ("seed", -1),
        ("seed", 2**64),
        ("preserve", "all"),
        ("null_space", 0.0),
        ("null_space", 1.0),
        ("null_space", float("nan")),
        ("anchors", 0),
        ("anchor_weight", 0.0),
        ("anchor_weight", float("inf")),
        ("weight_decay", float("inf")),
    ],
)
def test_values_that_a_field_cannot_take(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{field} is {value!r}; (give|choose)"):
        LocFTBFConfig(**{field: value})


def test_values_that_only_look_different_are_taken() -> None:
    """Whole numbers where a number is wanted, and numbers of numpy, which no file of an edit could hold as they are."""
    config = LocFTBFConfig(lr=1, epochs=np.int64(3), layer=np.int32(2), stop_loss=np.float32(0.5), seed=2**63 - 1)  # type: ignore[arg-type]
    assert json.loads(json.dumps(asdict(config))) == asdict(replace(config, lr=1.0, epochs=3, layer=2, stop_loss=0.5))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_learns(family: str, tokenizer: Any, make_edits: MakeEdits, seed: int) -> None:
    losses = run(tiny_model(family, seed=seed), tokenizer, make_edits(6), module="block", epochs=6).losses
    assert losses[-1] < 0.9 * losses[0]
