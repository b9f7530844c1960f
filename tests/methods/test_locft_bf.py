"""LocFT-BF against the published loop."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from families import DENSE, SHARED
from helpers import FAMILIES, MakeEdits, in_fp64, state, tiny_model
from locft_loop import DOWN_PROJ, PLAIN, Pairs, Published, changed, padded_nll, pairs_of, published, run

from fastedit.methods.base import LIKELY
from fastedit.methods.locft_bf import passes, trainer
from fastedit.models import Samples, pack, tokenize, topology


@pytest.fixture
def double() -> Iterator[None]:
    with in_fp64():
        yield


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


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("most", [20, 5])
@pytest.mark.parametrize("loss_average", ["sample", "token"])
def test_steps_of_several_passes_equal_the_published_loop(
    loss_average: str, most: int, tokenizer: Any, make_edits: MakeEdits, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No pass has more tokens than it may, except where one sample has."""
    ran: list[list[int]] = []

    def spy(samples: Samples, select: torch.Tensor, **kwargs: Any) -> Any:
        ran.append(samples.lengths[select].tolist())
        return pack(samples, select, **kwargs)

    monkeypatch.setattr(trainer, "pass_tokens", lambda _: most)
    monkeypatch.setattr(passes, "pack", spy)
    model, edits = tiny_model("llama", seed=seed), make_edits(13)
    settings = PLAIN | {"loss_average": loss_average, "epochs": 2}
    wanted = published(model, tokenizer, pairs_of(edits), DOWN_PROJ, **settings)
    wanted.check(run(model, tokenizer, edits, **settings))
    assert sum(map(len, ran)) == 13 * 2
    assert len(ran) > 4 * 2
    assert all(sum(lengths) <= most or len(lengths) == 1 for lengths in ran)


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
