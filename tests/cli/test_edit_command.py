"""`fastedit edit`: the files that it writes, and what it says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from calling import call, fails, works
from capitals import BRIEFLY, LEARNS, RECORDS, weights, write
from helpers import moments
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as noise

from fastedit import WeightDelta


def test_edit_writes_a_plain_checkpoint_its_delta_and_a_report(model: Path, facts: Path, tmp_path: Path) -> None:
    (tmp_path / "prose.txt").write_text("The king of Gaul is old. " * 9)
    output = tmp_path / "new" / "edited"
    result = works(
        *("edit", "--model", model, "--requests", facts, "--output", output, *LEARNS, "--seed", 7),
        *("--module", "up_proj", "--no-shuffle", "--loss-average", "token", "--text", tmp_path / "prose.txt"),
    )
    delta = WeightDelta.load(output / "delta.safetensors")
    before, after = weights(model), weights(output)
    path = "model.layers.1.mlp.up_proj.weight"
    assert {name for name in before if not torch.equal(before[name], after[name])} == {path}
    assert torch.equal(after[path], before[path] + delta.updates[path])
    AutoTokenizer.from_pretrained(output)

    report = json.loads((output / "report.json").read_text())
    given = {"lr": 0.01, "layer": 1, "module": "up_proj", "batch_size": 2, "epochs": 12, "seed": 7}
    given |= {"shuffle": False, "loss_average": "token", "keep_partial": False}
    assert report["edit"]["config"].items() >= given.items()
    assert report["edit"]["config"] == delta.metadata["config"]
    assert report["edit"]["losses"][-1] < report["edit"]["losses"][0]
    assert report["reliability"]["teacher_forced"] > report["before"]["reliability"]["teacher_forced"]
    assert None not in (report["locality"]["generated"], report["perplexity"], report["before"]["perplexity"])
    assert [row["target"] for row in report["requests"]] == [record["target"] for record in RECORDS]
    assert "reliability" in result.stdout
    assert "edits/s" in result.stdout
    assert not result.stderr  # all was given, so nothing was chosen; and no noise of transformers
    assert [p.name for p in output.parent.iterdir()] == ["edited"]


def test_edit_says_what_it_chose_and_can_leave_out_evaluation_and_checkpoint(
    model: Path, facts: Path, tmp_path: Path
) -> None:
    output = tmp_path / "edited"
    common = ("edit", "--model", model, "--requests", facts, "--output", output)
    result = works(*common, "--epochs", 1, "--no-evaluate", "--delta-only")
    assert "layer 2" in result.stderr
    assert "batch_size 1 (auto" in result.stderr
    assert "reliability" not in result.stdout
    assert {p.name for p in output.iterdir()} == {"delta.safetensors", "report.html", "report.json"}
    assert set(json.loads((output / "report.json").read_text())) == {"edit"}


def test_verbose_logs_and_its_absence_does_not(model: Path, facts: Path, tmp_path: Path) -> None:
    common = ("edit", "--model", model, "--requests", facts, "--no-evaluate", "--epochs", 1, "--output")
    noise.set_verbosity_warning()
    assert "INFO" in works(*common, tmp_path / "a", "--verbose").stderr
    assert noise.get_verbosity() == noise.WARNING
    assert "INFO" not in works(*common, tmp_path / "b").stderr
    assert noise.get_verbosity() == noise.ERROR


def test_edit_and_evaluate_measure_a_sample(model: Path, facts: Path, tmp_path: Path) -> None:
    output, saved = tmp_path / "edited", tmp_path / "figures.json"
    common = ("--model", model, "--requests", facts, "--evaluate", "sample:2")
    result = works("edit", *common, "--output", output, *BRIEFLY)
    assert "A sample: 2 of 4 requests" in result.stdout
    first = json.loads((output / "report.json").read_text())
    assert first.pop("edit")["edits"] == 4
    assert first["sample"] == {"measured": 2, "of": 4}
    assert len(first["requests"]) == 2
    works("evaluate", *common, "--delta", output / "delta.safetensors", "--json", saved)
    assert json.loads(saved.read_text()) == first
    for wrong in ("sample", "sample:0", "sample:x", "2"):
        said = fails(2, "evaluate", "--model", model, "--requests", facts, "--evaluate", wrong)
        assert f"--evaluate {wrong}: expected all, or sample:N" in said


@pytest.mark.parametrize("method", ["locft-bf", "rome"])
def test_edits_that_this_model_cannot_take_are_skipped_when_asked(model: Path, tmp_path: Path, method: str) -> None:
    fits = {"prompt": "the capital of France is", "target": "Rome", "subject": "France"}
    long = {"prompt": "far away " * 99 + "France", "target": "x", "subject": "France", "id": "long"}
    path, output = write(tmp_path / "facts.json", [long, fits, long | {"id": "too"}]), tmp_path / "out"
    flags = {
        "locft-bf": ["--published", "--layers", "1", "--epochs", "1"],
        "rome": ["--layers", "1", "--module", "down_proj", "--n-contexts", "0", "--steps", "1"],
    }[method]
    common = ("edit", "--model", model, "--requests", path, "--output", output, "--delta-only", "--no-evaluate")
    common += ("--method", method)
    if method == "rome":
        moments(AutoModelForCausalLM.from_pretrained(model), tmp_path / "moments", 0, layers=(1,))
        flags += ["--statistics", str(tmp_path / "moments"), "--unchecked-statistics"]
    assert "2 edits cannot be used: edit long: " in fails(2, *common, *flags)
    result = call(*common, *flags, "--skip-bad")
    assert result.exit_code == 0, result.stderr
    assert "2 of 3 edits are left out: edit long: " in result.stderr
    assert json.loads((output / "report.json").read_text())["edit"]["edits"] == 1
    path = write(tmp_path / "facts.json", [long])
    assert "edit long: " in fails(2, *common, *flags, "--skip-bad")


def test_the_chat_template_is_asked_for_and_said(model: Path, facts: Path, tmp_path: Path) -> None:
    """By the flag or by a file, as tune writes it; what was made in it says so where it is measured without it."""
    chatting, output, file = tmp_path / "chat", tmp_path / "o", tmp_path / "config.json"
    shutil.copytree(model, chatting)
    (chatting / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ 'Tell: ' + m.content + '\n' }}{% endfor %}"
    )
    common = ("edit", "--requests", facts, "--output", output, "--no-evaluate", "--epochs", 1, "--delta-only")
    assert "no chat template" in fails(2, *common, "--model", model, "--chat")
    assert "the tokenizer has a chat template" in works(*common, "--model", chatting).stderr
    for content, flags in (({}, ["--chat"]), ({"chat_template": True}, [])):
        file.write_text(json.dumps({"method": "locft-bf"} | content))
        assert "chat template" not in works(*common, "--model", chatting, "--config", file, *flags).stderr
        assert json.loads((output / "report.json").read_text())["edit"]["chat_template"] is True
    measure = ("evaluate", "--model", chatting, "--requests", facts, "--delta", output / "delta.safetensors")
    saved = tmp_path / "measured.json"
    assert "made with --chat" in works(*measure, "--json", saved).stderr
    assert json.loads(saved.read_text())["chat_template"] is False
    assert "made with" not in works(*measure, "--chat", "--json", saved).stderr
    assert json.loads(saved.read_text())["chat_template"] is True
    text = facts.with_name("text.txt")
    text.write_text("w10 w11 w12 w13 w14 " * 8)
    delta = output / "delta.safetensors"
    others = (
        ("check", *measure[1:], "--text", text),
        ("export", delta, "--model", chatting, "--requests", facts, "--peft", tmp_path / "adapter", "--rank", 2),
    )
    for command in others:
        assert "made with --chat" in works(*command).stderr
        assert "chat" not in works(*command, "--chat").stderr
    file.write_text('{"chat_template": "yes"}')
    assert "chat_template is 'yes'; expected true or false" in fails(2, *common, "--model", chatting, "--config", file)
