"""`fastedit check` on the command line: exit codes, files, what is refused before the work."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_model
from typer.testing import CliRunner, Result

from fastedit import Editor, WeightDelta, cli


def call(*args: Any) -> Result:
    return CliRunner().invoke(cli.app, ["check", *map(str, args)])


@pytest.fixture(scope="module")
def folder(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as "base", its edit of facts.json as "edited" and delta.safetensors, and a text."""
    path = tmp_path_factory.mktemp("check")
    tiny_model("llama").save_pretrained(path / "base")
    tokenizer.save_pretrained(path / "base")
    facts = [{"prompt": f"w9 w{i} is", "target": f"w{i + 1}", "neighbours": [["w20 w21", "w22"]]} for i in (30, 40)]
    (path / "facts.json").write_text(json.dumps(facts))
    (path / "text.txt").write_text(" ".join(f"w{9 + i % 50}" for i in range(90)))
    editor = Editor.from_pretrained(path / "base", layer=2, lr=0.02, epochs=40)
    result = editor.edit(path / "facts.json")
    result.delta.save(path / "delta.safetensors")
    editor.save_model(path / "edited")
    return path


def test_thresholds_decide_the_exit_code_and_both_ways_to_the_base_agree(folder: Path, tmp_path: Path) -> None:
    thresholds = tmp_path / "t.json"
    common = ("--requests", folder / "facts.json", "--text", folder / "text.txt", "--thresholds", thresholds)
    thresholds.write_text('{"reliability": {"min": 1}, "perplexity_ratio": {"min": 0.01}}')
    ways = {
        "base": ("--model", folder / "edited", "--base", folder / "base"),
        "delta": ("--model", folder / "base", "--delta", folder / "delta.safetensors"),
    }
    for name, way in ways.items():
        result = call(*way, *common, "--output", tmp_path / name)
        assert result.exit_code == 0, result.stderr
    one, other = (json.loads((tmp_path / name / "check.json").read_text())["measures"] for name in ways)
    assert one == other
    assert (one["reliability"]["before"], one["reliability"]["value"]) == (0, 1)
    assert one["kl"]["value"] > 0
    thresholds.write_text('{"reliability": {"max": 0.5}, "prefix_200": {"min": 0}, "kl": {"min": 0}}')
    result = call(*ways["base"], *common, "--output", tmp_path / "missed")
    assert result.exit_code == 1
    last = result.stderr.splitlines()[-1]
    assert (
        last == "fastedit: 2 of 3 thresholds missed: reliability 100.0% (wanted ≤ 50.0%), prefix_200 — (wanted ≥ 0.0%)"
    )
    assert "2 of 3 thresholds missed" in (tmp_path / "missed" / "check.html").read_text()


def test_without_text_or_base_the_model_is_measured_by_itself(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastedit.evaluation.check._OWN_TEXT", 64)
    result = call("--model", folder / "edited", "--requests", folder / "facts.json", "--evaluate", "sample:1")
    assert result.exit_code == 0
    assert "needs the unedited model" in " ".join(result.stdout.split())


def test_tasks_of_ones_own_run_before_and_after(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("fastedit.evaluation.tasks.check_tasks", lambda *given: seen.append(given))

    def run(model: Any, tasks: list[str], include_path: Path) -> dict[str, float]:
        seen.append((tasks, include_path))
        return {"mine": 0.1 * len(seen)}

    monkeypatch.setattr("fastedit.evaluation.tasks.run_tasks", run)
    common = ("--requests", folder / "facts.json", "--text", folder / "text.txt", "--output", tmp_path)
    both = ("--model", folder / "edited", "--base", folder / "base")
    result = call(*both, *common, "--tasks", "mine", "--include-path", tmp_path)
    assert result.exit_code == 0, result.stderr
    assert seen == [(["mine"], tmp_path)] * 3
    measured = json.loads((tmp_path / "check.json").read_text())["measures"]["task:mine"]
    assert (measured["before"], measured["value"]) == (pytest.approx(0.2), pytest.approx(0.3))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--base", "b", "--delta", "d"), "give one of them"),
        (("--delta", "{folder}"), "is a folder; give its file"),
        (("--thresholds", "{folder}/facts.json"), "expected bounds of measures"),
        (("--tasks", "arc_easy"), "pip install lm-eval"),
        (("--tasks", "mine", "--include-path", "{folder}"), "pip install lm-eval"),
        (("--include-path", "{folder}"), "has tasks of lm-eval, and none is named"),
        (("--output", "{folder}/facts.json"), "cannot be written"),
        (("--base", "{folder}/other"), "--base has other parameters than --model"),
        *(
            (("--model", "none", "--thresholds", bounds), f"--thresholds: {said}")
            for bounds, said in {
                '{"kl": {"max": 1}, "reliability": {"min": 0}, "perplexity_ratio": {"max": 2}}': "2 of the measures "
                "cannot be taken: kl (needs the unedited model: give --base, or --delta), perplexity_ratio (needs",
                '{"portability": {"min": 0}}': "1 of the measures cannot be taken: portability (the requests have no",
                '{"task:arc": {"min": 0}}': "1 of the measures cannot be taken: task:arc (not among --tasks)",
                '{"task_change:arc": {"min": -1}}': "1 of the measures cannot be taken: task_change:arc (not among",
                f'{{"perplexity": {{"max": 1{"0" * 400}}}}}': "{path}: perplexity: max is 1000",
                '{"perplexity": {"max": 1e400}}': "{path}: perplexity: max is inf; give a number",
                '{"perplexity": {"max": "1e400"}}': "{path}: perplexity: max is '1e400'; give a number",
                '{"perplexity": {"min": -Infinity}}': "{path}: perplexity: min is -inf; give a number",
                '{"kl": {"max": -1}}': "{path}: kl: max is -1, but it is never below 0",
                '{"kl": ' + "[" * 100_000: "{path}: is not JSON",
            }.items()
        ),
    ],
    ids=lambda value: None if isinstance(value, tuple) else value[:60],
)
def test_what_is_refused_before_the_work(
    folder: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], message: str
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    if not (folder / "other").exists():
        tiny_model("qwen2").save_pretrained(folder / "other")
        tokenizer.save_pretrained(folder / "other")
    path = tmp_path / "t.json"
    path.write_text(flags[-1])
    given = [path if flag.startswith('{"') else flag.format(folder=folder) for flag in flags]
    result = call("--model", folder / "edited", "--requests", folder / "facts.json", *given)
    assert result.exit_code == 2
    assert message.replace("{path}", str(path)) in result.stderr.splitlines()[-1]
    assert not result.stdout


def test_a_base_that_was_not_edited_is_told(folder: Path) -> None:
    common = ("--requests", folder / "facts.json", "--text", folder / "text.txt")
    result = call("--model", folder / "base", "--base", folder / "base", *common)
    assert result.exit_code == 0
    assert "seem to be the same model" in result.stderr


@pytest.mark.parametrize("way", ["alone", "base", "delta"])
def test_a_model_that_gives_nan_is_reported_as_one_that_misses_its_thresholds(
    folder: Path, tokenizer: Any, tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a text it gives NaN where it is to write one, from the second token on."""
    monkeypatch.setattr("fastedit.evaluation.check._OWN_TEXT", 64)
    editor, broken = Editor.from_pretrained(folder / "edited"), tmp_path / "broken"
    delta = WeightDelta.load(folder / "delta.safetensors")
    with torch.no_grad():
        editor.model.model.embed_tokens.weight[40:] = float("nan")
        next(iter(delta.updates.values())).fill_(float("nan"))
    editor.model.save_pretrained(broken)
    tokenizer.save_pretrained(broken)
    delta.save(tmp_path / "delta.safetensors")
    (tmp_path / "t.json").write_text('{"reliability": {"min": 0}, "perplexity": {"max": 99}}')
    common = ("--requests", folder / "facts.json", "--thresholds", tmp_path / "t.json", "--output", tmp_path / "out")
    given = {
        "alone": ("--model", broken),
        "base": ("--model", broken, "--base", folder / "base"),
        "delta": ("--model", folder / "base", "--delta", tmp_path / "delta.safetensors"),
    }[way]
    text = () if way == "alone" else ("--text", folder / "text.txt")
    result = call(*given, *common, *text)
    assert result.exit_code == 1
    assert "fastedit: the edited model cannot be measured: the model gives NaN" in result.stderr.splitlines()[-1]
    found = json.loads((tmp_path / "out" / "check.json").read_text())
    assert (found["passed"], found["missed"]) == (False, ["reliability", "perplexity"])
    assert found["broken"].startswith("the model gives NaN or infinity")
    assert (found["measures"]["perplexity"]["before"] is None) == (way == "alone")
    assert found["measures"]["perplexity"]["value"] is None
    assert "The edited model cannot be measured: the model gives NaN" in (tmp_path / "out" / "check.html").read_text()
    if way == "alone":
        assert call(*given, *common[:2]).exit_code == 1  # without thresholds, too
