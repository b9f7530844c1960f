"""The flags of the commands: how they are given, and which are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from calling import call, fails, works

from fastedit import Editor, WeightDelta


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (["In Rome, she said: {}"], ("In Rome, she said: {}",)),
        (["In Rome, {}", "Yes, {}"], ("In Rome, {}", "Yes, {}")),
        (["Yes. {},No. {} Or?"], ("Yes. {}", "No. {} Or?")),  # as in version 0.1
    ],
)
def test_contexts_are_given_once_for_each(
    model: Path, facts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: list[str], meant: tuple[str, ...]
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(Editor, "from_pretrained", lambda *_, **config: seen.append(config) or 1 / 0)
    flags = [word for text in given for word in ("--contexts", text)]
    common = ("edit", "--model", model, "--requests", facts, "--output", tmp_path / "o", "--no-evaluate")
    call(*common, "--method", "memit", *flags)
    (config,) = seen
    assert config["contexts"] == meant
    call(*common, "--method", "memit")
    assert "contexts" not in seen[1]
    call(*common, "--anchor-subjects", "Washington, D.C.", "--anchor-subjects", "Rome")
    assert seen[2]["anchor_subjects"] == ("Washington, D.C.", "Rome")


@pytest.mark.parametrize("flags", [("--evaluate",), ("--evaluate", "--dtype", "float32"), ("--evaluate", "all")])
def test_evaluate_may_stand_without_a_value(flags: tuple[str, ...], tmp_path: Path) -> None:
    """As it did in 0.1: what follows it is not taken for one."""
    missing = tmp_path / "nowhere.json"
    said = fails(2, "edit", "--model", tmp_path, "--requests", missing, "--output", tmp_path / "edited", *flags)
    assert "nowhere.json" in said


def test_evaluate_without_a_value_says_its_new_spelling(tmp_path: Path) -> None:
    common = ("--model", tmp_path, "--requests", tmp_path / "nowhere.json")
    for command in (("edit", "--output", tmp_path / "o"), ("evaluate",), ("ledger", "add", tmp_path / "l")):
        said = "--evaluate without a value is an old spelling of --evaluate all"
        assert said in call(*command, *common, "--evaluate").stderr
        assert said not in call(*command, *common, "--evaluate", "all").stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--layers", "3"], "blocks 0 to 2"),
        (["--layers", "-1"], "blocks 0 to 2"),
        (["--module", "experts"], "choose one of down_proj, up_proj, gate_proj"),
        (["--lr", "fast"], "expected FLOAT, got 'fast'"),
        (["--lr", "-1"], "positive learning rate"),
        (["--batch-size", "0"], "at least 1"),
        (["--schedule", "sideways"], "breadth-first|depth-first"),
        (["--method", "memoir"], "known methods: locft-bf"),
        (["--lrr", "1"], "No such option"),
        (["--seed", "9" * 20], "'--seed': expected INT of at most 9223372036854775807"),
        (["--batch-size", "9" * 20], "'--batch-size': expected INT of at most"),
        (["--method", "memit", "--targets", "/proc"], "/proc cannot be written"),
        (["--output", "{facts}/out/deep"], "{facts}/out/deep cannot be written: {facts} is a file"),
        (["--dtype", "int3"], "--dtype"),
        (["--device", "gpu9"], "device is 'gpu9', which cannot be used"),
        (["--text", "nowhere.txt"], "nowhere.txt: cannot be read"),
    ],
)
def test_bad_flags_are_refused_before_any_work(
    model: Path,
    facts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    message: str,
) -> None:
    needs_model = flags[0] in ("--layers", "--module", "--device")
    work = ("fastedit.cli.arguments.measure",) if needs_model else (Editor, "from_pretrained")
    monkeypatch.setattr(*work, None)
    output = tmp_path / "deep" / "out"
    flags, message = [flag.replace("{facts}", str(facts)) for flag in flags], message.replace("{facts}", str(facts))
    assert message in fails(2, "edit", "--model", model, "--requests", facts, "--output", output, *flags)
    assert not output.parent.exists()


def test_bad_usage() -> None:
    assert "Missing option '--model'" in fails(2, "evaluate")
    assert "No such command" in fails(2, "unlearn")
    assert "No such option: --bogus" in fails(2, "--bogus")


@pytest.mark.parametrize("flag", ["--layers", "--layer"])
def test_blocks_are_layers_in_every_command(model: Path, facts: Path, tmp_path: Path, flag: str) -> None:
    common = ("edit", "--model", model, "--requests", facts, "--output", tmp_path / "o", "--no-evaluate", "--epochs", 1)
    said = works(*common, flag, "1").stderr
    assert ("--layer is an old spelling of --layers" in said) == (flag == "--layer")
    assert WeightDelta.load(tmp_path / "o" / "delta.safetensors").metadata["config"]["layer"] == 1
    works(*common, flag, "1-2")
    assert WeightDelta.load(tmp_path / "o" / "delta.safetensors").metadata["config"]["layer"] == [1, 2]
    (tmp_path / "text").write_text("The king of Gaul is old.")
    collect = ("covariance", "--text", tmp_path / "text", "--output", tmp_path / "c", "--layers", "1")
    assert "written to" in works(*collect, "--model", model).stdout
    again = works(*collect, model)
    assert "there already" in again.stdout
    assert f"a model without --model is an old spelling of --model {model}" in again.stderr
    assert "old spelling" not in works(*collect, "--model", model).stderr
    assert "[model]" not in works("covariance", "--help").stdout
    assert "Missing option '--model'" in fails(2, *collect)
