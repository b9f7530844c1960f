"""The guide's page for users of other code: its examples run, before and after, and make the same call."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CONTEXTS, random_edits, same, tiny_model, values
from standins import EASYEDITOR, OTHERS, standing_in

from fastedit.compat import easyedit, memit

PAGE = Path(__file__).parents[2] / "docs" / "pages" / "compat.md"
HPARAMS: dict[str, Any] = {
    "alg_name": "MEMIT", "layers": [0, 2], "fact_token": "subject_last", "v_num_grad_steps": 3, "v_lr": 0.3,
    "v_loss_layer": 3, "v_weight_decay": 0.1, "clamp_norm_factor": 2, "kl_factor": 0.0625, "mom2_update_weight": 7.0,
    "rewrite_module_tmp": "model.layers.{}.mlp.down_proj", "L2": 3.0, "batch_size": 1,
}  # fmt: skip


def test_its_examples_run(tokenizer: Any, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, edits = tiny_model("llama"), random_edits(2, seed)
    monkeypatch.setattr(memit, "CONTEXT_TEMPLATES_CACHE", [["{}"], CONTEXTS])
    monkeypatch.setattr(
        memit, "COV_CACHE", {("", f"model.layers.{layer}.mlp.down_proj"): torch.eye(56) for layer in (0, 2)}
    )
    requests = [{"prompt": e.prompt, "subject": e.subject, "target_new": {"str": e.target}} for e in edits]
    scope: dict[str, Any] = {
        "prompts": [e.prompt for e in edits], "target_new": [e.target for e in edits],
        "subject": [e.subject for e in edits], "model": model, "tok": tokenizer, "requests": requests,
        "torch": torch, "samples": [(torch.tensor([[4, 9, 30, 31]]), torch.tensor([[-100, -100, 30, 31]]))],
        "batches": [requests], "P": torch.eye(56).expand(2, 56, 56), "cache_c": torch.zeros(2, 56, 56),
    }  # fmt: skip
    changed = []
    with standing_in(EASYEDITOR | OTHERS, tmp_path):
        import AlphaEdit  # type: ignore[import-not-found]
        import easyeditor  # type: ignore[import-not-found]
        import memit as theirs  # type: ignore[import-not-found]

        for package in (AlphaEdit, easyeditor, theirs):
            package.HPARAMS.update(HPARAMS | {"model_name": (model, tokenizer)})
        sys.modules["easyeditor.util.alg_dict"].ALG_DICT["MEMIT"] = lambda model, *_, **__: (model, {})
        try:
            for block in re.findall(r"^```python\n(.*?)^```", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL):
                before = values(model)
                block = block.replace('"./hugging_cache/llama-3-8b"', "(model, tok)").replace(
                    '"epochs": 25', '"epochs": 1'
                )
                exec(compile(block, str(PAGE), "exec"), scope)
                changed.append(not same(model, before))
        finally:
            easyedit.uninstall()
    # EasyEdit before and after (which takes its edit back), the block, LocFT-BF; the pairs of memit, AlphaEdit, loops
    assert changed == [False, False, False, True, False, True, False, True, True, True]
