"""Packed rows as a GPU takes them: their mask comes with them, and their length is a multiple of 8."""

from __future__ import annotations

import pytest
import torch
from helpers import FAMILIES, NoWait, ragged_samples, tiny_model

from fastedit.models import forward, pack, run_from_tokens, topology

SAMPLES = ragged_samples([9, 2, 18, 7, 3, 12, 30])
ALL = torch.arange(len(SAMPLES))
FULL = {"gpt2", "gpt_neox", "gpt_neox_sequential", "llama", "qwen3", "olmo2"}


@pytest.mark.parametrize("family", [*FAMILIES, "cohere2", "gemma4_text", "qwen3_5_text", "llama4_text"])
@torch.no_grad()
def test_a_mask_that_comes_with_the_rows_is_the_model_s_own(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit; also of models with windows that hold a row, and of those that no such mask is for."""
    parts = topology(tiny_model(family))
    if family == "llama4_text":
        monkeypatch.setattr(parts.config, "attention_chunk_size", 5)
    rows = pack(SAMPLES, ALL, packed=parts.packs)
    wanted = run_from_tokens(parts, rows)
    monkeypatch.setattr(forward, "_READY_MASKS", {"cpu"})
    assert torch.equal(run_from_tokens(parts, rows), wanted)
    if family in FULL or family == "cohere2":
        with NoWait():
            run_from_tokens(parts, rows)


@torch.no_grad()
def test_rows_are_rounded_up_by_pads() -> None:
    parts = topology(tiny_model("llama"))
    rows, rounded = (pack(SAMPLES, ALL[:-1], multiple=n) for n in (1, 8))
    assert rounded.index.shape == (len(rows.index), -(-rows.index.shape[1] // 8) * 8) != rows.index.shape
    for name in ("input_ids", "position_ids", "index"):
        flat = [getattr(some, name).view(-1)[some.token_rows] for some in (rows, rounded)]
        assert torch.equal(*flat)
    assert torch.equal(rows.labels, rounded.labels)
    torch.testing.assert_close(run_from_tokens(parts, rounded), run_from_tokens(parts, rows))
    assert pack(SAMPLES, ALL, packed=False, multiple=8).index.shape == (7, 29)  # it may be the model's context
