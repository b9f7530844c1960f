"""target_cross_entropy against autograd of the plain formula in fp64, with poisoned memory."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cross_entropy import cast, plain, problem
from torch import Tensor

from fastedit import TensorError, ops

pytestmark = pytest.mark.usefixtures("poisoned")

implementation = importlib.import_module("fastedit.ops.target_cross_entropy")
SHAPES = [(1, 8, 5), (7, 52, 123), (37, 33, 252), (6, 16, 507)]  # R, h, V


def assert_as_exact_as_torch(
    inputs: dict[str, Tensor | None], softcap: float | None = None, *, rows: bool = False
) -> None:
    """Losses and gradients err at most twice as much as the plain formula in the same dtype, and a hair.

    By chance the plain formula is exact here and there, so errors are compared by their root mean square over
    rows and over all elements. `rows` measures each row's gradient by its own size.
    """
    exact = plain(**cast(inputs, torch.float64), softcap=softcap)
    theirs = plain(**inputs, softcap=softcap)
    ours = ops.target_cross_entropy(**inputs, softcap=softcap)
    assert ours[0].dtype == torch.float32
    assert ours[1].dtype == inputs["hidden"].dtype
    unit = exact[1].norm(dim=1, keepdim=True) if rows else exact[1].abs().max()
    our_error, their_error = ((grad - exact[1]) / unit for grad in (ours[1], theirs[1]))
    assert our_error.square().mean().sqrt() <= 2 * their_error.square().mean().sqrt() + 1e-6
    assert our_error.abs().max() <= 3 * their_error.abs().max() + 3e-6
    exact_losses = losses(plain, cast(inputs, torch.float64), softcap)
    our_error = losses(ops.target_cross_entropy, inputs, softcap) - exact_losses
    their_error = losses(plain, inputs, softcap) - exact_losses
    hair = 1e-6 * exact_losses.square().mean().sqrt()
    assert our_error.square().mean().sqrt() <= 2 * their_error.square().mean().sqrt() + hair


def losses(function: Callable[..., Any], inputs: dict[str, Tensor | None], softcap: float | None) -> Tensor:
    """The loss of each row by itself [R], fp64."""
    per_row = ("hidden", "labels", "sample_weight")
    rows = range(len(inputs["labels"]))
    each = [{k: v[r : r + 1] if k in per_row else v for k, v in inputs.items()} for r in rows]
    return torch.stack([function(**row, softcap=softcap)[0].double() for row in each])


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_autograd(shape: tuple[int, int, int], bias: bool, softcap: float | None, seed: int) -> None:
    inputs = problem(seed, *shape, bias=bias)
    wanted = plain(**cast(inputs, torch.float64), softcap=softcap)
    loss, grad = ops.target_cross_entropy(**inputs, softcap=softcap)
    assert abs(loss - wanted[0]) <= 2e-6 * (abs(wanted[0]) + inputs["sample_weight"].abs().sum())  # of logits of one
    certain = inputs["sample_weight"].abs().max() * inputs["head_weight"].abs().max()  # where p − 1 has lost its digits
    assert (grad - wanted[1]).abs().max() <= 2e-6 * wanted[1].abs().max() + 5e-7 * certain


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounds_no_worse_than_torch(dtype: torch.dtype, softcap: float | None, seed: int) -> None:
    assert_as_exact_as_torch(cast(problem(seed, 37, 52, 123), dtype), softcap)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_confident_rows_keep_their_gradient(dtype: torch.dtype, seed: int) -> None:
    """Near convergence p of the label is close to 1, and its gradient the small rest."""
    inputs = problem(seed, 37, 52, 123, bias=False)
    inputs["hidden"] = inputs["hidden"] * 0.5 + 2.5 * inputs["head_weight"][inputs["labels"]]
    inputs = cast(inputs, dtype)
    loss, _ = ops.target_cross_entropy(**inputs | {"sample_weight": torch.full((37,), 1 / 37)})
    assert loss < 0.5  # the rows are confident
    assert_as_exact_as_torch(inputs, rows=True)


@pytest.mark.parametrize("size", [1, 3, 123 * 5, 123 * 36, 123 * 37, 123 * 38])
def test_chunks_change_nothing(size: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below one row, ragged, exact and above the whole; a chunk that is skipped would leave NaN."""
    inputs = problem(seed, 37, 52, 123)
    wanted = plain(**cast(inputs, torch.float64), softcap=2.0)
    monkeypatch.setattr(implementation, "_CHUNK_LOGITS", size)
    loss, grad = ops.target_cross_entropy(**inputs, softcap=2.0)
    assert abs(loss - wanted[0]) <= 2e-6 * abs(wanted[0])
    assert (grad - wanted[1]).abs().max() <= 2e-6 * wanted[1].abs().max()


@pytest.mark.parametrize(("logits", "rows"), [(123 * 300, 256), (123 * 129 - 1, 128), (123 * 100, 100), (1, 1)])
def test_a_chunk_is_whole_tiles(logits: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A multiple of 128 rows, where it has as many: what is over takes a GPU as long as a whole tile."""
    monkeypatch.setattr(implementation, "_CHUNK_LOGITS", logits)
    assert len(ops.logits_buffer(torch.empty(123, 5), 1000)) == rows


@pytest.mark.parametrize("n", [1, 5, 37, 50])
def test_a_loops_own_buffer_changes_nothing(n: int, seed: int) -> None:
    inputs = problem(seed, 37, 52, 123)
    wanted = plain(**cast(inputs, torch.float64), softcap=2.0)
    scratch = ops.logits_buffer(inputs["head_weight"], n).fill_(torch.nan)
    for _ in range(2):  # the second finds what the first has left
        loss, grad = ops.target_cross_entropy(**inputs, softcap=2.0, scratch=scratch)
        assert abs(loss - wanted[0]) <= 2e-6 * abs(wanted[0])
        assert (grad - wanted[1]).abs().max() <= 2e-6 * wanted[1].abs().max()
    assert not scratch.isnan().any() or n > 37  # it was used


def test_no_rows() -> None:
    inputs = problem(0, 0, 8, 5)
    loss, grad = ops.target_cross_entropy(**inputs)
    assert loss == 0
    assert grad.shape == (0, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_logits_do_not_overflow(dtype: torch.dtype, seed: int) -> None:
    inputs = problem(seed, 7, 52, 123)
    inputs["hidden"] = inputs["hidden"] * 1e4  # logits of ±1e4: exp() of one is infinite
    assert_as_exact_as_torch(cast(inputs, dtype))
    loss, grad = ops.target_cross_entropy(**cast(inputs, dtype))
    assert 1e3 < loss < 1e6
    assert grad.isfinite().all()


def test_rows_of_weight_zero_count_nothing(seed: int) -> None:
    inputs = problem(seed, 7, 52, 123)
    inputs["sample_weight"][::2] = 0
    _, grad = ops.target_cross_entropy(**inputs)
    assert not grad[::2].any()
    assert grad[1::2].any(1).all()


def test_inputs_stay_as_they_are(seed: int) -> None:
    inputs = problem(seed, 7, 52, 123)
    copies = {name: value.clone() for name, value in inputs.items()}
    ops.target_cross_entropy(**inputs, softcap=3.0)
    for name, value in copies.items():
        assert torch.equal(inputs[name], value), name


def test_nan_is_not_hidden() -> None:
    inputs = problem(0, 7, 52, 123)
    inputs["hidden"][3, 4] = torch.nan
    assert ops.target_cross_entropy(**inputs)[0].isnan()


def test_per_row_gives_the_terms_of_the_sum(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = problem(seed, 37, 52, 123)
    monkeypatch.setattr(implementation, "_CHUNK_LOGITS", 123 * 5)
    each, grad = ops.target_cross_entropy(**inputs, softcap=3.0, per_row=True)
    torch.testing.assert_close(each.double(), losses(plain, inputs, 3.0), rtol=1e-5, atol=1e-7)
    loss, same = ops.target_cross_entropy(**inputs, softcap=3.0)
    assert torch.equal(each.sum(), loss)
    assert torch.equal(grad, same)


@pytest.mark.parametrize("rows", [None, 5, 9, 42, 60])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_rows_with_a_loss_of_their_own(
    rows: int | None, softcap: float | None, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one chunk, in several, in a chunk of their own."""
    inputs = problem(seed, 42, 52, 123)
    labelled = {k: v[:37] if k in ("hidden", "labels", "sample_weight") else v for k, v in inputs.items()}
    others = {k: v[37:] if k in ("hidden", "labels", "sample_weight") else v for k, v in inputs.items()}

    def brier(z: Tensor) -> tuple[Tensor, Tensor]:
        """(1 − p(label))² of each row, and its slope."""
        assert z.shape == (5, 123)
        with torch.enable_grad():
            z = z.clone().requires_grad_()
            loss = (1 - z.softmax(1)[torch.arange(5), others["labels"]]).square()
            return loss.detach(), torch.autograd.grad(loss.sum(), z)[0]

    exact = cast(others, torch.float64)
    hidden = exact["hidden"].clone().requires_grad_()
    z = hidden @ exact["head_weight"].T + exact["bias"]
    wanted_loss, slope = brier(z if softcap is None else softcap * torch.tanh(z / softcap))
    wanted_loss *= exact["sample_weight"]
    capped = z if softcap is None else softcap * torch.tanh(z / softcap)
    (wanted,) = torch.autograd.grad(capped, hidden, slope * exact["sample_weight"][:, None])
    losses_wanted = torch.cat([losses(plain, cast(labelled, torch.float64), softcap), wanted_loss])
    grad_wanted = torch.cat([plain(**cast(labelled, torch.float64), softcap=softcap)[1], wanted])

    monkeypatch.setattr(implementation, "_CHUNK_LOGITS", 123 * 11)
    scratch = None if rows is None else ops.logits_buffer(inputs["head_weight"], rows, 5)
    inputs["labels"] = labelled["labels"]
    each, grad = ops.target_cross_entropy(**inputs, softcap=softcap, others=brier, per_row=True, scratch=scratch)
    assert (each - losses_wanted).abs().max() <= 2e-6 * losses_wanted.abs().max()
    assert (grad - grad_wanted).abs().max() <= 2e-6 * grad_wanted.abs().max()


def test_rows_without_labels_need_a_loss() -> None:
    inputs = problem(0, 7, 8, 5)
    inputs["labels"] = inputs["labels"][:4]
    with pytest.raises(TensorError, match=r"labels is \[4\] for hidden \[7, 8\]: rows without labels need others"):
        ops.target_cross_entropy(**inputs)
    small = torch.empty(2, 5)
    with pytest.raises(TensorError, match=r"scratch is \[2, 5\], fewer than the 3 rows of others"):
        ops.target_cross_entropy(**inputs, others=lambda z: (z[:, 0], z), scratch=small)


UNFIT: dict[str, tuple[dict[str, Any], str]] = {
    "a transposed head": ({"head_weight": torch.zeros(4, 9)}, "hidden and head_weight are [5, 4] and [4, 9]"),
    "samples not packed": ({"hidden": torch.zeros(1, 5, 4)}, "are [1, 5, 4] and [9, 4], expected [R, h] and [V, h]"),
    "two dtypes": ({"hidden": torch.zeros(5, 4).bfloat16()}, "are torch.bfloat16 and torch.float32, expected one"),
    "whole numbers": ({"hidden": torch.zeros(5, 4).long(), "head_weight": torch.zeros(9, 4).long()}, "floating-point"),
    "int32 labels": ({"labels": torch.zeros(5).int()}, "labels is [5] torch.int32, expected [R] torch.int64"),
    "labels in rows": ({"labels": torch.zeros(5, 1).long()}, "labels is [5, 1] torch.int64"),
    "no label": ({"labels": torch.tensor([3, -100, 8, -100, 0])}, "labels[1] is -100, expected 0 to 8, a row of "
                 "head_weight (2 of 5 are none); leave rows"),
    "a label beyond the head": ({"labels": torch.tensor([3, 1, 8, 9, 0])}, "labels[3] is 9, expected 0 to 8"),
    "one weight": ({"sample_weight": torch.ones(1)}, "sample_weight is [1], expected [5]"),
    "a bias of the states": ({"bias": torch.ones(4)}, "bias is [4], expected [9]"),
    "two devices": ({"labels": torch.zeros(5, device="meta").long()}, "labels is on meta, hidden on cpu; bring them"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNFIT)
def test_tensors_that_do_not_fit_are_named(name: str) -> None:
    given, said = UNFIT[name]
    fits = {"hidden": torch.zeros(5, 4), "head_weight": torch.zeros(9, 4), "labels": torch.zeros(5).long()}
    ops.target_cross_entropy(**fits, sample_weight=torch.ones(5))
    with pytest.raises(TensorError, match=re.escape(said)):
        ops.target_cross_entropy(**fits | {"sample_weight": torch.ones(5)} | given)
