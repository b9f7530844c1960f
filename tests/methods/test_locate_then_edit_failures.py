"""ROME, MEMIT, EMMET and AlphaEdit with edits that have no target, and after Ctrl-C: what is left of the work."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import moments, random_edits, same, values
from published import METHODS, SOUGHT, Case, assert_close
from torch import Tensor

from fastedit import EditError
from fastedit.methods.locate_then_edit.objectives import LeastSquares


def break_token(case: Case, token: str = "You") -> None:
    """Make all values that are computed from this token not finite."""
    with torch.no_grad():
        case.model.get_input_embeddings().weight[case.tokenizer.convert_tokens_to_ids(token)] = torch.nan
    case.before = values(case.model)


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name].nan_to_num(), other[name].nan_to_num()) for name in one)


def test_edits_without_a_target_are_dropped_and_the_others_made(tokenizer: Any, tmp_path: Path, seed: int) -> None:
    case = Case(tokenizer, tmp_path, seed, dtype=torch.float32)
    break_token(case)
    moments(case.model, tmp_path, seed)
    edits, about = random_edits(5, seed), METHODS["memit"]
    edits[1] = replace(edits[1], target="You w9")
    edits[3] = replace(edits[3], prompt=f"You {edits[3].prompt}")
    good = [edits[i] for i in (0, 2, 4)]
    for batch_size in (1, "auto"):
        config = SOUGHT | {"batch_size": batch_size}
        result = case.editor("memit", about, **config).edit(edits)
        assert [n for n in result.notes if "dropped" in n] == [
            "dropped, because the loss is not finite: edit e1, edit e3"
        ]
        found = values(case.model)
        result.revert()
        result = case.editor("memit", about, **config).edit(good)
        wanted = values(case.model)
        result.revert()
        assert equal(values(case.model), case.before)
        for layer in about.layers:
            name = f"model.layers.{layer}.mlp.down_proj.weight"
            if batch_size == 1:  # the dropped ones had batches to themselves
                assert torch.equal(found[name], wanted[name])
            assert_close(found[name], wanted[name], case.before[name], 2e-2)
    first = case.editor("memit", about, batch_size=1, steps=2).edit([edits[3], *good])
    assert first.delta.metadata["config"]["lr"] > 0  # of those that have states
    first.revert()
    with pytest.raises(EditError, match="no edit has a target"):
        case.editor("memit", about, batch_size=1, steps=2).edit([edits[1], edits[3]])
    assert equal(values(case.model), case.before)


class Interrupts:
    """Ctrl-C at the n-th update of a layer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
        update = LeastSquares.update
        self.left = at

        def counted(objective: LeastSquares, *args: Tensor) -> Any:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
            return update(objective, *args)

        monkeypatch.setattr(LeastSquares, "update", counted)


@pytest.mark.usefixtures("given")
def test_ctrl_c(case: Case, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    edits, about = random_edits(8, seed), METHODS["memit"]
    config: dict[str, Any] = {"batch_size": 2}
    plain = case.editor("memit", about, **config)
    plain.edit(edits[:4])
    wanted = values(case.model)
    plain.edit(edits[6:])
    later = values(case.model)

    def restart() -> None:
        case.model.load_state_dict(case.before, strict=False)

    for at, keep in ((6, False), (1, True), (2, True)):  # layers 0, 2 of batch 1, 0, 2 of batch 2, …
        restart()
        editor = case.editor("memit", about, **config, keep_partial=keep)
        with monkeypatch.context() as patch:
            Interrupts(patch, at)
            with pytest.raises(KeyboardInterrupt):
                editor.edit(edits)
        assert same(case.model, case.before)
    editor = case.editor("memit", about, **config, keep_partial=True)
    with monkeypatch.context() as patch:
        Interrupts(patch, 6)  # batch 3 has written layer 0
        result = editor.edit(edits)
    assert same(case.model, wanted)
    assert "interrupted; kept the first 4 edits" in result.notes
    more = editor.edit(edits[6:])  # preserves the keys of the four, and not of the batch that was left
    assert same(case.model, later)
    more.revert()
    result.revert()
    assert same(case.model, case.before)


def test_ctrl_c_where_no_batch_wrote_anything(
    tokenizer: Any, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(tokenizer, tmp_path, seed, dtype=torch.float32)
    break_token(case)
    moments(case.model, tmp_path, seed)
    edits = random_edits(2, seed)
    edits[0] = replace(edits[0], target="You w9")
    Interrupts(monkeypatch, 2)  # edit 0 is dropped, edit 1 has written layer 0
    with pytest.raises(KeyboardInterrupt):
        case.editor("memit", METHODS["memit"], batch_size=1, keep_partial=True, **SOUGHT).edit(edits)
    assert equal(values(case.model), case.before)
