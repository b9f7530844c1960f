"""Second moments of text and names: what names add, which of them are taken, and what is kept."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import rows, tiny_model
from stored import OURS, D, keep, parts
from torch import Tensor

from fastedit import ConfigError, Editor, EditRequest
from fastedit.methods import LocateThenEditConfig, LocFTBFConfig
from fastedit.methods.base import History
from fastedit.methods.locate_then_edit import recipes, write
from fastedit.methods.locate_then_edit.config import RECIPES
from fastedit.methods.locate_then_edit.method import plan as solve
from fastedit.methods.locft_bf.method import plan
from fastedit.methods.presets import locate_then_edit_preset
from fastedit.models import Model
from fastedit.statistics.names import common_names, known_names, with_names
from fastedit.statistics.store import StatisticsStore

NAMES = ["w20", "w21 w22", "w30 w31 w32"]

pytestmark = pytest.mark.usefixtures("cache")


def last_inputs(tokenizer: Any, texts: list[str], layer: int) -> Tensor:
    """Inputs [N, d] of `down_proj` at each text's last token, by plain passes."""
    seen: list[Tensor] = []
    handle = parts.resolve(layer, "down_proj")[1].register_forward_pre_hook(lambda _, args: seen.append(args[0][0, -1]))
    for text in texts:
        parts.model(input_ids=torch.tensor([tokenizer(text).input_ids]))
    handle.remove()
    return torch.stack(seen).detach().double()


@pytest.mark.parametrize("layer", [0, 2])
def test_the_mean_over_the_names_is_added(layer: int, tokenizer: Any, tmp_path: Path, seed: int) -> None:
    for number in (0, 2):
        keep(tmp_path, rows(seed + number, 200, D), layer=number)
    store = StatisticsStore(parts, OURS, directory=tmp_path)
    found = with_names(store, Model(parts, tokenizer), [0, 2], NAMES, 3.0)
    keys = last_inputs(tokenizer, NAMES, layer)
    wanted = store.covariance(layer) + 3 * keys.T @ keys / len(keys)
    assert (found.covariance(layer) - wanted).norm() < 1e-6 * wanted.norm()
    L = found.cholesky(layer)
    assert (L @ L.T - wanted).norm() < 1e-6 * wanted.norm()


def test_eigenvectors_are_kept_for_their_names_and_weight_alone(
    tokenizer: Any, tmp_path: Path, cache: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(tmp_path, rows(seed, 200, D))
    model, store = Model(parts, tokenizer), StatisticsStore(parts, OURS, directory=tmp_path)
    ways: list[tuple[list[str], float]] = [(NAMES, 3.0), (NAMES, 4.0), (NAMES[:2], 3.0), ([], 3.0), (NAMES, 0.0)]
    made = []
    for names, weight in ways:
        found = with_names(store, model, [1], names, weight)
        values, vectors = found.eigen(1)
        torch.testing.assert_close((vectors * values) @ vectors.T, found.covariance(1))
        made.append(values)
    assert len({tuple(values.tolist()) for values in made}) == 4  # the last two are of text alone
    assert sorted(path.name for path in cache.glob("*eigen*")) == [
        "1.down_proj.eigen.names.safetensors",
        "1.down_proj.eigen.safetensors",
    ]
    with_names(store, model, [1], NAMES, 3.0).eigen(1)
    monkeypatch.setattr(torch.linalg, "eigh", None)
    values, _ = with_names(store, model, [1], NAMES, 3.0).eigen(1)  # from the file
    assert torch.equal(values, made[0])


def test_eigenvectors_of_an_edited_model_are_not_kept_for_the_unedited_one(
    tokenizer: Any, tmp_path: Path, seed: int
) -> None:
    """The result of an edit must not depend on what earlier edits left in the cache."""
    keep(tmp_path, rows(seed, 200, D))
    store, found = StatisticsStore(parts, OURS, directory=tmp_path), []
    weight = parts.resolve(0, "down_proj")[1].get_parameter("weight")
    before = weight.detach().clone()
    for factor in (1.0, 1.5, 1.0):
        weight.detach().copy_(before * factor)
        statistics = with_names(store, Model(parts, tokenizer), [1], NAMES, 3.0)
        values, vectors = statistics.eigen(1)
        torch.testing.assert_close((vectors * values) @ vectors.T, statistics.covariance(1))
        found.append(values)
    assert not torch.allclose(found[0], found[1], rtol=1e-6)
    assert torch.equal(found[0], found[2])


def test_names_that_the_model_has_no_tokens_for_are_left_out(tokenizer: Any) -> None:
    model = Model(parts, tokenizer)
    assert known_names(model, None) == ()  # none of them is made of this tokenizer's words
    assert known_names(model, ["w20", "w21 w22"], but=["W20"]) == ("w21 w22",)
    with pytest.raises(ConfigError, match="names: the tokenizer does not know Rome, Bonn; leave them out"):
        known_names(model, ["w20", "Rome", "Bonn"])
    more = copy.deepcopy(tokenizer)
    more.add_tokens(["<Lumbria>"])  # without a row in the model
    assert known_names(Model(parts, more), ["w20"]) == ("w20",)
    with pytest.raises(
        ConfigError, match=r"^names: .* none for '<Lumbria>' \(\d+\); call model\.resize_token_embeddings"
    ):
        known_names(Model(parts, more), ["w20", "<Lumbria>"])


def test_subjects_of_the_edits_do_not_count_as_names(tokenizer: Any, tmp_path: Path, seed: int) -> None:
    for layer in (0, 1):
        keep(tmp_path, rows(seed, 400, D), layer=layer)
    config = LocFTBFConfig(
        layer=(0, 1), module="down_proj", tokens="subject", statistics=str(tmp_path), names=tuple(NAMES)
    )
    made = plan(Model(parts, tokenizer), [EditRequest("w9 w21 w22 w50", "w51", "w21 w22")], config)
    assert made.recipe.names == ("w20", "w30 w31 w32")


def test_the_packages_names_are_different_and_not_blank() -> None:
    names = common_names()
    assert len({name.casefold() for name in names}) == len(names) == 573
    assert all(name == name.strip() != "" for name in names)


def test_an_edit_changes_less_at_names(tokenizer: Any, tmp_path: Path, seed: int) -> None:
    """Where nothing but the names differs: the outputs at them."""
    model = tiny_model("llama")
    changes = []
    for weight in (0.0, 1000.0):
        for layer in (0, 1):
            keep(tmp_path, rows(seed, 400, D), layer=layer)
        editor = Editor(
            model,
            tokenizer,
            layer=(0, 1),
            module="down_proj",
            tokens="subject",
            statistics=str(tmp_path),
            unchecked_statistics=True,
            names=tuple(NAMES),
            name_weight=weight,
            epochs=8,
        )
        result = editor.edit([EditRequest("w9 w40 w50", "w51", "w40"), EditRequest("w9 w41 w50", "w52", "w41")])
        update = dict(result.delta.updates)["model.layers.0.mlp.down_proj.weight"]
        result.revert()
        keys = last_inputs(tokenizer, NAMES, 0).float()
        dense = update if isinstance(update, Tensor) else update.dense()
        changes.append(float((keys @ dense.T).norm() / dense.norm()))
    assert changes[1] < 0.5 * changes[0]


@pytest.mark.parametrize("method", ["rome", "memit", "emmet", "alphaedit"])
def test_a_solver_preserves_text_and_names_together(
    method: str, tokenizer: Any, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if their sum had been given; and an Editor's second edit takes the factors of the first."""
    model, layers, edits = tiny_model("llama"), [1], [EditRequest("w9 w40 w50", "w51", "w40")]
    keep(tmp_path, rows(seed, 400, D), layer=1)
    common: dict[str, Any] = {"layers": layers, "n_contexts": 0, "steps": 3, "lr": 0.5, "alpha": 0.1}
    common |= {"cov_weight": 2.0, "null_threshold": 1.0, "unchecked_statistics": True, "statistics": str(tmp_path)}
    editor = Editor(model, tokenizer, method=method, names=tuple(NAMES), name_weight=3.0, **common)
    store = StatisticsStore(parts, OURS, directory=tmp_path, unchecked=True)
    total = with_names(store, Model(parts, tokenizer), layers, NAMES, 3.0).covariance(1)
    path = "model.layers.1.mlp.down_proj"
    history = History("", second_moments={path: total})
    config = LocateThenEditConfig(**common, name_weight=0.0)
    wanted = solve(Model(parts, tokenizer), edits, config, method=RECIPES[method], history=history).run()
    for name, weight in wanted.originals.items():
        parts.model.get_parameter(name).data.copy_(weight)
    result = editor.edit(edits)
    update, other = (x.updates[f"{path}.weight"].dense() for x in (result.delta, wanted))
    torch.testing.assert_close(update, other, rtol=1e-4, atol=1e-6)
    result.revert()
    monkeypatch.setattr(write, "with_names", None)
    again = editor.edit(edits)
    assert torch.equal(again.delta.updates[f"{path}.weight"].dense(), update)
    again.revert()


@pytest.mark.parametrize("published", [True, False])
def test_names_count_by_default_where_nothing_is_published(published: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    preset = locate_then_edit_preset(parts)[0]
    monkeypatch.setattr(recipes, "locate_then_edit_preset", lambda _: (preset, published))
    default = LocateThenEditConfig()
    weights = [recipes.resolve(parts, default, recipe).config.name_weight for recipe in RECIPES.values()]
    assert dict(zip(RECIPES, weights, strict=True)) == dict.fromkeys(RECIPES, 0) | {"memit": int(not published)}
    given = LocateThenEditConfig(name_weight=2.0)
    assert recipes.resolve(parts, given, RECIPES["memit"]).config.name_weight == 2


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"names": ()}, "names is empty"),
        ({"names": ("a", " ")}, "holds an empty text"),
        ({"name_weight": -1.0}, "name_weight is -1.0; give 0 or more"),
        ({"names": ("a",), "published": True}, "names count with preserve null-space"),
        ({"name_weight": 2.0, "preserve": "anchors"}, "names count with preserve null-space"),
    ],
)
def test_settings_that_make_no_sense_are_refused(config: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        LocFTBFConfig(**config)
    if config.keys() <= {"names", "name_weight"}:
        with pytest.raises(ConfigError, match=said):
            LocateThenEditConfig(**config)
