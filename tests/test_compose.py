"""Several edits on one model: their sum in any order, their overlaps, and what stands on top of what."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import same, tiny_model, values
from torch import nn

from fastedit import ConfigError, Editor, ModelError, WeightDelta
from fastedit.compose import overlaps
from fastedit.models import fingerprint
from fastedit.weights import LowRank, inner, norm, summed

UP, DOWN = (f"model.layers.1.mlp.{name}.weight" for name in ("up_proj", "down_proj"))


def factors(model: nn.Module, path: str, rng: torch.Generator) -> LowRank:
    m, n = model.get_parameter(path).shape
    return LowRank(torch.randn(m, 2, generator=rng) / 9, torch.randn(2, n, generator=rng))


def three(model: nn.Module, rng: torch.Generator) -> list[WeightDelta]:
    """Factors of two matrices, factors of one of them, and no factors of it."""
    about = {"fingerprint": fingerprint(model)}
    dense = torch.randn(model.get_parameter(DOWN).shape, generator=rng) / 20
    edits: list[dict[str, Any]] = [{path: factors(model, path, rng) for path in (UP, DOWN)}]
    edits += [{DOWN: factors(model, DOWN, rng)}, {DOWN: dense}]
    return [WeightDelta(updates, about) for updates in edits]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [2, 3])
def test_the_order_of_edits_of_one_model_does_not_matter(
    n: int, dtype: torch.dtype, tokenizer: Any, rng: torch.Generator
) -> None:
    model = tiny_model("llama", dtype=dtype)
    before, deltas = values(model), three(model, rng)[:n]
    editor, found = Editor(model, tokenizer), []
    for order in permutations(deltas):
        done = editor.apply_deltas(order)
        found.append(values(model))
        done.revert()
        assert same(model, before)
    for path in (UP, DOWN):
        assert all(torch.equal(each[path], found[0][path]) for each in found)
        dense = [u.dense() if isinstance(u, LowRank) else u for d in deltas if (u := d.updates.get(path)) is not None]
        torch.testing.assert_close(found[0][path], (before[path].float() + sum(dense)).to(dtype), atol=1e-5, rtol=1e-2)


def test_overlaps_are_named_with_their_cosine(tokenizer: Any, rng: torch.Generator, tmp_path: Path) -> None:
    """Of factors and of whole updates the same; deltas may be files."""
    model = tiny_model("llama")
    deltas = three(model, rng)
    for i, delta in enumerate(deltas):
        delta.save(tmp_path / str(i))
    done = Editor(model, tokenizer).apply_deltas([tmp_path / "0", str(tmp_path / "1"), deltas[2]])
    assert [(o.one, o.other, o.path) for o in done.overlaps] == [(0, 1, DOWN), (0, 2, DOWN), (1, 2, DOWN)]
    for o in done.overlaps:
        u, v = (u.dense() if isinstance(u := deltas[i].updates[DOWN], LowRank) else u for i in (o.one, o.other))
        assert o.cosine == pytest.approx(float((u * v).sum() / u.norm() / v.norm()), abs=1e-6)
    assert str(done.overlaps[0]).startswith(f"deltas 1 and 2 both change {DOWN}, cosine ")
    assert [o.cosine for o in overlaps([deltas[0], deltas[0]])] == pytest.approx([1, 1])
    assert inner(deltas[0].updates[DOWN], deltas[2].updates[DOWN]) == inner(
        deltas[2].updates[DOWN], deltas[0].updates[DOWN]
    )
    assert norm(summed([deltas[0].updates[DOWN]])) == norm(deltas[0].updates[DOWN])


def test_one_of_several_is_taken_off_as_if_it_had_never_been_there(tokenizer: Any, rng: torch.Generator) -> None:
    model = tiny_model("llama")
    before, deltas = values(model), three(model, rng)
    editor = Editor(model, tokenizer)
    wanted = editor.apply_deltas([deltas[0], deltas[2]])
    without = values(model)
    wanted.revert()
    done = editor.apply_deltas(deltas)
    held = values(model)
    with pytest.raises(ConfigError, match="no delta 3: the list has 3"):
        done.revert(3)
    model.get_parameter(UP).data += 1
    with pytest.raises(ModelError, match="was changed after this edit"):
        done.revert(1)
    model.get_parameter(UP).data.copy_(held[UP])
    done.revert(1)
    assert same(model, without)
    assert (done.deltas, len(done.overlaps)) == ([deltas[0], deltas[2]], 1)
    done.revert()
    assert same(model, before)
    with pytest.raises(ModelError, match="nothing to revert"):
        done.revert()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_edit_on_top_of_another_goes_after_it(dtype: torch.dtype, tokenizer: Any, rng: torch.Generator) -> None:
    """And gives the bits of the model that it was made on; the one below it cannot be taken off alone."""
    model = tiny_model("llama", dtype=dtype)
    before, (one, other, third) = values(model), three(model, rng)
    one.apply(model)
    top = WeightDelta(other.updates, {"fingerprint": fingerprint(model)})
    top.apply(model)
    wanted = values(model)
    top.revert()
    one.revert()
    editor = Editor(model, tokenizer)
    done = editor.apply_deltas([one, top])
    assert same(model, wanted)
    with pytest.raises(ModelError, match=r"1 of the deltas \(1\) cannot be put on this model"):
        done.revert(0)
    assert same(model, wanted)
    done.revert()
    for order in ([top, one], [one, third, top]):
        with pytest.raises(ModelError, match=f"was made for {top.metadata['fingerprint']}.* goes right after it"):
            editor.apply_deltas(order)
        assert same(model, before)
    editor.apply_deltas([one, top, third]).revert()
    assert same(model, before)


def test_what_cannot_be_composed_is_refused_before_anything_changes(tokenizer: Any, rng: torch.Generator) -> None:
    model, other = tiny_model("llama"), tiny_model("llama", seed=1)
    before, (one, two, _) = values(model), three(model, rng)
    strangers = three(other, rng)[:2]
    editor = Editor(model, tokenizer)
    made_for = fingerprint(other)
    message = f"2 of the deltas .* is {fingerprint(model)}.*: delta 2 was made for {made_for}, delta 3 was made for"
    with pytest.raises(ModelError, match=message):
        editor.apply_deltas([one, *strangers])
    with pytest.raises(ModelError, match=r"delta 2: the model has no parameter lost\.weight"):
        editor.apply_deltas([one, WeightDelta({"lost.weight": torch.ones(3)}, one.metadata)])
    two.apply(model)
    with pytest.raises(ModelError, match="a model already holds delta 2 of the list"):
        editor.apply_deltas([one, two])
    two.revert()
    for nothing in ([], "edit.safetensors"):
        with pytest.raises(ConfigError, match="give a list of deltas"):
            editor.apply_deltas(nothing)
    assert same(model, before)


def test_the_editor_counts_them_as_its_edits(tokenizer: Any, rng: torch.Generator) -> None:
    """`evaluate` compares with the model below them, which stays as it is."""
    model = tiny_model("llama")
    editor = Editor(model, tokenizer)
    request = {"prompt": "w10 w11", "target": "w12", "neighbours": [["w13 w14", "w15"]]}
    assert editor.evaluate([request]).metrics["locality"]["generated"] is None
    editor.apply_deltas(three(model, rng))
    held = values(model)
    assert editor.evaluate([request]).metrics["locality"]["generated"] is not None
    assert same(model, held)
