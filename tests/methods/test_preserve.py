"""Editing that preserves the rest: the null space of other inputs, and anchors, against a plain loop."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import moments, random_edits, tiny_model, values
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, kl_div
from transformers.pytorch_utils import Conv1D

from fastedit import ConfigError, EditRequest, ModelError, StreamingCovariance
from fastedit.methods import LocFTBFConfig
from fastedit.methods.base import MethodResult
from fastedit.methods.locft_bf import adam, anchors, null_space, trainer
from fastedit.methods.locft_bf.anchors import Reference, anchor_prompts
from fastedit.methods.locft_bf.method import plan
from fastedit.methods.locft_bf.null_space import NullSpace
from fastedit.methods.subjects import subject_spans
from fastedit.models import Model, topology
from fastedit.statistics.store import statistics_path

LAYER, SHARE, WEIGHT = 2, 0.4, 0.7
SETTINGS: dict[str, Any] = {"layer": LAYER, "module": "down_proj", "lr": 3e-3, "batch_size": 4, "epochs": 4}
SETTINGS |= {"skip_loss": 0.0, "stop_loss": 0.0, "shuffle": False, "null_space": SHARE, "anchor_weight": WEIGHT}


def run(model: nn.Module, tokenizer: Any, edits: list[EditRequest], **config: Any) -> MethodResult:
    return plan(Model.of(model, tokenizer), edits, LocFTBFConfig(**SETTINGS | config)).run()


def shrunk(C: Tensor) -> Tensor:
    """(I + C / τ)⁻¹ with the τ that takes SHARE of the trace away."""
    low, high = 1e-12, 1e12
    for _ in range(200):
        tau = (low * high) ** 0.5
        P = torch.linalg.inv(torch.eye(len(C), dtype=C.dtype) + C / tau)
        low, high = (low, tau) if P.trace() > (1 - SHARE) * len(C) else (tau, high)
    return P


def last_inputs(model: nn.Module, module: nn.Module, tokenizer: Any, texts: list[str]) -> Tensor:
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)[-1]))
    for text in texts:
        model(input_ids=torch.tensor([tokenizer(text).input_ids]))
    handle.remove()
    return torch.stack(seen).detach()


def plain(
    model: nn.Module, tokenizer: Any, edits: list[EditRequest], P: Tensor, texts: list[str]
) -> tuple[Tensor, list[float]]:
    """The change D P of the weight, and each epoch's loss: the whole model, text i beside edit i."""
    found = topology(model)
    path, module = found.resolve(LAYER, "down_proj")
    conv, name = isinstance(module, Conv1D), f"{path}.weight"
    W: Any = module.weight.detach()
    D = torch.zeros_like(W.T if conv else W).requires_grad_()
    optimizer = torch.optim.Adam([D], lr=SETTINGS["lr"])

    def logits(ids: list[int], change: Tensor) -> Tensor:
        weight = {name: W + (change.T if conv else change)}
        output: Tensor = functional_call(model, weight, kwargs={"input_ids": torch.tensor([ids])}).logits[0]
        return output

    with torch.no_grad():
        unedited = [logits(tokenizer(text).input_ids, D)[-1].log_softmax(-1) for text in texts]
    losses = []
    for _ in range(SETTINGS["epochs"]):
        total = 0.0
        for first in range(0, len(edits), SETTINGS["batch_size"]):
            batch = range(first, min(first + SETTINGS["batch_size"], len(edits)))
            loss = torch.zeros(())
            for i in batch:
                prompt = tokenizer(edits[i].prompt).input_ids
                target = [*tokenizer(edits[i].target).input_ids, tokenizer.eos_token_id]
                said = logits([*prompt, *target][:-1], D @ P)[len(prompt) - 1 :]
                loss = loss + cross_entropy(said, torch.tensor(target)) / len(batch)
            total += loss.item() * len(batch)
            for i in batch if texts else ():
                said = logits(tokenizer(texts[i]).input_ids, D @ P)[-1].log_softmax(-1)
                loss = loss + WEIGHT * kl_div(said, unedited[i], reduction="sum", log_target=True) / len(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(total / len(edits))
    change = (D @ P).detach()
    return change.T if conv else change, losses


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """No direction is too weak to count."""
    monkeypatch.setattr(null_space, "_SMALLEST", 0.0)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize(
    ("family", "preserve", "names"),
    [(f, p, ()) for f in ("llama", "gpt2") for p in ("null-space", "anchors", "both") if (f, p) != ("gpt2", "anchors")]
    + [("llama", "null-space", ("w20", "w30 w31")), ("gpt2", "both", ("w20", "w30 w31"))],
)
def test_equals_a_plain_loop(
    family: str, preserve: str, names: tuple[str, ...], tokenizer: Any, tmp_path: Path, seed: int
) -> None:
    model, edits = tiny_model(family, seed=seed), random_edits(9, seed)
    moments(model, tmp_path, seed)
    parts = topology(model)
    texts = [text for _, text, _ in anchors_of(edits, 1, seed=0)] if preserve != "null-space" else []
    P = torch.eye(parts.input_width(LAYER, "down_proj"))
    if preserve != "anchors":
        C = StreamingCovariance.load(statistics_path(parts, tmp_path, LAYER)).finalize()
        if texts:
            keys = last_inputs(model, parts.resolve(LAYER, "down_proj")[1], tokenizer, texts).double()
            C = C + keys.T @ keys / len(keys)
        if others := [name for name in names if name not in {edit.subject for edit in edits}]:
            keys = last_inputs(model, parts.resolve(LAYER, "down_proj")[1], tokenizer, others).double()
            C = C + 3 * keys.T @ keys / len(keys)
        P = shrunk(C).float()
    wanted, losses = plain(model, tokenizer, edits, P, texts)
    before = values(model)
    given: dict[str, Any] = {"names": names, "name_weight": 3.0} if names else {}
    result = run(model, tokenizer, edits, preserve=preserve, anchors=1, statistics=str(tmp_path), **given)
    ((path, update),) = result.updates.items()  # gpt2's bias stays
    assert isinstance(update, Tensor)
    assert (update - wanted).norm() <= 2e-3 * wanted.norm()  # Adam takes rounding of small gradients for signs
    assert result.losses == pytest.approx(losses, rel=1e-4)
    assert {name for name, value in values(model).items() if not torch.equal(value, before[name])} == {path}


@pytest.mark.parametrize(("family", "preserve"), [("llama", "both"), ("gpt2", "null-space")])
def test_the_kernel_makes_the_same_edit(
    family: str, preserve: str, tokenizer: Any, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes the inputs without what is withheld of them, and knows nothing else of the null space."""
    pytest.importorskip("triton")
    edits, found = random_edits(9, seed), []
    for backend in ("torch", "triton"):
        monkeypatch.setattr(adam, "choose", lambda *_, backend=backend, **__: backend)
        model = tiny_model(family, seed=seed)
        moments(model, tmp_path, seed)
        result = run(model, tokenizer, edits, preserve=preserve, statistics=str(tmp_path), lr=1e-3, epochs=3)
        found.append(next(iter(result.updates.values())))
    assert (found[1] - found[0]).norm() <= 1e-3 * found[0].norm()


def test_directions_of_other_inputs_are_left_alone(tokenizer: Any, tmp_path: Path, seed: int) -> None:
    """Of inputs that take only some directions the outputs stay."""
    model, edits = tiny_model("llama", seed=seed), random_edits(9, seed)
    parts = topology(model)
    width = parts.input_width(LAYER, "down_proj")
    some = torch.randn(10, width, generator=torch.Generator().manual_seed(seed))
    found = StreamingCovariance(width)
    found.update(some.repeat(20, 1))
    found.save(statistics_path(parts, tmp_path, LAYER))
    config = {"preserve": "null-space", "null_space": 10 / width * 0.99, "statistics": str(tmp_path)}
    changes = {}
    for name, given in (("published", {}), ("preserved", config)):
        result = run(tiny_model("llama", seed=seed), tokenizer, edits, **given)
        (update,) = result.updates.values()
        assert isinstance(update, Tensor)
        changes[name] = (some @ update.T).norm() / some.norm()
        assert update.norm() > 0
    assert changes["preserved"] < 0.05 * changes["published"]


def test_the_share_of_directions_is_what_is_withheld(rng: torch.Generator) -> None:
    """Even if one direction has most of the energy, and whatever the scale."""
    rows = torch.randn(500, 40, generator=rng).double() * torch.logspace(0, -3, 40, dtype=torch.float64)
    rows[:, 0] *= 100
    for scale in (1e-6, 1.0, 1e6):
        C = rows.T @ rows * scale
        found = NullSpace.of(*torch.linalg.eigh(C), 0.25)
        assert found.shares.sum() == pytest.approx(10, abs=40 * null_space._SMALLEST)
        whole = torch.eye(40) - found.basis * found.shares @ found.basis.T
        torch.testing.assert_close(found.of_rows(torch.eye(40)), whole)
        assert (found.basis.T @ found.basis - torch.eye(found.basis.shape[1])).norm() < 1e-4


@pytest.mark.parametrize("kept", [3, 97, 1000])
def test_divergence_and_its_gradient(kept: int, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact where all tokens are kept, else that of the kept ones and the sum of the others."""
    monkeypatch.setattr(anchors, "_LIKELIEST", kept)
    before, now = (3 * torch.randn(8, 97, generator=rng) for _ in range(2))
    places = torch.tensor([5, 0, 5, 7])
    reference = Reference.of(before)
    z = now[places].clone().requires_grad_()

    def grouped(logits: Tensor) -> Tensor:
        p = logits.softmax(-1)
        some = p.gather(1, reference.tokens[places])
        rest = (1 - some.sum(1, keepdim=True)).clamp(min=1e-8)
        return torch.cat([some, rest], 1) if kept < 97 else some

    wanted = (grouped(before[places]) * (grouped(before[places]).log() - grouped(z).log())).sum(-1)
    wanted.sum().backward()
    loss, gradient = reference.divergence(places, now[places].clone())
    torch.testing.assert_close(loss, wanted.detach(), rtol=1e-4, atol=1e-5)
    assert z.grad is not None
    torch.testing.assert_close(gradient, z.grad, rtol=1e-3, atol=1e-5)
    same, zero = reference.divergence(places, before[places].clone())
    assert same.abs().max() < 1e-5
    assert zero.abs().max() < 1e-5


@pytest.mark.parametrize("near", [-1.0, 100.0])
def test_a_batch_is_skipped_only_if_its_anchors_are_near(
    near: float, tokenizer: Any, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "_NEAR", near)
    model = tiny_model("llama", seed=seed)
    result = run(model, tokenizer, random_edits(9, seed), preserve="anchors", skip_loss=1e3)
    (update,) = result.updates.values()
    assert isinstance(update, Tensor)
    assert bool(update.any()) == (near < 0)


def anchors_of(edits: Sequence[EditRequest], *args: Any, **options: Any) -> list[tuple[int, str, int]]:
    return anchor_prompts(edits, [subject_spans(edit) for edit in edits], *args, **options)


def test_anchors_are_other_subjects_in_the_same_words() -> None:
    edits = [EditRequest(f"The capital of {s} is", "Rome", s) for s in ("Peru", "Chad", "Cuba")]
    edits += [EditRequest("Ann works for", "Opel", "Ann"), EditRequest("Nobody knows", "it")]
    found = anchors_of(edits, 8, seed=3)
    assert {text for place, text, _ in found if place == 0} == {"The capital of Ann is"}  # the others are asked about
    assert {text for place, text, _ in found if place == 3} == {f"{s} works for" for s in ("Peru", "Chad", "Cuba")}
    assert not [text for place, text, _ in found if place == 4]  # without a subject
    given = anchors_of(edits, 2, seed=3, subjects=["Oslo", "Bern", "Peru", "Bonn"])
    assert len([text for place, text, _ in given if place == 0]) == 2
    assert "The capital of Peru is" not in [text for _, text, _ in given]
    assert found == anchors_of(edits, 8, seed=3) != anchors_of(edits, 8, seed=4)


def test_edits_without_anchors_are_named(tokenizer: Any, tmp_path: Path, seed: int) -> None:
    model, edits = tiny_model("llama", seed=seed), random_edits(4, seed)
    bare = [*edits, EditRequest("w20 w21", "w22", id="bare")]
    notes = plan(Model.of(model, tokenizer), bare, LocFTBFConfig(**SETTINGS, preserve="anchors")).notes
    assert [note for note in notes if "without anchors" in note and "edit bare" in note]


@pytest.mark.parametrize(
    ("config", "error", "words"),
    [
        ({"preserve": "null-space"}, ModelError, "fastedit covariance"),
        ({"preserve": "both", "module": "mlp"}, ConfigError, "down_proj"),
        ({"preserve": "anchors"}, ConfigError, "anchor_subjects"),
    ],
)
def test_what_cannot_be_preserved_is_refused_by_the_plan(
    config: dict[str, Any], error: type[Exception], words: str, tokenizer: Any, tmp_path: Path, seed: int
) -> None:
    model, edits = tiny_model("llama", seed=seed), [EditRequest("w20 w21", "w22", id="bare")]
    with pytest.raises(error, match=words):
        plan(Model.of(model, tokenizer), edits, LocFTBFConfig(**SETTINGS | {"statistics": str(tmp_path)} | config))
