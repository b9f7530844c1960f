"""A result's account of each edit: how likely its target became, and why it did not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CONTEXTS, moments, random_edits, tiny_model
from torch.nn.functional import cross_entropy

from fastedit import Editor, EditRequest

PUBLISHED: dict[str, Any] = {"published": True, "layer": 1, "batch_size": 4}


def test_a_probability_is_that_of_the_targets_tokens(tokenizer: Any, seed: int) -> None:
    model, edits = tiny_model("llama", seed=1), random_edits(7, seed)
    wanted = []
    for edit in edits:
        prompt, target = (tokenizer(text).input_ids for text in (edit.prompt, edit.target))
        ids = torch.tensor([*prompt, *target, tokenizer.eos_token_id])
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0]
        wanted.append(float(cross_entropy(logits[len(prompt) - 1 : -1], ids[len(prompt) :])))
    result = Editor(model, tokenizer, **PUBLISHED, lr=1e-12, epochs=1).edit(edits)
    assert (-result.probability.log()).tolist() == pytest.approx(wanted, rel=1e-4)
    assert result.unlearned == {
        place: f"the probability of its target is {p:.2g}" for place, p in enumerate(result.probability.tolist())
    }


def test_a_conflict_is_the_reason_why_an_edit_is_not_learned(tokenizer: Any, seed: int) -> None:
    edits = random_edits(6, seed)
    edits[4] = EditRequest(edits[1].prompt, "w60 w61 w62", id="other")
    result = Editor(tiny_model("llama", seed=1), tokenizer, **PUBLISHED, lr=1e-2, epochs=60, module="mlp").edit(edits)
    reason = "another request has its prompt and another target"
    assert {1, 4} & result.unlearned.keys()
    assert all((result.unlearned[place] == reason) == (place in {1, 4}) for place in result.unlearned)
    # an epoch counts both as learned if both are likely
    again = replace(result, probability=torch.full((6,), 0.9), learned=[2, 6])
    assert (again.learned, len(again.unlearned)) == ([2, 5], 1)
    # the mean over tokens may be high for both: their EOS is the same
    result.probability[:] = 0.8
    result.probability[4] = 0.9
    assert result.unlearned == {1: reason}
    result.probability[4] = float("nan")
    assert result.unlearned == {4: reason}


def test_of_a_solver_it_is_the_probability_that_the_search_reached(tokenizer: Any, seed: int, tmp_path: Path) -> None:
    model, edits = tiny_model("llama", seed=1), random_edits(5, seed)
    given: dict[str, Any] = {"statistics": tmp_path, "contexts": tuple(CONTEXTS), "layers": (1, 2)}
    with torch.no_grad():  # the tokens of one edit are broken
        model.get_input_embeddings().weight[90] = torch.nan
    moments(model, tmp_path, 3)
    edits = [EditRequest("w90 w91 says", "w40", "w90 w91", id="broken"), *(e for e in edits if "w90" not in str(e))]
    result = Editor(model, tokenizer, "memit", **given, steps=25, lr=0.5).edit(edits)
    assert result.unlearned.get(0) == "it was left out"
    assert result.probability[0].isnan()
    assert (result.probability[1:] > 0).all()


@pytest.mark.parametrize("method", ["locft-bf", "memit"])
def test_it_says_when_edits_were_learned_where_the_time_went_and_what_was_cached(
    method: str, tokenizer: Any, seed: int, tmp_path: Path
) -> None:
    model, edits = tiny_model("llama", seed=1), random_edits(6, seed)
    given: dict[str, Any] = PUBLISHED | {"lr": 1e-2, "epochs": 40, "module": "mlp", "cache_bytes": 0}
    stages = {"plan", "prefix", "train", "rest"}
    if method == "memit":
        moments(model, tmp_path, 3)
        given = {"statistics": tmp_path, "contexts": (), "layers": (1,), "steps": 60, "lr": 0.5, "clamp": 30.0}
        given |= {"batch_size": 2, "cache_bytes": 0}
        stages = {"plan", "targets", "keys", "edits", "rest"}
    result = Editor(model, tokenizer, method, **given).edit(edits)
    assert len(result.learned) == len(result.losses)
    assert result.learned[-1] == len(edits) - len(result.unlearned)
    assert result.stages.keys() == stages
    assert sum(result.stages.values()) == pytest.approx(result.seconds)
    assert min(result.stages.values()) >= 0
    assert result.cached.keys() == {"file"}
    if method == "locft-bf":
        assert result.learned[0] < result.learned[-1]
        words = sum(len(tokenizer(f"{edit.prompt} {edit.target}").input_ids) for edit in edits)
        assert result.cached["file"] == (words + len(edits)) * 32 * 4
