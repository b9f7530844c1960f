"""The search for a configuration: trials are real edits, nothing is tried twice, and a cut-off search goes on."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import moments, tiny_model
from matplotlib import image

from fastedit import Editor, EditRequest
from fastedit.errors import ConfigError, EditError, FileError
from fastedit.evaluation import tune as module_under_test
from fastedit.evaluation.tune import Search, Trial, TuneReport, tune
from fastedit.methods.locft_bf.config import LocFTBFConfig
from fastedit.models import Model

EDITS = [
    EditRequest(
        f"w{20 + i} w{30 + i} w{40 + i}",
        f"w{50 + i}",
        subject=f"w{30 + i}",
        id=f"edit-{i}",
        paraphrases=(f"w70 w{20 + i} w{30 + i}",),
        neighbours=((f"w{60 + i} w{30 + i}", f"w{80 + i}"),),
    )
    for i in range(6)
]
TEXT = [" ".join(f"w{i}" for i in range(20, 60))]
FAST: dict[str, Any] = {"epochs": 4}


@pytest.fixture
def model(tokenizer: Any) -> Model:
    return Model.of(tiny_model("llama"), tokenizer)


def bits(model: Model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.network.named_parameters()}


def assert_unchanged(model: Model, before: dict[str, torch.Tensor]) -> None:
    assert all(torch.equal(p, before[name]) for name, p in model.network.named_parameters())


def scored(config: dict[str, Any], resolved: dict[str, Any], score: float) -> Trial:
    return Trial(config, resolved, score, None, score, None, 1.0)


@pytest.fixture
def landscape(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Trials of a made-up method: the best rate is 0.08, the best block 1. Gives what was tried."""
    tried: list[dict[str, Any]] = []

    def instead(self: Search, config: dict[str, Any], *_: Any) -> Trial:
        tried.append(config)
        lr, layer = config.get("lr", 0.02), config.get("layer", 2)
        resolved = {"layer": layer, "lr": lr, "batch_size": 10, "seed": 0, "epochs": 25, "module": "down_proj"}
        worse = 0.1 * abs(math.log2(lr / 0.08)) + 0.1 * abs(layer - 1) + 0.3 * bool(config.get("published"))
        return scored(config, resolved, 0.9 - worse - 0.01 * abs(config.get("epochs", 25) - 25))

    monkeypatch.setattr(Search, "_try", instead)
    monkeypatch.setattr(Search, "_measure", lambda *_: None)
    return tried


def test_a_trial_is_what_the_editor_does_and_measures(model: Model, tokenizer: Any, tmp_path: Path) -> None:
    before = bits(model)
    report = tune(model, EDITS, trials=3, text=TEXT, journal=tmp_path / "trials.jsonl", **FAST)
    assert_unchanged(model, before)
    assert len(report.trials) == 3
    old = Editor(model.network, tokenizer).evaluate(EDITS, text=TEXT, generate=False).metrics
    for trial in report.trials:
        editor = Editor(model.network, tokenizer, **json.loads(json.dumps(trial.config)))
        result = editor.edit(EDITS)
        new = editor.evaluate(EDITS, text=TEXT).metrics
        result.revert()
        assert trial.reliability == new["reliability"]["generated"]
        assert trial.generalization == new["generalization"]["teacher_forced"]
        assert trial.first_token == new["first_token"]
        assert trial.perplexity_ratio == pytest.approx(new["perplexity"] / old["perplexity"])
        assert trial.resolved == result.delta.metadata["config"]
    assert [t.config.get("published") for t in report.trials] == [None, True, None]


def test_what_is_written_down_makes_the_same_edit_with_more_requests(model: Model, tokenizer: Any) -> None:
    """Every choice of the best trial is in its neighbours' configurations, but for what follows the requests."""
    search = Search(model, EDITS, trials=1, text=TEXT, **FAST)
    (trial,) = search.run().trials
    neighbour = next(search._neighbours(trial))
    resolved = Editor(model.network, tokenizer, **neighbour).plan(EDITS[:3]).made.config  # type: ignore[attr-defined]
    told = {name: value for name, value in trial.resolved.items() if name not in ("batch_size", "published", "lr")}
    assert {name: getattr(resolved, name) for name in told} == told
    same = Editor(model.network, tokenizer, **trial.settings).plan(EDITS[:3]).made.config  # type: ignore[attr-defined]
    assert {name: getattr(same, name) for name in told} == told
    assert resolved.lr == pytest.approx(2 * trial.resolved["lr"], rel=1e-2)
    assert not neighbour.keys() & {"batch_size", "lr_schedule"}
    assert neighbour["epochs"] == FAST["epochs"]


def test_what_depends_on_the_number_of_edits_is_left_open() -> None:
    resolved = asdict(LocFTBFConfig(batch_size=5, epochs=40, lr_schedule="constant", lr=1e-3))
    for given in ({"method": "locft-bf"}, {"method": "locft-bf", "epochs": 40, "lr_schedule": "constant"}):
        assert Trial(given, resolved, 1.0, None, None, None, 1.0).settings == {"lr": 1e-3} | given


def test_it_climbs_to_the_best_and_ends_there(model: Model, landscape: list[dict[str, Any]]) -> None:
    report = tune(model, EDITS)
    assert report.finished
    assert (report.best.config["lr"], report.best.config["layer"]) == (0.08, 1)
    keys = [json.dumps(config, sort_keys=True) for config in landscape]
    assert len(set(keys)) == len(keys)
    assert len(keys) < 25


def test_fields_that_are_given_stay(model: Model, landscape: list[dict[str, Any]]) -> None:
    assert tune(model, EDITS, lr=0.01).best.config["layer"] == 1
    assert {config["lr"] for config in landscape} == {0.01}
    assert not tune(model, EDITS, published=True, trials=2).finished
    assert all(config["published"] for config in landscape[-2:-1])


def test_a_search_that_was_cut_off_goes_on(
    model: Model, landscape: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tune(model, EDITS)
    n = len(landscape)
    kept = Search._keep

    def cut(self: Search, trial: Trial) -> None:
        kept(self, trial)
        if len(landscape) == n + 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(Search, "_keep", cut)
    journal = tmp_path / "new" / "trials.jsonl"
    with pytest.raises(KeyboardInterrupt):
        tune(model, EDITS, journal=journal)
    assert len(journal.read_text().splitlines()) == 5  # and the line that says what it is about
    assert tune(model, EDITS, journal=journal).trials == whole.trials
    assert len(landscape) == 2 * n
    assert tune(model, EDITS, journal=journal, trials=3).trials == whole.trials[:3]
    assert len(landscape) == 2 * n


@pytest.mark.parametrize("change", ["requests", "text", "options", "model"])
def test_a_journal_of_another_search_is_refused(
    model: Model, landscape: list[dict[str, Any]], tmp_path: Path, change: str
) -> None:
    journal = tmp_path / "trials.jsonl"
    tune(model, EDITS, trials=1, journal=journal)
    options: dict[str, Any] = {"options": {"weight_decay": 0.1}, "text": {"text": TEXT}}.get(change, {})
    if change == "model":
        next(model.network.parameters()).data[0, 0] += 1
    edits = EDITS[:-1] if change == "requests" else EDITS
    with pytest.raises(FileError, match="another model" if change == "model" else "other edits, text or options"):
        Search(model, edits, journal=journal, **options)


@pytest.mark.parametrize("content", ["", "{", '{"model": 1}\n{"score": 2}', "[]"])
def test_what_is_no_journal_is_refused_and_left_alone(model: Model, tmp_path: Path, content: str) -> None:
    journal = tmp_path / "trials.jsonl"
    journal.write_text(content)
    with pytest.raises(FileError, match=r"trials\.jsonl"):
        Search(model, EDITS, journal=journal)
    assert journal.read_text() == content


def test_the_budget(model: Model, landscape: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10_000, 10))
    monkeypatch.setattr(module_under_test.time, "perf_counter", lambda: next(clock))
    assert len(tune(model, EDITS, minutes=1e-9).trials) == 1
    report = tune(model, EDITS, minutes=1.0)
    assert not report.finished
    # a trial is 10 s from its begin to its end and 10 more to the next: the fourth would begin at 70 s or end later
    assert 2 <= len(report.trials) <= 3
    for options in ({"minutes": 0.0}, {"trials": 0}, {"minutes": math.nan}):
        with pytest.raises(ConfigError, match="positive"):
            Search(model, EDITS, **options)


def test_a_trial_that_fails_is_told_and_the_search_goes_on(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    before = bits(model)
    real = module_under_test.predict
    calls = 0

    def breaks(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:  # two for the unedited model
            raise EditError("the model gives NaN or infinity")
        return real(*args, **options)

    monkeypatch.setattr(module_under_test, "predict", breaks)
    report = tune(model, EDITS, trials=2, **FAST)
    assert_unchanged(model, before)
    assert report.trials[0].error == "the model gives NaN or infinity"
    assert report.best is report.trials[1]
    assert report.front == [report.trials[1]]
    monkeypatch.setattr(module_under_test, "compare", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tune(model, EDITS, trials=1, **FAST)
    assert_unchanged(model, before)


def test_no_trial_at_all_is_an_error(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = scored({"method": "locft-bf"}, {}, 0.0)
    monkeypatch.setattr(Search, "_try", lambda *_: replace(failed, error="diverged"))
    with pytest.raises(EditError, match="no trial could be made: diverged"):
        tune(model, EDITS, trials=2)


def test_refusals_come_first(model: Model) -> None:
    alone = [EditRequest("w20 w30", "w50")]
    with pytest.raises(ConfigError, match="nothing tells what an edit keeps: give text, or requests with neighbours"):
        Search(model, alone)
    Search(model, alone, text=TEXT)
    with pytest.raises(ConfigError, match="locft-bf has no field 'lrr'"):
        Search(model, EDITS, lrr=1.0)
    with pytest.raises(ConfigError, match="unknown method 'nonsense'"):
        Search(model, EDITS, method="nonsense")


def test_the_front_and_the_picture(tmp_path: Path) -> None:
    shares = [(0.9, 0.2), (0.8, 0.5), (0.7, 0.4), (0.5, 0.9), (0.9, 0.1)]
    trials = [Trial({"lr": i}, {}, written, None, kept, None, 1.0) for i, (written, kept) in enumerate(shares)]
    trials.append(Trial({"lr": 5}, {}, 0.0, None, 1.0, None, 1.0, "failed"))
    report = TuneReport(trials, True)
    assert report.front == [trials[3], trials[1], trials[0]]
    assert report.best is trials[3]
    report.draw(tmp_path / "front.png")
    assert image.imread(tmp_path / "front.png").std() > 0
    grown = replace(trials[0], perplexity_ratio=2.0)
    assert grown.kept == pytest.approx(0.1)
    assert replace(grown, perplexity_ratio=0.5).kept == pytest.approx(0.2)
    assert replace(grown, first_token=None).kept == pytest.approx(0.5)
    assert grown.score == pytest.approx(2 * 0.9 * 0.1)


@pytest.mark.parametrize(
    ("method", "weighed", "idle"),
    [("memit", "cov_weight", "l2"), ("rome", "cov_weight", "l2"), ("alphaedit", "l2", "cov_weight")],
)
def test_other_methods(method: str, weighed: str, idle: str, model: Model, tmp_path: Path) -> None:
    moments(model.network, tmp_path, 0)
    common: dict[str, Any] = {"method": method, "statistics": str(tmp_path), "steps": 3, "n_contexts": 0}
    report = tune(model, EDITS, trials=2, **common)
    first, second = report.trials
    assert first.error is second.error is None
    assert second.config["lr"] == pytest.approx(2 * first.resolved["lr"], rel=1e-2)
    told = {"method": method} | {name: first.resolved[name] for name in ("lr", "clamp", weighed)}
    found = list(Search(model, EDITS, **common)._neighbours(first))
    changed = [{name for name in told if config[name] != told[name]} for config in found]
    assert {"lr"} in changed
    assert {weighed} in changed
    assert not any(idle in config and config[idle] != first.resolved[idle] for config in found)
