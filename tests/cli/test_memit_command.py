"""`fastedit edit --method memit`, and what help says of the flags of each method."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from calling import call
from helpers import moments, random_edits, same, tiny_model, values
from transformers import AutoModelForCausalLM

from fastedit import Editor
from fastedit.delta import WeightDelta
from fastedit.methods import LocateThenEditConfig


def test_the_command_line(tokenizer: Any, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model, edits = tiny_model("llama"), random_edits(4, seed)
    checkpoint, requests, output = tmp_path / "model", tmp_path / "edits.json", tmp_path / "edited"
    model.save_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)
    requests.write_text(json.dumps([{"prompt": e.prompt, "target": e.target, "subject": e.subject} for e in edits]))
    records = json.loads(requests.read_text())
    records[3]["subject"] = "w9 w9 w9"
    (wrong := tmp_path / "wrong.json").write_text(json.dumps(records))
    common = ("edit", "--model", checkpoint, "--requests", requests, "--output", output)
    memit = ("--method", "memit", "--layers", "0,1", "--steps", 3, "--batch-size", 2, "--contexts", "w20 {},w21 . {}")

    for text, arguments in (
        ("no statistics of down_proj in layers 0,1 ", memit),
        (f"fastedit covariance --model {checkpoint} --text FILE --layers 0,1", memit),
        ("layers ends with 3, the last block", (*memit, "--layers", 3)),
        ("expected INT,…, got 'low'", (*memit, "--layers", "low")),
        ("memit has no field 'epochs'", (*memit, "--epochs", 1)),
        ("objective", (*memit, "--objective", "best")),
        ("edit 3: the subject 'w9 w9 w9' is not in the prompt", (*memit, "--requests", wrong)),
    ):
        with monkeypatch.context() as patch:
            patch.setattr("fastedit.cli.arguments.measure", lambda *_: pytest.fail("the model was measured"))
            result = call(*common, *arguments)
        assert result.exit_code == 2
        assert result.stderr.splitlines()[-1].startswith("fastedit: ")
        assert text in result.stderr.splitlines()[-1]
        assert not output.exists()

    moments(model, checkpoint / "statistics", seed)  # where an edit looks by itself
    result = call(*common, *memit)
    assert result.exit_code == 0, result.stderr
    assert "memit: cov_weight 112 (no preset for this model: 2 times the key width)" in result.stderr
    config: dict[str, Any] = {"layers": (0, 1), "steps": 3, "batch_size": 2, "contexts": ("w20 {}", "w21 . {}")}
    editor = Editor.from_pretrained(checkpoint, "memit", **config)
    wanted = editor.edit(requests)
    assert same(AutoModelForCausalLM.from_pretrained(output), values(editor.model))
    report = json.loads((output / "report.json").read_text())
    assert report["edit"]["method"] == "memit"
    assert report["edit"]["config"] == json.loads(json.dumps(wanted.delta.metadata["config"]))
    assert report["edit"]["losses"] == wanted.losses
    assert report["edit"]["notes"] == wanted.notes
    delta = WeightDelta.load(output / "delta.safetensors")
    wanted.revert()
    delta.apply(editor.model)
    assert same(AutoModelForCausalLM.from_pretrained(output), values(editor.model))


def test_help_tells_each_method_what_a_flag_means_to_it() -> None:
    """Flags that LocFT-BF has too, and those of its own; `locate` runs LocFT-BF only."""
    words = " ".join(call("edit", "--help", COLUMNS="250").stdout.replace("│", " ").split())
    alone, ours = words.split("Configuration of several methods")[1].split("Configuration of rome, memit, emmet")
    for flag, of_locft_bf, of_ours in (
        ("--lr", "Adam's learning rate", "Adam's rate for a target"),
        ("--batch-size", "edits a step", "edits that are solved together"),
        ("--stop-loss", "stop after an epoch", "a target whose loss is below is done. (default 0.05)"),
        ("--keep-partial", "on Ctrl-C keep the last whole epoch", "on Ctrl-C keep the batches"),
    ):
        assert re.search(
            rf"{flag} .*locft-bf: {of_locft_bf}.* rome, memit, emmet, alphaedit: {re.escape(of_ours)}", alone
        )
    for field in fields(LocateThenEditConfig):
        flag = f"--{field.name.replace('_', '-')} "
        assert (flag in alone) != (flag in ours)
    help_of_locate = call("locate", "--help", COLUMNS="250").stdout
    assert "--cov-weight" not in help_of_locate
    assert "--epochs" in help_of_locate
