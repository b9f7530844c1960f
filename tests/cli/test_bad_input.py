"""Requests, texts and models that cannot be used: what each command says of them, and that it writes nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from calling import call, fails
from capitals import save, write
from transformers import AutoConfig, AutoTokenizer

from fastedit import Editor


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (b"", "it is empty"),
        (b"[]", "the array is empty"),
        (b'[{"prompt": "a", "target": "b"}, {"pro', "record 1"),
        (b'[{"prompt": "caf\xe9", "target": "b"}]', "not UTF-8"),
        (b'[{"target": "b"}]', "lacks prompt"),
        (b'[{"prompt": "a"}]', "lacks target"),
        (b'[{"prompt": "a", "target": " "}]', "field 'target' is missing or empty"),
        (b'[{"question": "a", "response": "b"}]', "CounterFact"),
        (json.dumps([{"prompt": "far away " * 99, "target": "x", "id": "long"}]).encode(), "context of 64"),
    ],
)
@pytest.mark.parametrize("command", ["edit", "evaluate"])
def test_bad_requests(model: Path, tmp_path: Path, command: str, content: bytes | None, message: str) -> None:
    path = tmp_path / "bad.json"
    if content is not None:
        path.write_bytes(content)
    where = ["--output", tmp_path / "out"] if command == "edit" else ["--json", tmp_path / "out"]
    said = fails(2, command, "--model", model, "--requests", path, *where)
    assert message in said
    named = {"edit": "edit long", "evaluate": "request long"}[command]
    assert (named if b"long" in (content or b"") else str(path)) in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"", b" \n", b"caf\xe9"])
def test_bad_text(model: Path, facts: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "text").write_bytes(content)
    common = ("evaluate", "--model", model, "--requests", facts)
    assert str(tmp_path / "text") in fails(2, *common, "--text", tmp_path / "text")


@pytest.mark.parametrize("fault", ["missing", "truncated", "config", "shape", "tokenizer"])
def test_bad_model(spoiled: Path, facts: Path, fault: str) -> None:
    file = spoiled / "model.safetensors"
    if fault == "missing":
        shutil.rmtree(spoiled)
    elif fault == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif fault == "config":
        (spoiled / "config.json").write_text("{")
    elif fault == "shape":
        config = json.loads((spoiled / "config.json").read_text())
        write(spoiled / "config.json", config | {"intermediate_size": 48})
    else:
        for tokenizer in spoiled.glob("tokenizer*"):
            tokenizer.unlink()
    assert str(spoiled) in fails(2, "evaluate", "--model", spoiled, "--requests", facts)


def test_a_name_that_is_no_folder_and_a_folder_that_is_no_model_are_told_so(facts: Path, tmp_path: Path) -> None:
    common = ("evaluate", "--requests", facts, "--model")
    assert "no folder ./nope" in fails(2, *common, "./nope")
    assert "lacks config.json" in fails(2, *common, tmp_path)


def test_unsupported_architecture(model: Path, facts: Path, tmp_path: Path) -> None:
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 300}
    config = AutoConfig.for_model("bert", **small, intermediate_size=8, is_decoder=True)
    bert = save(config, AutoTokenizer.from_pretrained(model), tmp_path / "bert")
    assert "bert" in fails(2, "evaluate", "--model", bert, "--requests", facts)


def test_conflicts_are_told_before_any_work(tmp_path: Path) -> None:
    said = {"prompt": "The sky is", "target": "green"}
    path = write(tmp_path / "facts.json", [said, said, said | {"target": "pink"}])
    result = call("edit", "--model", tmp_path / "none", "--requests", path, "--output", tmp_path / "out")
    assert result.exit_code == 2
    conflicts, message = result.stderr[: (at := result.stderr.index("fastedit: "))], result.stderr[at:]
    assert "'green' (id 0, 1), 'pink' (id 2)" in conflicts
    assert "more than once" in conflicts
    assert str(tmp_path / "none") in message


@pytest.mark.parametrize("command", ["edit", "evaluate", "check", "locate", "tune"])
def test_bad_records_are_skipped_by_every_command_that_reads_requests(tmp_path: Path, command: str) -> None:
    path = write(tmp_path / "facts.json", [{"prompt": "The sky is", "target": t} for t in ["green", *[""] * 12]])
    output = ["--output", tmp_path / "out"] if command in ("edit", "tune") else []
    common = (command, "--model", tmp_path / "none", "--requests", path, *output)
    said = fails(2, *common)
    assert "12 records cannot be used: " in said
    assert "record 10 (counted from 0) and 2 more: field 'target' is missing" in said
    assert said.endswith("(--verbose lists them all)")
    assert "record 12 " not in said
    result = call(*common, "--verbose")
    assert "record 12 " in " ".join(result.stderr.split())
    assert "--verbose lists" not in result.stderr
    result = call(*common, "--skip-bad")
    assert result.exit_code == 2  # for want of a model, so that the requests were read
    assert "no folder" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("command", ["evaluate", "check", "locate"])
def test_conflicts_are_told_by_every_command_that_reads_requests(tmp_path: Path, command: str) -> None:
    said = {"prompt": "The sky is", "target": "blue", "true_target": "blue"}
    path = write(tmp_path / "facts.json", [said, said | {"target": "pink"}])
    result = call(command, "--model", "./none", "--requests", path)
    assert "more than one target" in result.stderr
    assert "1 edits have their true_target as target: id 0" in result.stderr
    assert "no folder" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("command", ["check", "covariance", "edit", "evaluate", "locate", "tune"])
def test_requests_are_not_read_as_text(
    model: Path, facts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setattr(Editor, "from_pretrained", None)
    given = ("--layers", 1) if command == "covariance" else ("--requests", facts)
    output = ("--output", tmp_path / "out") if command in ("edit", "tune") else ()
    said = fails(2, command, "--model", model, *given, "--text", facts, *output)
    assert f"{facts}: record 0 (counted from 0) has no text in the field 'text'; its fields are prompt, " in said
