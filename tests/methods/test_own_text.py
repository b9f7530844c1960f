"""The other text that LocFT-BF preserves: by statistics that are given, or by those of the model's own text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import moments, random_edits, tiny_model

from fastedit import Editor, EditRequest, ModelError, StreamingCovariance
from fastedit.methods import LocFTBFConfig
from fastedit.methods.locft_bf.method import plan
from fastedit.models import Model, fingerprint, topology
from fastedit.statistics.own_text import own_text_directory, write_text
from fastedit.statistics.store import user_directory


@pytest.mark.parametrize(
    ("given", "lacks", "tokens", "preserve"),
    [
        ({}, "", "subject", "null-space"),
        ({"published": True}, "", "all", "none"),
        ({"layer": 1}, "", "all", "none"),
        ({"preserve": "none"}, "", "all", "none"),
        ({"tokens": "subject", "preserve": "anchors"}, "", "subject", "anchors"),
        ({"tokens": "subject"}, "", "subject", "null-space"),
        ({}, "statistics", "subject", "null-space"),
        ({}, "subjects", "all", "none"),
    ],
)
def test_the_default_spares_the_rest_where_it_can(
    given: dict[str, Any],
    lacks: str,
    tokens: str,
    preserve: str,
    tokenizer: Any,
    tmp_path: Path,
    seed: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a model without preset, with the statistics where they lie by themselves; the notes say which, and why."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model, edits = tiny_model("llama", seed=seed), random_edits(30, seed)
    if lacks != "statistics":
        moments(model, user_directory(fingerprint(model)), seed, layers=(0, 1))
    if lacks == "subjects":
        edits[7] = EditRequest(edits[7].prompt, edits[7].target, id="nameless")
    made = plan(Model.of(model, tokenizer), edits, LocFTBFConfig(**given))
    config, notes = made.config, "; ".join(made.notes)
    assert (config.tokens, config.preserve) == (tokens, preserve)
    everywhere = {"layer": (2,), "lr": 0.025, "batch_size": 1, "null_space": 0.2}
    subject = {"layer": (0, 1), "lr": 0.016, "batch_size": 3, "null_space": 0.5}
    expected: dict[str, Any] = subject if tokens == "subject" else everywhere
    expected |= given
    assert config.layers == (expected["layer"] if isinstance(expected["layer"], tuple) else (1,))
    assert config.name_weight == (10.0 if tokens == "subject" and config.keeps_null_space else 0.0)
    assert config.epochs == (80 if tokens == "subject" else 25)
    assert (config.batch_size, config.null_space) == (expected["batch_size"], expected["null_space"])
    weights = [topology(model).resolve(layer, "down_proj")[1].weight for layer in config.layers]
    assert config.lr == pytest.approx(
        expected["lr"] * float(torch.stack(weights).detach().square().mean().sqrt()), rel=1e-4
    )
    assert ("are preserved" in notes) == (tokens == "subject" and not given)
    assert ("fastedit covariance" in notes) == (lacks == "statistics")
    assert ("edit nameless" in notes) == (lacks == "subjects")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_for_want_of_statistics_the_model_writes_the_text(
    family: str, tokenizer: Any, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once: the next edit of this model finds them; statistics of real text go before them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model, edits = tiny_model(family, seed=seed), random_edits(12, seed)
    editor, before = Editor(model, tokenizer, epochs=2), fingerprint(model)
    folder = own_text_directory(before)
    state = torch.get_rng_state()
    made = editor.plan(edits)
    assert not folder.exists()  # a plan writes nothing
    result = editor.run(made)
    assert torch.equal(torch.get_rng_state(), state)
    found = {path: StreamingCovariance.load(path) for path in folder.glob("*_proj.safetensors")}
    assert len(found) == 2  # layers 0 and 1
    for moment in found.values():
        assert moment.count >= moment.dim
        assert moment.metadata["fingerprint"] == before
    times = {path: path.stat().st_mtime_ns for path in found}
    second = editor.edit(edits)  # of the same Editor: those of the unedited model
    assert second.delta.metadata["config"]["preserve"] == "null-space"
    second.revert()
    result.revert()
    third = editor.edit(edits)
    assert {path: path.stat().st_mtime_ns for path in found} == times
    for path, update in result.delta.updates.items():
        torch.testing.assert_close(third.delta.updates[path], update)
    third.revert()
    moments(model, user_directory(before), seed, layers=(0, 1))
    assert not [note for note in editor.plan(edits).notes if "text that the model writes" in note]


def damaged(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:100])


def of_few_tokens(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        found = StreamingCovariance(StreamingCovariance.load(path).dim)
        found.update(torch.ones(1, found.dim))
        found.save(path)


@pytest.mark.parametrize("harm", [damaged, of_few_tokens])
@pytest.mark.parametrize("whose", ["own-text", ""])
def test_statistics_that_are_of_no_use_are_made_again(
    harm: Any, whose: str, tokenizer: Any, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kept by an interrupted process, say. Nobody gave them, so that they stop nobody; the note tells of real ones."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model, edits = tiny_model("llama", seed=seed), random_edits(8, seed)
    folder = user_directory(fingerprint(model))
    moments(model, folder / whose, seed, layers=(0, 1))
    harm(folder / whose)
    editor = Editor(model, tokenizer, epochs=1)
    plan = editor.plan(edits)
    assert [note for note in plan.notes if "text that the model writes" in note]
    editor.run(plan)
    kept = [StreamingCovariance.load(path) for path in own_text_directory(plan.fingerprint).glob("*.safetensors")]
    assert len(kept) == 2
    assert all(moment.count >= moment.dim for moment in kept)


def test_a_cache_that_cannot_be_written_stops_no_edit(
    tokenizer: Any, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    result = Editor(tiny_model("llama", seed=seed), tokenizer, epochs=1).edit(random_edits(4, seed))
    assert result.delta.metadata["config"]["preserve"] == "null-space"


def test_an_edited_model_does_not_write_the_text(
    tokenizer: Any, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An edit without subjects made no statistics, and now it is too late; nothing is refused."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    editor = Editor(tiny_model("llama", seed=seed), tokenizer, epochs=1)
    editor.edit([EditRequest("w20 w21", "w22")])
    result = editor.edit(random_edits(4, seed))
    assert result.delta.metadata["config"]["preserve"] == "none"
    assert [note for note in result.notes if "edited already" in note]


def test_a_model_that_gives_nan_is_told_so(tokenizer: Any, seed: int) -> None:
    model = tiny_model("llama", seed=seed)
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(torch.nan)
    with pytest.raises(ModelError, match="NaN or infinity for ordinary text"):
        Editor(model, tokenizer).edit(random_edits(4, seed))


def test_statistics_that_are_given_must_be_there(tokenizer: Any, tmp_path: Path, seed: int) -> None:
    """Not replaced by the papers' recipe with a note."""
    model = Model.of(tiny_model("llama", seed=seed), tokenizer)
    with pytest.raises(ModelError, match="no statistics"):
        plan(model, random_edits(4, seed), LocFTBFConfig(statistics=tmp_path))


def test_the_text_a_model_writes_is_as_long_as_asked_and_its_own(tokenizer: Any, seed: int) -> None:
    model = Model.of(tiny_model("llama", seed=seed), tokenizer)
    texts = write_text(model, 500, seed=1)
    lengths = [len(ids) for ids in tokenizer(texts)["input_ids"]]
    assert 400 <= sum(lengths) <= 700  # special tokens that it may sample are not text
    assert len(set(texts)) == len(texts)
    assert texts == write_text(model, 500, seed=1) != write_text(model, 500, seed=2)
