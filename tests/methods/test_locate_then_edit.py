"""ROME, MEMIT, EMMET and AlphaEdit against the published procedure: one edit at a time, all of the model, d×d."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from families import DENSE, SHARED
from helpers import FAMILIES, at_subject, moments, random_edits, same, values, wanted_keys
from published import FORMULAS, METHODS, TOLERANCE, Case, Settings, assert_close, assert_written, target_of, weight_at
from torch import Tensor

from fastedit import EditError, EditRequest
from fastedit.delta import WeightDelta
from fastedit.methods.locate_then_edit.objectives import LeastSquares
from fastedit.models import topology
from fastedit.weights import LowRank

MEASURED = [family for family in (*DENSE, *SHARED) if family != "xglm"]  # its masks overflow in fp64


@pytest.mark.usefixtures("given")
@pytest.mark.parametrize(
    ("family", "method"), [*product(FAMILIES, METHODS), *((family, "memit") for family in MEASURED)]
)
def test_weights_are_those_of_the_published_procedure(
    family: str, method: str, tokenizer: Any, tmp_path: Path, seed: int
) -> None:
    case, edits, about = Case(tokenizer, tmp_path, seed, family), random_edits(3, seed), METHODS[method]
    model, before = case.model, case.before
    result = case.editor(method, about).edit(edits)
    assert_written(model, case.published(edits, about), before, TOLERANCE)
    after = values(model)
    result.delta.save(tmp_path / "edit.safetensors")
    result.revert()
    assert same(model, before)
    WeightDelta.load(tmp_path / "edit.safetensors").apply(model)
    assert same(model, after)


@pytest.mark.usefixtures("given")
@pytest.mark.parametrize(
    ("objective", "distribution"), [*product(FORMULAS, ("single", "spread", "endpoints"))], ids=str
)
def test_any_objective_goes_with_any_distribution(objective: str, distribution: str, case: Case, seed: int) -> None:
    edits, rome = random_edits(4, seed), objective != "equality"
    layers = (2,) if distribution == "single" else (0, 1, 2)
    about = Settings(objective, layers, "uniform" if rome else "half", alpha=0.0 if rome else 0.1, batch=2)
    pair = {"objective": objective, "distribution": distribution, "batch_size": 2}
    case.editor("rome" if rome else "memit", about, **pair).edit(edits)
    written = (0, 2) if distribution == "endpoints" else layers
    assert_written(case.model, case.published(edits, replace(about, layers=written)), case.before, TOLERANCE)


def edited(case: Case, edits: Sequence[EditRequest], method: str, about: Settings, **config: Any) -> Tensor:
    """The edited weights of the last layer; the model is put back."""
    result = case.editor(method, about, **config).edit(edits)
    weight = weight_at(case.model, about.layers[-1]).detach().clone()
    result.revert()
    return weight


@pytest.mark.usefixtures("given")
def test_identities(case: Case, seed: int) -> None:
    edits, before = random_edits(5, seed), weight_at(case.model, 1).detach().clone()
    one = Settings("", (1,), cov_weight=7.0)
    memit = edited(case, edits, "memit", one, distribution="single")
    emmet = edited(case, edits, "emmet", replace(one, cov_weight=2.0, alpha=3.5))
    assert_close(emmet, memit, before, 1e-6)

    bare = replace(one, contexts=(), alpha=0.0)  # with contexts ROME takes another average
    rome = edited(case, edits[:1], "rome", bare)
    assert_close(edited(case, edits[:1], "emmet", bare), rome, before, 1e-6)
    assert_close(edited(case, edits[:1], "emmet", replace(bare, cov_weight=0.1)), rome, before, 1e-6)

    emmet = edited(case, edits, "emmet", replace(one, alpha=0.0))
    parts = topology(case.model)
    module = parts.resolve(1, "down_proj")[1]
    keys = wanted_keys(case.model, module, case.tokenizer, edits, "half").double()
    now = [at_subject(case.model, parts.blocks[1], case.tokenizer, e, "{}", output=True) for e in edits]
    asked = torch.stack([target_of(e) for e in edits]) - torch.stack(now)
    assert float((keys @ (emmet - before).T - asked).norm() / asked.norm()) < 1e-5


@pytest.mark.usefixtures("given")
@pytest.mark.parametrize("method", ["memit", "alphaedit", "emmet"])
def test_later_batches_preserve_the_keys_of_edits_that_stand(method: str, case: Case, seed: int) -> None:
    edits, about = random_edits(6, seed), replace(METHODS[method], batch=2)
    wanted = case.published(edits[:5], about)
    in_one = case.editor(method, about, batch_size=2)
    result = in_one.edit(edits[:5])
    assert_written(case.model, wanted, case.before, TOLERANCE)
    assert [result.losses, result.delta.metadata["config"]["batch_size"]] == [[0.0] * 3, 2]
    result.revert()

    editor = case.editor(method, about)
    results = [editor.edit(edits[:2]), editor.edit(edits[2:4]), editor.edit(edits[4:5])]
    assert_written(case.model, wanted, case.before, TOLERANCE)
    results[2].revert()
    results[1].revert()
    later = editor.edit(edits[4:5])  # the batch that was taken back is forgotten
    assert_written(case.model, case.published([*edits[:2], edits[4]], about), case.before, TOLERANCE)
    later.revert()
    results[0].revert()
    assert same(case.model, case.before)
    editor.edit(edits[4:5])
    assert_written(case.model, case.published(edits[4:5], about), case.before, TOLERANCE)


@pytest.mark.usefixtures("given")
@pytest.mark.parametrize("method", ["memit", "alphaedit"])
def test_edits_that_were_taken_back_by_hand_are_not_preserved(method: str, case: Case, seed: int) -> None:
    edits, about = random_edits(4, seed), METHODS[method]
    editor = case.editor(method, about)
    editor.edit(edits[:2])
    for name, parameter in case.model.named_parameters():
        parameter.data.copy_(case.before[name])
    result = editor.edit(edits[2:])
    assert sum("something else changed model.layers" in note for note in result.notes) == 1
    found = values(case.model)
    result.revert()
    result = case.editor(method, about).edit(edits[2:])
    assert same(case.model, found)
    assert not any("something else" in note for note in result.notes)


TWINS = [
    EditRequest("w10 w11 w12 is", "w30", "w11 w12", id="one"),
    EditRequest("w40 w41 is", "w31", "w41", id="other"),
    EditRequest("w10 w11 w12 was w13", "w32", "w11 w12", id="two"),
]


@pytest.mark.usefixtures("given")
def test_edits_of_one_key(case: Case) -> None:
    about = replace(METHODS["emmet"], alpha=0.0)
    for method, more in (("emmet", {}), ("memit", {"objective": "equality", "layers": (0, 2)})):
        with pytest.raises(
            EditError, match=r"depend on one another at layer \d.*: edit one, edit two\. .*on_duplicates"
        ) as error:
            case.editor(method, about, **more).edit(TWINS)
        assert error.value.edits == ("edit one", "edit two")
        assert same(case.model, case.before)

    merged = (target_of(TWINS[0]) + target_of(TWINS[2])) / 2
    for choice, edits, batch in (("merge", TWINS[:2], 9), ("sequential", [TWINS[0], TWINS[1], TWINS[2]], 2)):
        result = case.editor("emmet", about, on_duplicates=choice).edit(TWINS)
        wanted: Callable[..., Tensor] = target_of
        if choice == "merge":
            wanted = lambda edit: merged if edit.id == "one" else target_of(edit)  # noqa: E731
        reference = case.published(edits, replace(about, batch=batch), wanted)
        assert_written(case.model, reference, case.before, TOLERANCE)
        result.revert()
        assert same(case.model, case.before)
    case.editor("emmet", replace(about, alpha=0.1)).edit(TWINS)  # needs no choice
    assert_written(case.model, case.published(TWINS, METHODS["emmet"]), case.before, TOLERANCE)


@pytest.mark.usefixtures("given")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_sum_their_batches_in_fp32(
    dtype: torch.dtype, tokenizer: Any, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(tokenizer, tmp_path, seed, dtype=dtype)
    update, weight = LeastSquares.update, weight_at(case.model, 1)
    start, rounded = weight.detach().double(), weight.detach().clone()
    total = torch.zeros_like(start)

    def watched(objective: LeastSquares, keys: Tensor, residuals: Tensor) -> Any:
        nonlocal total, rounded
        assert keys.dtype == residuals.dtype == torch.float32
        assert ((start + total).to(dtype) != weight).float().mean() < 0.01  # what this batch is measured on
        left, right = update(objective, keys, residuals)
        total = total + left.double() @ right.double()
        rounded = (rounded.double() + left.double() @ right.double()).to(dtype)
        return left, right

    monkeypatch.setattr(LeastSquares, "update", watched)
    about = replace(METHODS["memit"], layers=(1,))
    result = case.editor("memit", about, batch_size=1).edit(random_edits(12, seed))
    assert ((start + total).to(dtype) != weight).float().mean() < 0.01  # a sum in another order rounds another way
    assert (rounded != weight).float().mean() > 0.1
    (change,) = result.delta.updates.values()
    change = change.dense() if isinstance(change, LowRank) else change
    assert_close(change.double(), total, torch.zeros(()), 1e-5)
    result.revert()
    assert same(case.model, case.before)


@pytest.mark.usefixtures("given")
def test_fp64_weights_keep_their_digits(case: Case, seed: int) -> None:
    weight = weight_at(case.model, 1)
    with torch.no_grad():
        weight *= 1 + 1e-9 * torch.randn(weight.shape, dtype=torch.float64)
    start = weight.detach().clone()
    moments(case.model, case.folder, seed)
    result = case.editor("emmet", METHODS["emmet"]).edit(random_edits(2, seed))
    (change,) = result.delta.updates.values()
    assert isinstance(change, LowRank)
    torch.testing.assert_close(
        weight.detach(), start + change.left.double() @ change.right.double(), rtol=0, atol=1e-13
    )
