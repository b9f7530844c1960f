"""The call of FT against its published loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers import in_fp64, random_edits, tiny_model, values
from memit_calls import Case, close, requests_of

from fastedit import ConfigError, EditRequest, RequestError
from fastedit.compat import memit


def fine_tuned(model: Any, tokenizer: Any, edits: Sequence[EditRequest], given: dict[str, Any]) -> None:
    """FT's loop as published, one sample at a time."""
    weights = [model.model.layers[layer].mlp.down_proj.weight for layer in given["layers"]]
    optimizer = torch.optim.Adam(weights, lr=given["lr"], weight_decay=given["weight_decay"])
    for _ in range(given["num_steps"]):
        losses = []
        for first in range(0, len(edits), given["batch_size"]):
            batch = edits[first : first + given["batch_size"]]
            each = []
            for edit in batch:
                n = len(tokenizer(edit.prompt).input_ids)
                ids = torch.tensor([tokenizer(f"{edit.prompt} {edit.target}").input_ids])
                logits = model(input_ids=ids).logits[0, n - 1 : -1]
                each.append(torch.nn.functional.cross_entropy(logits, ids[0, n:]))
            optimizer.zero_grad()
            loss = torch.stack(each).mean()
            losses += [float(loss.detach())] * len(batch)
            if loss >= 1e-2:
                loss.backward()
                optimizer.step()
        if sum(losses) / len(losses) < 1e-2:
            break


FT = {"num_steps": 6, "lr": 1e-2, "weight_decay": 0.01, "batch_size": 2, "norm_constraint": False, "layers": [1, 2]}
FT |= {"rewrite_module_tmp": "model.layers.{}.mlp.down_proj.weight", "objective_optimization": "target_new"}


def test_ft_is_the_published_loop(tokenizer: Any, seed: int) -> None:
    """In fp64: Adam's first steps are ±lr, whatever the slope, and rounding alone decides where that is 0."""
    with in_fp64():
        reference, own, edits = tiny_model("llama"), tiny_model("llama"), random_edits(3, seed)
        before = values(reference)
        fine_tuned(reference, tokenizer, edits, FT)
        model, weights = memit.apply_ft_to_model(own, tokenizer, requests_of(edits), FT, return_orig_weights=True)
    assert close(model, values(reference), before, 1e-9)
    assert {*weights} == {f"model.layers.{layer}.mlp.down_proj.weight" for layer in (1, 2)}


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"norm_constraint": 5e-4}, "norm_constraint is 0.0005"),
        ({"objective_optimization": "other"}, "objective_optimization is 'other'"),
        ({"lr": None, "drop": "lr"}, "the hparams of FT lack lr"),
    ],
)
def test_ft_refuses_what_it_cannot_honour(given: dict[str, Any], match: str, case: Case) -> None:
    fields = FT | given
    fields.pop(fields.pop("drop", ""), None)
    with pytest.raises(ConfigError, match=match):
        memit.apply_ft_to_model(case.model, case.tokenizer, case.requests, fields)


def test_ft_at_the_prompt_s_last_token_takes_targets_of_one_token_alone(case: Case) -> None:
    fields = {name: value for name, value in FT.items() if name != "objective_optimization"}
    one = [{"prompt": "w9 w10", "target_new": {"str": "w11"}}]
    memit.apply_ft_to_model(case.model, case.tokenizer, one, fields)
    longer = [*one, {"prompt": "w9 w12", "target_new": "w11 w13"}]
    with pytest.raises(RequestError, match=r"targets of several tokens: edit 1; give target_new"):
        memit.apply_ft_to_model(case.model, case.tokenizer, longer, fields)
