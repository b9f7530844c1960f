"""The command line: what its files and lines hold, its exit codes, and what a failure leaves."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from calling import call, fails, works
from helpers import moments
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as noise

import fastedit.demo
from fastedit import ConfigError, EditError, Editor, FileError, ModelError, RequestError, WeightDelta, cli, methods
from fastedit.cli import arguments
from fastedit.cli.bars import Bars
from fastedit.configs import option
from fastedit.methods import LocFTBFConfig

RECORDS: list[dict[str, Any]] = [
    {
        "prompt": f"The capital of {land} is",
        "target": city,
        "paraphrases": [f"{land}'s capital is"],
        "neighbours": [[f"The money of {land} is", "gold"]],
        "portability": [[f"The river of {land}'s capital is", "Po"]],
    }
    for land, city in (("Gaul", "Rome"), ("Elam", "Bonn"), ("Moab", "Oslo"), ("Edom", "Lima"))
]
LEARNS = ["--lr", "0.01", "--layers", "1", "--batch-size", "2", "--epochs", "12"]
BRIEFLY = [*LEARNS, "--epochs", "2"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with 3 blocks and a byte-level BPE, as a checkpoint."""
    bpe = Tokenizer(BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        [r["prompt"] for r in RECORDS],
        trainers.BpeTrainer(
            vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.15,
        bos_token_id=0,
        eos_token_id=1,
    )
    return save(config, tokenizer, tmp_path_factory.mktemp("cli") / "model")


def save(config: Any, tokenizer: Any, path: Path) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def facts(tmp_path: Path) -> Path:
    return write(tmp_path / "facts.json", RECORDS)


def write(path: Path, records: Any) -> Path:
    path.write_text(json.dumps(records))
    return path


def weights(path: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = AutoModelForCausalLM.from_pretrained(path).state_dict()
    return state


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


def test_every_field_of_a_config_is_a_flag_with_its_help(
    model: Path, facts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = works("edit", "--help", COLUMNS="200").stdout
    for field in fields(LocFTBFConfig):
        assert f"--{field.name.replace('_', '-').replace('layer', 'layers')} " in text
    text = " ".join(text.split())
    assert "a batch whose loss is below does no backward pass" in text
    assert "α that stabilizes equality. By default 0 for rome and 0.1 for the others." in text
    assert "The same command again continues from there, and ends" in text  # as one line, whatever the source has

    seen = []

    @dataclass(frozen=True)
    class Toy:
        """A method to come."""

        seed: int = option(0, "of everything.")
        layers: tuple[int, ...] = option((1, 2), "the blocks that it edits.")
        mode: Literal["a", "b"] = "a"
        fast: bool | None = option(None, "does less.", unset="True")

    class ToyMethod(methods.Method):
        def plan(self, model: Any, edits: Any, config: Any, **_: Any) -> Any:
            seen.append(config)
            raise KeyboardInterrupt

    monkeypatch.setitem(methods.METHODS, "toy", ToyMethod(Toy, ""))
    monkeypatch.setattr(cli, "app", cli.make_app())
    help_text = " ".join(works("edit", "--help", COLUMNS="200").stdout.split())
    assert "the blocks that it edits. (default (1, 2)) Such as 4-8 or" in help_text
    assert "does less. By default True." in help_text
    common = ("edit", "--model", model, "--requests", facts, "--output", tmp_path / "o", "--no-evaluate")
    fails(1, *common, "--method", "toy", "--layers", "0,2-3", "--mode", "b", "--no-fast")
    fails(1, *common, "--method", "toy")
    assert seen == [Toy(layers=(0, 2, 3), mode="b", fast=False), Toy()]
    assert "expected INT,…, got '1,x'" in fails(2, *common, "--method", "toy", "--layers", "1,x")
    assert "expected a|b, got 'c'" in fails(2, *common, "--method", "toy", "--mode", "c")
    assert "toy has no field 'lr'" in fails(2, *common, "--method", "toy", "--lr", "1")


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


def test_evaluate_with_a_delta_measures_what_edit_measured(model: Path, facts: Path, tmp_path: Path) -> None:
    output, saved = tmp_path / "edited", tmp_path / "figures.json"
    works("edit", "--model", model, "--requests", facts, "--output", output, *BRIEFLY)
    common = ("evaluate", "--requests", facts, "--json", saved)
    table = works(*common, "--model", model, "--delta", output / "delta.safetensors").stdout
    first = json.loads((output / "report.json").read_text())
    del first["edit"]
    assert json.loads(saved.read_text()) == first
    assert "locality" in table

    works(*common, "--model", output)
    alone = json.loads(saved.read_text())
    assert alone["reliability"] == first["reliability"]
    assert alone["locality"] == {"teacher_forced": None, "generated": None}
    message = fails(2, *common, "--model", output, "--delta", output / "delta.safetensors")
    assert "fingerprint" in message


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


def test_a_message_of_several_lines_is_one_line(model: Path, facts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ModelError("the first line\nand the second")

    monkeypatch.setattr(Editor, "from_pretrained", broken)
    said = fails(2, "evaluate", "--model", model, "--requests", facts)
    assert "the first line and the second" in said


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


@pytest.mark.parametrize("broken", [False, True])
def test_demo_measures_before_and_after_and_takes_the_edit_back(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: bool
) -> None:
    monkeypatch.setattr(fastedit.demo, "checkpoint_path", lambda: model)
    monkeypatch.setattr(fastedit.demo.World, "prose", lambda self, n: ["The king was old."] * n)
    asked: list[Any] = []

    def questions(world: Any, phrasings: str, known: Any) -> Any:
        asked.extend(known)
        return [("The sky is", "blue"), ("The sea is", "blue")]

    monkeypatch.setattr(fastedit.demo.World, "questions", questions)
    if broken:
        monkeypatch.setattr(WeightDelta, "revert", lambda self: None)
        result = call("demo", "--n", 1)
        assert result.exit_code == 1
        assert "revert did not restore" in result.stderr
        return
    result = works("demo", "--n", 2, "--output", tmp_path / "edited")
    for words in ("portability", "perplexity", "facts not edited  ", "of 2 questions", "of 2 edits learned in"):
        assert words in result.stdout
    edited = {request.subject for request in fastedit.demo.World().requests(2)}
    assert len(asked) > 10_000
    assert not edited & {fact.subject for fact in asked}
    assert "all weights restored, bit for bit" in result.stdout
    assert (tmp_path / "edited" / "model.safetensors").exists()
    assert "2000 people" in fails(2, "demo", "--n", 2001)


def test_demo_without_its_model_says_how_to_train_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastedit.demo, "checkpoint_path", lambda: tmp_path)
    assert f"python -m fastedit.demo.train --output {tmp_path}" in fails(2, "demo")


def test_locate_tries_the_places_it_is_told(model: Path, facts: Path, tmp_path: Path) -> None:
    picture, saved = tmp_path / "heat.png", tmp_path / "located.json"
    common = ("locate", "--model", model, "--requests", facts, "--sample", 2, "--epochs", 1)
    files = ("--picture", picture, "--json", saved, "--capability", facts)
    result = works(*common, "--blocks", "0,1-2", "--modules", "down_proj,up_proj", "--lr", 1e-3, *files)
    cells = json.loads(saved.read_text())["cells"]
    places = [(cell["block"], cell["module"]) for cell in cells]
    assert places == [(block, module) for block in range(3) for module in ("down_proj", "up_proj")]
    assert {cell["lr"] for cell in cells} == {1e-3}
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert json.loads(saved.read_text())["before"]["accuracy"] is not None
    assert "up_proj" in result.stdout
    assert "blocks 0 to 2" in fails(2, *common, "--blocks", "2-3")
    assert "expected numbers and ranges" in fails(2, *common, "--blocks", "3-1")


def test_check_model_tells_what_was_found_and_what_differs(model: Path, tmp_path: Path) -> None:
    text = works("check-model", model).stdout
    assert text == works("check-model", "--model", model).stdout
    assert "this model can be edited" in text
    for words in ("LlamaForCausalLM (llama), 3 blocks", "down_proj mlp.down_proj", "share rows", "logits", "gradient"):
        assert words in text
    assert "locft-bf" in text
    assert "memit" in text

    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    byte_level = AutoTokenizer.from_pretrained(model)
    routed = save(AutoConfig.for_model("mixtral", **sizes | heads), byte_level, tmp_path / "mixtral")
    text = " ".join(works("check-model", routed).stdout.split())
    assert "have a row each" in text
    assert text.count("not with its defaults: model.layers.") == len(methods.METHODS)
    assert "experts" in text

    mamba = save(AutoConfig.for_model("mamba", **sizes), byte_level, tmp_path / "mamba")
    assert "(mamba) has no attention and MLP that can be told apart" in fails(1, "check-model", mamba)
    assert "give the folder" in fails(2, "check-model")


def test_env_tells_versions_and_backends() -> None:
    text = works("env").stdout
    assert torch.__version__ in text
    assert "ops.target_cross_entropy" in text


def test_progress_shows_speed_loss_and_time_left(model: Path, facts: Path, tmp_path: Path) -> None:
    common = ("edit", "--model", model, "--requests", facts, "--output", tmp_path / "o", *LEARNS)
    env = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "COLUMNS": "160"}
    lines = works(*common, **env, FORCE_COLOR="1").stderr
    for words in ("before: answers", "training", " edits/s", "loss ", "after: generation"):
        assert words in lines
    first = json.loads((tmp_path / "o" / "report.json").read_text())
    assert "before: " not in works(*common, **env, FORCE_COLOR="1").stderr  # the unedited model is measured once
    again = json.loads((tmp_path / "o" / "report.json").read_text())
    assert {**again, "edit": None} == {**first, "edit": None}
    assert not works(*common, **env).stderr.count("edits/s")  # no terminal, no bars


def test_speed_and_time_left(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "160")
    clock = iter([0.0, 0.0, 4.0, 10.0, 30.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    with Bars() as bars:
        report = bars.callback("", n_edits=200)
        report("prefix", 200, 200)  # from 0 to 4 s
        report("train", 1, 20, 2.5)  # from 4 to 10 s: 10 of 200 edits are through
        report("train", 5, 20, 1.25)  # to 30 s: 50 edits in 26 s; 78 s are left
    final = capsys.readouterr().err.split("\r")[-1]
    assert "50 edits/s" in final
    assert "1.92 edits/s loss 1.25 1:18 left" in final


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


@pytest.mark.parametrize("content", [b"", b" \n", b"caf\xe9"])
def test_bad_text(model: Path, facts: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "text").write_bytes(content)
    common = ("evaluate", "--model", model, "--requests", facts)
    assert str(tmp_path / "text") in fails(2, *common, "--text", tmp_path / "text")


@pytest.fixture
def spoiled(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "spoiled"))


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


@pytest.mark.parametrize("command", ["evaluate", "check", "locate"])
def test_conflicts_are_told_by_every_command_that_reads_requests(tmp_path: Path, command: str) -> None:
    said = {"prompt": "The sky is", "target": "blue", "true_target": "blue"}
    path = write(tmp_path / "facts.json", [said, said | {"target": "pink"}])
    result = call(command, "--model", "./none", "--requests", path)
    assert "more than one target" in result.stderr
    assert "1 edits have their true_target as target: id 0" in result.stderr
    assert "no folder" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("given", ["--model", "--requests", "--text", "--statistics", "--targets"])
def test_an_output_that_holds_an_input_is_refused_before_any_work(
    spoiled: Path, model: Path, facts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    monkeypatch.setattr(Editor, "from_pretrained", None)
    (tmp_path / "prose.txt").write_text("words")
    (tmp_path / "statistics").mkdir()
    sources = {"--model": model, "--requests": facts, "--text": tmp_path / "prose.txt"}
    if given in ("--statistics", "--targets"):
        sources |= {"--method": "memit", "--statistics": tmp_path / "statistics", "--targets": tmp_path / "targets"}
    within = spoiled / "checkpoint-5" / "input"
    if given == "--model":
        shutil.copytree(model, within)
    elif given in ("--requests", "--text"):
        within.parent.mkdir()
        shutil.copy(sources[given], within)
    before = sorted(tmp_path.rglob("*"))
    flags = [word for pair in (sources | {given: within}).items() for word in pair]
    said = fails(2, "edit", "--output", spoiled, *flags)
    assert f"{spoiled} would be replaced, and " in said
    assert f"{given[2:]} {within} is inside it" in said
    assert sorted(tmp_path.rglob("*")) == before


def test_demo_does_not_replace_a_folder_around_its_model(
    model: Path, spoiled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(model, spoiled / "inside")
    monkeypatch.setattr(fastedit.demo, "checkpoint_path", lambda: spoiled / "inside")
    assert "the model" in fails(2, "demo", "--n", 1, "--output", spoiled)
    assert (spoiled / "inside" / "config.json").exists()


def test_files_do_not_replace_what_a_command_reads_nor_one_another(
    spoiled: Path, facts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Editor, "from_pretrained", None)
    (delta := tmp_path / "delta.safetensors").touch()
    (link := tmp_path / "link").symlink_to(facts)
    common = ("--model", spoiled, "--requests", facts)
    for path, what in (
        (facts, "is the input of --requests"),
        (link, "is the input of --requests"),
        (delta, "is the input of --delta"),
        (spoiled / "model.safetensors", f"is a part of the model {spoiled}"),
    ):
        before = path.read_bytes()
        said = fails(2, "evaluate", *common, "--delta", delta, "--json", path)
        assert f"{path} {what}; give another" in said
        assert path.read_bytes() == before
    assert "is a part of the model" in fails(2, "locate", *common, "--picture", spoiled / "config.json")
    known = write(tmp_path / "known.json", RECORDS)
    assert "input of --capability" in fails(2, "locate", *common, "--capability", known, "--picture", known)
    assert "is the output of --picture" in fails(2, "locate", *common, "--picture", "new", "--json", "./new")
    assert f"{facts} is a file" in fails(2, "evaluate", *common, "--json", facts / "x")
    assert f"{tmp_path} is a folder; give its file" in fails(2, "evaluate", *common, "--delta", tmp_path)


@pytest.mark.parametrize("kind", ["folder", "file", "below a file", "the model"])
def test_an_output_that_cannot_be_is_refused_before_any_work(
    model: Path, facts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(Editor, "from_pretrained", None)  # the work
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("words")
    places = {
        "folder": tmp_path / "mine",
        "file": tmp_path / "mine" / "thesis.tex",
        "below a file": tmp_path / "mine" / "thesis.tex" / "out",
        "the model": model,
    }
    said = fails(2, "edit", "--model", model, "--requests", facts, "--output", places[kind])
    assert str(places[kind]) in said
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.tex"]
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "words"


def test_a_folder_where_a_file_is_to_be_written(facts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Editor, "from_pretrained", None)
    common = ("--model", "none", "--requests", facts)
    assert "is a folder" in fails(2, "evaluate", *common, "--json", tmp_path)
    assert "is a folder" in fails(2, "locate", *common, "--picture", tmp_path)


def test_an_older_checkpoint_is_replaced(model: Path, facts: Path, spoiled: Path) -> None:
    (spoiled / "old").touch()
    works("edit", "--model", model, "--requests", facts, "--output", spoiled, "--no-evaluate", *BRIEFLY)
    assert not (spoiled / "old").exists()
    assert (spoiled / "delta.safetensors").exists()
    assert {path.name for path in spoiled.parent.iterdir()} == {"facts.json", "spoiled"}


def test_an_older_delta_is_replaced(model: Path, facts: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    common = ("edit", "--model", model, "--requests", facts, "--output", output, "--no-evaluate", "--delta-only")
    works(*common, *BRIEFLY)
    works(*common, *BRIEFLY, "--seed", 5)
    assert WeightDelta.load(output / "delta.safetensors").metadata["config"]["seed"] == 5
    (output / "notes.txt").touch()
    assert "is not a checkpoint" in fails(2, *common, *BRIEFLY)


def test_a_loss_that_is_not_finite(model: Path, facts: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    common = ("edit", "--model", model, "--requests", facts, "--output", output, "--lr", "1e38")
    said = fails(1, *common)
    assert "not finite" in said
    assert "epoch 1, batch " in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["facts.json"]


@contextmanager
def small_files() -> Iterator[None]:
    """No file may grow past 4 KiB, so that writing fails in the middle, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(("flags", "code"), [([], 2), (["--delta-only"], 1)])
@pytest.mark.parametrize("existing", [False, True])
def test_a_disk_that_fills_up(
    model: Path, spoiled: Path, facts: Path, tmp_path: Path, flags: list[str], code: int, existing: bool
) -> None:
    """The parts of a checkpoint that are not weights are tried before the work; of a delta only the work tells."""
    output = spoiled if existing else tmp_path / "out"
    if existing and flags:  # which replaces no checkpoint
        shutil.rmtree(output)
        output.mkdir()
        for name in ("delta.safetensors", "report.json"):
            (output / name).touch()
    before = sorted(tmp_path.rglob("*"))
    common = ("edit", "--model", model, "--requests", facts, "--output", output, *BRIEFLY, "--no-evaluate")
    with small_files():
        said = fails(code, *common, *flags)
    assert "could not be saved" in said
    assert code == 2 or said.endswith("; nothing was written")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("file", ["report.json", "figures.json"])
def test_a_disk_that_is_full(
    model: Path, facts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    def full(self: Path, *args: Any, **kwargs: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))

    monkeypatch.setattr(Path, "write_text", full)
    edit = ("edit", "--output", tmp_path / "out", "--no-evaluate", *BRIEFLY)
    command = edit if file == "report.json" else ("evaluate", "--json", tmp_path / file)
    result = call(*command, "--model", model, "--requests", facts)
    assert result.exit_code == 1
    assert "No space left on device" in result.stderr
    if file == "report.json":  # the delta had room
        assert f"{tmp_path / 'out'} holds delta.safetensors, but" in result.stderr
        assert [p.name for p in (tmp_path / "out").iterdir()] == ["delta.safetensors"]
    assert {p.name for p in tmp_path.iterdir()} <= {"facts.json", "out"}


def raises(error: BaseException) -> Any:
    def function(*_: Any, **__: Any) -> None:
        raise error

    return function


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
REFUSAL = ValueError("GenerationConfig is invalid: \n- `temperature`: `do_sample` is not set to `True`.")
# what fails after the edit: where, with what, and what is said
LATE: dict[str, tuple[str, BaseException, str]] = {
    "disk full at the checkpoint": ("weights", FULL, "could not be saved: [Errno 28] No space left on device; "),
    "checkpoint refused": ("weights", REFUSAL, "could not be saved: GenerationConfig is invalid: - `temperature`"),
    "Ctrl-C at the checkpoint": ("weights", KeyboardInterrupt(), "interrupted; "),
    "measuring fails": ("after", EditError("the logits of request 1 are NaN"), "are NaN; "),
    "no memory for measuring": ("after", RuntimeError("CUDA out of memory"), "CUDA out of memory; "),
    "Ctrl-C at measuring": ("after", KeyboardInterrupt(), "interrupted; "),
    "report fails": ("compare", ZeroDivisionError("division by zero"), "division by zero; "),
}


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The weights of an edit that nothing disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    common = ("edit", "--model", model, "--requests", write(folder / "facts.json", RECORDS), "--no-evaluate")
    works(*common, *BRIEFLY, "--output", folder / "out")
    return weights(folder / "out")


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("kind", LATE)
def test_what_fails_after_the_edit_does_not_lose_it(
    model: Path,
    spoiled: Path,
    facts: Path,
    whole: dict[str, torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    existing: bool,
) -> None:
    """Delta and report are in the folder that is named, an older checkpoint stays, and the delta is the edit."""
    where, error, message = LATE[kind]
    output = spoiled if existing else tmp_path / "out"
    place = tmp_path / "spoiled.delta" if existing else output
    before = {path.name: path.read_bytes() for path in spoiled.iterdir()}
    plain, measure = LlamaForCausalLM.save_pretrained, arguments.measure

    def save_weights(self: Any, folder: Any, **how: Any) -> None:
        if Path(folder).name == "new":  # not the trial before the edit
            raise error
        plain(self, folder, **how)

    def measured(*args: Any, **how: Any) -> Any:
        if args[-1] == "after":
            raise error
        return measure(*args, **how)

    patches: dict[str, tuple[Any, ...]] = {
        "weights": (LlamaForCausalLM, "save_pretrained", save_weights),
        "after": (arguments, "measure", measured),
        "compare": ("fastedit.evaluation.report.compare", raises(error)),
    }
    with monkeypatch.context() as patch:
        patch.setattr(*patches[where])
        common = ("edit", "--model", model, "--requests", facts, *BRIEFLY)
        said = fails(1, *common, "--output", output)
    assert message in said
    assert f"the edit is not lost: {place} holds delta.safetensors and report.json, but no checkpoint" in said
    assert {path.name: path.read_bytes() for path in spoiled.iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"facts.json", "spoiled", place.name}
    assert sorted(path.name for path in place.iterdir()) == ["delta.safetensors", "report.html", "report.json"]
    report = json.loads((place / "report.json").read_text())
    assert report["edit"]["edits"] == 4
    assert ("reliability" in report) is (where == "weights")

    network = AutoModelForCausalLM.from_pretrained(model)
    WeightDelta.load(place / "delta.safetensors").apply(network)
    assert all(torch.equal(value, whole[name]) for name, value in network.state_dict().items())


def test_a_kept_edit_is_not_overwritten_by_the_next_one(
    model: Path, spoiled: Path, facts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ("edit", "--model", model, "--requests", facts, *BRIEFLY, "--no-evaluate", "--output", spoiled)
    with monkeypatch.context() as patch:
        patch.setattr("fastedit.saving.write_checkpoint", raises(FULL))
        for place in ("spoiled.delta", "spoiled.delta-2"):
            assert f"{tmp_path / place} holds " in fails(1, *common)
    works(*common)
    assert {path.name for path in tmp_path.iterdir()} == {
        "facts.json",
        "spoiled",
        "spoiled.delta",
        "spoiled.delta-2",
    }


def test_a_model_that_cannot_be_saved_is_told_before_the_work(
    model: Path, facts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As transformers 4.56 refuses settings of generation that it has read itself."""
    monkeypatch.setattr(GenerationConfig, "save_pretrained", raises(REFUSAL))
    common = ("edit", "--model", model, "--requests", facts, "--output", tmp_path / "out", "--no-evaluate", *BRIEFLY)
    with monkeypatch.context() as patch:
        patch.setattr(Editor, "run", raises(AssertionError("the work")))
        said = fails(2, *common)
    assert "GenerationConfig is invalid: - `temperature`" in said
    assert "--delta-only" in said
    assert [path.name for path in tmp_path.iterdir()] == ["facts.json"]
    works(*common, "--delta-only")
    delta = tmp_path / "out" / "delta.safetensors"
    said = fails(2, "export", delta, "--merge", tmp_path / "merged", "--model", model)
    assert "mend that, or export the updates: --dense" in said


def test_a_table_that_cannot_be_printed_comes_last(
    model: Path, facts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A terminal may lack its characters."""
    broken = raises(UnicodeEncodeError("ascii", "→", 0, 1, "ordinal not in range(128)"))
    for command in ("edit", "evaluate"):
        monkeypatch.setattr(f"fastedit.cli.{command}.show", broken)
    output = tmp_path / "out"
    said = fails(1, "edit", "--model", model, "--requests", facts, "--output", output, *BRIEFLY)
    assert "the table could not be printed: 'ascii' codec can't encode" in said
    assert f"all is written to {output}" in said
    assert (output / "model.safetensors").is_file()
    assert "reliability" in json.loads((output / "report.json").read_text())
    call("evaluate", "--model", model, "--requests", facts, "--json", tmp_path / "figures.json")
    assert "reliability" in json.loads((tmp_path / "figures.json").read_text())


class _CtrlC:
    """Ctrl-C when a stage has done so much."""

    def __init__(self, stage: str, done: int) -> None:
        self.at = stage, done

    def of(self, bars: Any, title: str, n_edits: int | None = None) -> Any:
        def report(stage: str, done: int, total: int, loss: float | None = None) -> None:
            if (stage, done) == self.at:
                raise KeyboardInterrupt

        return report


@pytest.mark.parametrize("stage", [("prefix", 4), ("train", 3), ("generation", 16)])
def test_ctrl_c_before_the_edit_is_made_writes_nothing(
    model: Path,
    facts: Path,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    stage: tuple[str, int],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))  # the unedited model is measured
    interrupt = _CtrlC(*stage)
    monkeypatch.setattr(Bars, "callback", lambda *args: interrupt.of(*args))
    common = ("edit", "--model", model, "--requests", facts, "--output", tmp_path / "out", *LEARNS)
    assert "interrupted" in fails(1, *common)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["facts.json"]


def test_ctrl_c_keeps_the_last_epoch_if_told_to(
    model: Path, facts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt = _CtrlC("train", 3)
    monkeypatch.setattr(Bars, "callback", lambda *args: interrupt.of(*args))
    output = tmp_path / "out"
    common = ("edit", "--model", model, "--requests", facts, "--output", output, *LEARNS, "--no-evaluate")
    result = call(*common, "--keep-partial")
    assert result.exit_code == 1
    assert "interrupted; kept the weights of epoch 3" in result.stderr
    assert "of 4 edits: kept the weights of epoch 3; written to" in result.stdout
    report = json.loads((output / "report.json").read_text())["edit"]
    assert len(report["losses"]) == 3
    assert report["interrupted"] == "kept the weights of epoch 3"
    path = "model.layers.1.mlp.down_proj.weight"
    assert not torch.equal(weights(output)[path], weights(model)[path])


def test_ctrl_c_keeps_the_batches_that_are_done_and_counts_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edits = [{"prompt": r.prompt, "target": r.target, "subject": r.subject} for r in fastedit.demo.World().requests(6)]
    interrupt = _CtrlC("edits", 4)
    monkeypatch.setattr(Bars, "callback", lambda *args: interrupt.of(*args))
    files = ("--requests", write(tmp_path / "facts.json", edits), "--output", tmp_path / "out")
    method = ("--method", "memit", "--layers", "1-2", "--batch-size", 2, "--steps", 2, "--n-contexts", 0)
    common = ("edit", "--model", fastedit.demo.checkpoint_path(), "--dtype", "float32", *files, *method)
    result = call(*common, "--keep-partial", "--no-evaluate")
    assert result.exit_code == 1, result.stderr
    assert "of 6 edits: kept the first 4 edits; written to" in result.stdout
    report = json.loads((tmp_path / "out" / "report.json").read_text())["edit"]
    assert (report["edits"], report["interrupted"]) == (4, "kept the first 4 edits")
    assert report["config"]["layers"] == [1, 2]


COMMANDS: dict[str, tuple[str, ...]] = {
    "edit": ("--model", "./m", "--requests", "./r", "--output", "./o"),
    "evaluate": ("--model", "./m", "--requests", "./r"),
    "check": ("--model", "./m", "--requests", "./r"),
    "locate": ("--model", "./m", "--requests", "./r"),
    "covariance": ("./m", "--text", "./t", "--layers", "1"),
    "check-model": ("./m",),
    "demo": (),
    "env": (),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unknown_backend_is_told_first_by_every_command(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Editor, "from_pretrained", None)
    said = fails(2, command, *COMMANDS[command], FASTEDIT_BACKEND="nonsense")
    assert "FASTEDIT_BACKEND=nonsense: there is no such backend; set one of auto" in said
    works(command, "--help", FASTEDIT_BACKEND="nonsense")


@pytest.fixture
def collecting(model: Path, tmp_path: Path) -> tuple[Any, ...]:
    (tmp_path / "text.txt").write_text("\n\n".join(f"The king of Gaul has {n} geese." for n in range(200)))
    return ("covariance", model, "--text", tmp_path / "text.txt", "--layers", "0-1", "--batch-tokens", 1)


def test_covariance_sees_first_whether_its_folder_can_be_written(
    collecting: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    works(*collecting, "--output", tmp_path / "out", "--tokens", 1)
    (tmp_path / "out" / "statistics").mkdir()
    works(*collecting, "--output", tmp_path / "out", "--tokens", 1)
    monkeypatch.setattr("fastedit.statistics.collect.Collection", None)
    monkeypatch.setattr("fastedit.statistics.store.user_directory", lambda mark: Path("/proc") / mark)
    assert "/proc/" in (said := fails(2, *collecting))
    assert "cannot be written" in said


def test_covariance_tells_the_line_that_is_not_utf_8(collecting: tuple[Any, ...], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(b"caf\xe9\n")
    assert "line 1 is not UTF-8" in fails(2, *collecting)
    (tmp_path / "text.txt").write_bytes("é\n".encode() * 9999 + b"caf\xe9\n")
    assert "line 10000 is not UTF-8" in fails(2, *collecting, "--output", tmp_path / "out")


def test_covariance_of_another_text_is_refused_before_the_work(collecting: tuple[Any, ...], tmp_path: Path) -> None:
    kept = (*collecting, "--output", tmp_path / "out")
    works(*kept)
    lines = (text := tmp_path / "text.txt").read_text().split("\n\n")
    for other, said in (
        (["The queen of Gaul.", *lines], "another text or tokenizer"),
        ([*lines[:100], "The queen of Gaul.", *lines[100:]], "from some document on"),
        (lines[:100], "another text, which is longer"),
    ):
        text.write_text("\n\n".join(other))
        assert said in fails(2, *kept)


def test_a_disk_that_fills_up_under_covariance(collecting: tuple[Any, ...], tmp_path: Path) -> None:
    wide = (*collecting, "--output", tmp_path / "out")
    with small_files():
        said = fails(1, *wide)
    assert "the statistics could not be saved" in said
    assert "nothing was saved yet" in said
    works(*wide, "--tokens", 1)
    with small_files():
        assert said.partition("; ")[0] in (again := fails(1, *wide))
    assert "continues where the statistics were last saved" in again


@pytest.mark.parametrize("saved", [False, True])
def test_covariance_says_after_ctrl_c_whether_anything_was_saved(
    collecting: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved: bool
) -> None:
    wide = (*collecting, "--output", tmp_path / "out")
    if saved:
        works(*wide, "--tokens", 1)
    interrupt = _CtrlC("covariance", 10**9)
    monkeypatch.setattr(Bars, "callback", lambda *args: interrupt.of(*args))
    monkeypatch.setattr(
        "fastedit.statistics.collect._Run._observe", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    said = fails(1, *wide)
    assert ("continues where the statistics were last saved" in said) == saved
    assert ("nothing was saved yet" in said) != saved


def test_as_a_process(tmp_path: Path) -> None:
    """`python -m fastedit`: one line and no traceback; and --help loads neither torch nor transformers."""
    run = [
        sys.executable,
        "-m",
        "fastedit",
        "evaluate",
        "--model",
        "none",
        "--requests",
        str(tmp_path / "no"),
    ]
    done = subprocess.run(run, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr == f"fastedit: {tmp_path / 'no'}: cannot be read: No such file or directory\n"
    script = (
        "import sys, fastedit.cli\n"
        "sys.argv[1:] = ['--help']\n"
        "try:\n    fastedit.cli.main()\n"
        "finally:\n    print('heavy:', {'torch', 'transformers', 'matplotlib'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert "heavy: set()" in done.stdout
    assert all(command in done.stdout for command in ("edit", "evaluate", "demo", "locate", "env"))


@pytest.mark.parametrize("command", ["edit", "evaluate", "check", "demo", "locate", "check-model", "env"])
def test_help_shows_an_example(command: str) -> None:
    assert f"Example: fastedit {command}" in works(command, "--help").stdout


def test_an_old_spelling_works_and_says_so(model: Path, facts: Path, tmp_path: Path) -> None:
    saved = tmp_path / "located.json"
    common = ("locate", "--model", model, "--requests", facts, "--sample", 2, "--epochs", 1, "--json", saved)
    old = works(*common, "--blocks", "1")
    assert "--blocks is an old spelling of --layers" in old.stderr
    assert "--blocks" not in works("locate", "--help").stdout
    of_old = json.loads(saved.read_text())["cells"]
    assert not works(*common, "--layers", "1").stderr
    assert [c["block"] for c in json.loads(saved.read_text())["cells"]] == [c["block"] for c in of_old] == [1]


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


def test_text_is_one_document_or_json_lines_of_documents(model: Path, facts: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("The king is old. " * 3)
    (tmp_path / "same.jsonl").write_text(json.dumps({"text": "The king is old. " * 3}) + "\n")
    (tmp_path / "two.jsonl").write_text(
        "".join(json.dumps({"text": t}) + "\n" for t in ("The king is", "old and Rome"))
    )
    figures = []
    (tmp_path / "two.json").write_text(json.dumps(["The king is", {"text": "old and Rome"}]))
    for name in ("text.txt", "same.jsonl", "two.jsonl", "two.json"):
        works("evaluate", "--model", model, "--requests", facts, "--text", tmp_path / name, "--json", tmp_path / "f")
        figures.append(json.loads((tmp_path / "f").read_text())["perplexity"])
    assert figures[0] == figures[1] != figures[2] == figures[3]
    (tmp_path / "two.jsonl").write_text('{"body": "x"}\n')
    said = fails(2, "evaluate", "--model", model, "--requests", facts, "--text", tmp_path / "two.jsonl")
    assert "line 1 has no text in the field 'text'" in said


@pytest.mark.parametrize("command", ["check", "covariance", "edit", "evaluate", "locate", "tune"])
def test_requests_are_not_read_as_text(
    model: Path, facts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setattr(Editor, "from_pretrained", None)
    given = ("--layers", 1) if command == "covariance" else ("--requests", facts)
    output = ("--output", tmp_path / "out") if command in ("edit", "tune") else ()
    said = fails(2, command, "--model", model, *given, "--text", facts, *output)
    assert f"{facts}: record 0 (counted from 0) has no text in the field 'text'; its fields are prompt, " in said


@pytest.mark.parametrize("kind", [RequestError, ModelError, ConfigError, EditError, FileError])
def test_the_exit_code_is_that_of_the_phase_whatever_the_error(
    model: Path, facts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    error = kind(*([tmp_path / "x"] if kind is FileError else []), "something is wrong")

    def fail(*_: Any, **__: Any) -> Any:
        raise error

    for command, *places in (
        (("edit", "--output", tmp_path / "o", "--epochs", 1), "editor.Editor.plan", "editor.Editor.run"),
        (("evaluate",), "evaluation.questions.ask", "cli.arguments.measure"),
        (("locate",), "evaluation.locate.Sweep.__init__", "evaluation.locate.Sweep.run"),
    ):
        for place, code in zip(places, (2, 1), strict=True):
            with monkeypatch.context() as patch:
                patch.setattr(f"fastedit.{place}", fail)
                assert "something is wrong" in fails(code, *command, "--model", model, "--requests", facts)


def test_a_question_that_cannot_be_asked_is_refused_before_the_model_is_measured(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not after an hour of training: a paraphrase counts like a prompt."""
    records = [RECORDS[0], RECORDS[1] | {"id": "far", "paraphrases": ["far away " * 99]}]
    monkeypatch.setattr("fastedit.cli.arguments.measure", None)
    for command in (("edit", "--output", tmp_path / "o"), ("evaluate",)):
        said = fails(2, *command, "--model", model, "--requests", write(tmp_path / "facts.json", records))
        assert "request far, paraphrase: prompt and target take" in said


@pytest.mark.parametrize("command", ["--help", *COMMANDS])
def test_help_is_quick(command: str) -> None:
    """Without torch, transformers and pydantic; half a second of a processor for the command itself."""
    arguments = [command] if command == "--help" else [command, "--help"]
    script = (
        "import sys, time\nstart = time.process_time()\nimport fastedit.cli\n"
        f"sys.argv[1:] = {arguments!r}\n"
        "try:\n    fastedit.cli.main()\n"
        "finally:\n"
        "    heavy = {'torch', 'transformers', 'pydantic'} & set(sys.modules)\n"
        "    print(time.process_time() - start, heavy, file=sys.stderr)"
    )
    spent = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
        seconds, heavy = done.stderr.split(maxsplit=1)
        assert heavy.strip() == "set()"
        spent.append(float(seconds))
        if spent[-1] < 1.0:
            break
    assert min(spent) < 1.0, spent  # 0.35 s on a machine without other work


def test_tune_writes_a_configuration_that_edit_takes(model: Path, facts: Path, tmp_path: Path) -> None:
    output = tmp_path / "tuned"
    asked = ("tune", "--model", model, "--requests", facts, "--output", output, "--sample", 3, "--epochs", 3)
    printed = call(*asked, "--trials", 2)
    assert printed.exit_code == 0
    assert {path.name for path in output.iterdir()} == {"config.json", "report.json", "front.png", "trials.jsonl"}
    chosen, report = (json.loads((output / f"{name}.json").read_text()) for name in ("config", "report"))
    assert chosen == report["trials"][report["best"]]["settings"]
    assert f"fastedit edit --config {output / 'config.json'}" in printed.stdout
    before = (output / "trials.jsonl").read_text().splitlines()
    assert call(*asked, "--trials", 3).exit_code == 0
    assert (output / "trials.jsonl").read_text().splitlines()[:3] == before
    edited = tmp_path / "edited"
    editing = ("edit", "--model", model, "--requests", facts, "--output", edited, "--no-evaluate", "--delta-only")
    assert call(*editing, "--config", output / "config.json", "--lr", "0.25").exit_code == 0
    config = json.loads((edited / "report.json").read_text())["edit"]["config"]
    assert {name: config[name] for name in chosen if name not in ("method", "lr")} == {
        name: value for name, value in chosen.items() if name not in ("method", "lr")
    }
    assert config["lr"] == 0.25


def test_tune_leaves_the_config_json_of_models_alone(
    model: Path, facts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Editor, "from_pretrained", None)
    (edited := tmp_path / "edited").mkdir()
    (edited / "model.safetensors").touch()
    within = {path: path.read_bytes() for path in model.iterdir() if path.is_file()}
    asked = ("tune", "--model", model, "--requests", facts, "--output")
    for output, said in (
        (model, "is a part of the model"),
        (edited, f"{edited} holds weights, whose config.json would be"),
    ):
        assert said in fails(2, *asked, output)
    assert {path: path.read_bytes() for path in model.iterdir() if path.is_file()} == within
    assert [*edited.iterdir()] == [edited / "model.safetensors"]


@pytest.mark.parametrize(
    ("content", "flags", "said"),
    [
        (None, [], "config.json: cannot be read: No such file or directory"),
        ("{", [], "config.json: is not JSON"),
        ("[" * 100_000, [], "config.json: is not JSON"),
        ('{"lr": 0.1, "epochs": 2, "lr": 0.2}', [], "config.json: lr given more than once in an object; keep one"),
        ("[1]", [], "config.json: expected an object of fields"),
        ('{"method": 3}', [], "config.json: expected an object of fields"),
        ('{"method": "nonsense"}', [], "config.json: unknown method 'nonsense'"),
        ('{"lrr": 1}', [], "config.json: locft-bf has no field 'lrr'"),
        ('{"lr": -1}', [], "config.json: lr is -1"),
        ('{"method": "memit"}', ["--method", "rome"], "--method rome does not fit"),
        ('{"lr": 0.1}', ["--clamp", "2"], "locft-bf has no field 'clamp'"),
    ],
)
def test_a_configuration_file_that_cannot_be_used(
    model: Path, facts: Path, tmp_path: Path, content: str | None, flags: list[str], said: str
) -> None:
    file = tmp_path / "config.json"
    if content is not None:
        file.write_text(content)
    output = tmp_path / "edited"
    assert said in fails(2, "edit", "--model", model, "--requests", facts, "--output", output, "--config", file, *flags)
    assert not output.exists()


def test_a_configuration_file_may_give_layers_that_flags_change(model: Path, facts: Path, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    for content, flags, layer in (
        ({"layer": [0, 1]}, [], [0, 1]),
        ({"layer": 1}, [], 1),
        ({"layer": [0, 1]}, ["--layers", "1"], 1),
        ({"layers": [1]}, ["--layers", "0"], 0),
    ):
        file.write_text(json.dumps(content | {"epochs": 1, "lr": 0.01}))
        output = tmp_path / "edited"
        done = call(
            "edit", "--model", model, "--requests", facts, "--output", output, "--no-evaluate", "--delta-only",
            "--config", file, *flags,
        )  # fmt: skip
        assert done.exit_code == 0, done.stderr
        assert json.loads((output / "report.json").read_text())["edit"]["config"]["layer"] == layer


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
