"""LocFT-BF that fails or is interrupted: what it says, and that the model is as it was."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import MakeEdits, state, tiny_model
from locft_loop import DOWN_PROJ, changed, interrupted_after, run
from torch import Tensor

from fastedit import EditError, ops


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
