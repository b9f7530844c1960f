"""The tokens before the subjects, which LocFT-BF holds in the first half of its epochs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import last_of_subject, moments, random_edits, tiny_model
from torch import Tensor, nn

from fastedit import EditRequest
from fastedit.methods import LocFTBFConfig
from fastedit.methods.base import MethodResult
from fastedit.methods.locft_bf import passes
from fastedit.methods.locft_bf.method import plan
from fastedit.models import Model, resume

SETTINGS: dict[str, Any] = {"layer": (1, 2), "tokens": "subject", "lr": 3e-3, "batch_size": 4, "epochs": 4}
SETTINGS |= {"skip_loss": 0.0, "stop_loss": 0.0, "null_space": 0.4, "focus": 0.0}


def run(model: nn.Module, tokenizer: Any, edits: list[EditRequest], **config: Any) -> MethodResult:
    return plan(Model.of(model, tokenizer), edits, LocFTBFConfig(**SETTINGS | config)).run()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_tokens_before_the_subjects_run_once(
    family: str, tokenizer: Any, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the null space of other text they hardly change; without it they run in every step, as in the edited model."""
    model, edits = tiny_model(family, seed=seed), random_edits(4, seed)
    moments(model, tmp_path, seed)
    before = [last_of_subject(tokenizer, edit) for edit in edits]
    assert sum(before) > 0
    everything = sum(len(tokenizer(f"{e.prompt} {e.target}").input_ids) for e in edits)
    for preserve, tokens in (("null-space", everything - sum(before)), ("none", everything)):
        ran: list[int] = []

        def noted(parts: Any, hidden: Tensor, rows: Any, *args: Any, ran: list[int] = ran) -> Tensor:
            ran.append(len(rows.token_rows))
            return resume(parts, hidden, rows, *args)

        monkeypatch.setattr(passes, "resume", noted)
        run(model, tokenizer, edits, preserve=preserve, statistics=str(tmp_path))
        half = SETTINGS["epochs"] // 2  # later ones run as in the edited model
        assert ran[: 2 * half] == [tokens] * half + [everything] * half


@pytest.mark.parametrize("why", ["much padding", "another process cannot", "no memory"])
def test_tokens_are_held_by_all_or_none(
    why: str, tokenizer: Any, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    edits, held, step = random_edits(4, seed), list[bool](), passes.Passes.run
    monkeypatch.setattr(passes.Passes, "run", lambda self, *args: held.append(self.holds) or step(self, *args))
    for broken in (False, True):
        if broken and why == "much padding":
            monkeypatch.setattr(passes, "_PADDED", 0)
        elif broken and why == "another process cannot":
            monkeypatch.setattr(passes.parallel, "gathered", lambda value: [value, False])
        held.clear()
        model = tiny_model("llama", seed=seed)
        moments(model, tmp_path, seed)
        room = 0 if broken and why == "no memory" else None
        result = run(model, tokenizer, edits, preserve="null-space", statistics=str(tmp_path), cache_bytes=room)
        assert held[0] is not broken
        if why == "no memory":
            assert any("subjects run in every epoch" in note for note in result.notes) is broken


def test_a_subject_that_ends_in_the_targets_first_token(tokenizer: Any, tmp_path: Path, seed: int) -> None:
    """One token over both is possible; the row before it predicts the target and has to run."""
    losses = []
    for fits in (True, False):
        model = tiny_model("llama", seed=seed)
        moments(model, tmp_path, seed)
        config = LocFTBFConfig(
            **SETTINGS | {"preserve": "null-space", "statistics": str(tmp_path), "cache_bytes": None if fits else 0}
        )
        made = plan(Model.of(model, tokenizer), random_edits(4, seed), config)
        data = replace(made.data, trained=made.data.samples.target_start.clone())
        losses.append(replace(made, data=data).run().losses[0])  # of the unedited model
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_training_does_not_end_before_all_tokens_have_run(tokenizer: Any, tmp_path: Path, seed: int) -> None:
    model, edits = tiny_model("llama", seed=seed), random_edits(4, seed)
    moments(model, tmp_path, seed)
    options: dict[str, Any] = {"statistics": str(tmp_path), "focus": 50.0}  # all edits are learned at once
    assert len(run(model, tokenizer, edits, preserve="null-space", **options).losses) == 2
    assert len(run(model, tokenizer, edits, preserve="none", **options).losses) == 1
