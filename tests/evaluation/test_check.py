"""`fastedit check`: what it asks, what it makes of the answers, thresholds, the page, tasks of lm-eval."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from helpers import make_documents, tags_of, tiny_model

from fastedit import EditRequest
from fastedit.errors import ConfigError, FileError
from fastedit.evaluation.check import MEASURES, SHARES, Check, CheckReport
from fastedit.evaluation.predict import Prediction, Predictions
from fastedit.evaluation.probes import negations, probes_of
from fastedit.evaluation.tasks import check_tasks, run_tasks
from fastedit.evaluation.thresholds import Bound, load_thresholds
from fastedit.models import Model

EDITS = [
    EditRequest("The w9 of w10 is", "w11", true_target="w12", paraphrases=("w10 w9",), neighbours=(("w9 w20", "w12"),)),
    EditRequest("w13 w14", "w15", portability=(("w16 w13", "w17"),)),
    EditRequest("w18 <b>w19 was", "w11"),
]
TEXT = make_documents(1, 60)


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Model:
    found = Model.of(tiny_model("llama"), tokenizer)
    return Model(replace(found.topology, context_length=400), tokenizer)


@pytest.fixture(scope="module")
def check(model: Model) -> Check:
    return Check(model, EDITS, text=TEXT)


def answered(check: Check, says: Callable[[str], str], likeliest: str = "", perplexity: float = 10.0) -> Predictions:
    """Predictions of a model that says this to each prompt; one answer is likelier than the others, w12 less likely."""
    logp = {"w12": -3.0, likeliest: -1.0}

    def prediction(prompt: str, answer: str) -> Prediction:
        return Prediction(prompt, answer, (1,), (True,), logp.get(answer, -2.0), None, says(prompt))

    answers = [
        {
            "rewrite": [prediction(r.prompt, r.target)],
            "paraphrase": [prediction(p, r.target) for p in r.paraphrases],
            "neighbour": [prediction(*pair) for pair in r.neighbours],
            "portability": [prediction(*pair) for pair in r.portability],
            "forgotten": [],
        }
        for r in check.requests
    ]
    return Predictions(answers, perplexity)


def targets(prompt: str) -> str:
    """The first words of the right answer; not after much text, and wrongly to "It is not true that …"."""
    right = next((e.target for e in EDITS if prompt.lower().endswith(e.prompt.lower())), "nothing")
    return f"{right} and more" if len(prompt.split()) < 100 else "lost"


def by_name(report: CheckReport) -> dict[str, Any]:
    return {m.name: m for m in report.measures}


def test_prefixes_have_their_length_in_tokens_and_stand_in_front(model: Model) -> None:
    found = [p for p in probes_of(model, EDITS, TEXT).probes if p.kind == "prefix_100"]
    fronts = [p.request.prompt.removesuffix(EDITS[p.place].prompt) for p in found]
    assert [p.place for p in found] == [0, 1, 2]
    assert all(len(model.tokenizer(front)["input_ids"]) in (99, 100) and front.endswith(". ") for front in fronts)
    assert len(set(fronts)) == 3


def test_what_cannot_be_asked_is_left_out_with_the_reason(model: Model, tokenizer: Any) -> None:
    small = Model(replace(model.topology, context_length=150), tokenizer)
    alone = probes_of(small, [EditRequest("Who is w9?", "w10")], TEXT[:20])
    assert {p.kind for p in alone.probes} == {"prefix_20", "prefix_100"}
    assert alone.left_out.keys() == {"prefix_200", "negation", "choice"}
    assert "do not fit into the model's 150 tokens" in alone.left_out["prefix_200"]


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("The capital of Gaul is", ["It is not true that the capital of Gaul is", "The capital of Gaul is not"]),
        ("Danielle Darrieux speaks", ["It is not true that Danielle Darrieux speaks"]),
        ("Who wrote Iris?", []),
        ("Q: one\nA", []),
        ("甲国的首都是", []),
    ],
)
def test_negated_prompts(prompt: str, wanted: list[str]) -> None:
    assert negations(prompt) == wanted


def test_measures_of_a_model_whose_answers_are_known(check: Check) -> None:
    after, before = answered(check, targets, "w11"), answered(check, lambda _: "w12", "w15", 8.0)
    found = by_name(check.report(after, before))
    values = {name: m.value for name, m in found.items()}
    assert tuple(values) == MEASURES
    assert (values["reliability"], values["reliability_exact"], found["reliability"].before) == (1.0, 0.0, 0.0)
    assert (values["prefix_20"], values["prefix_100"], values["prefix_200"]) == (1.0, 0.0, 0.0)
    assert values["negation"] == pytest.approx((0.5 + 1 + 0.5) / 3)  # not to "… is not", whose answer is unknown here
    assert found["negation"].n == 5
    assert values["choice"] == pytest.approx(2 / 3)
    assert (found["choice"].n, found["choice"].before) == (3, pytest.approx(1 / 3))
    assert (values["neighbour_accuracy"], found["neighbour_accuracy"].before) == (0.0, 1.0)
    assert (values["portability"], values["perplexity_ratio"]) == (0.0, 1.25)


def test_a_bound_fails_by_name_where_nothing_was_measured(check: Check) -> None:
    bounds = {"reliability": Bound(min=1.0), "kl": Bound(max=9.0), "task:arc": Bound(min=0), "negation": Bound(max=0.5)}
    report = check.report(answered(check, targets), bounds=bounds)
    assert {m.name: m.why for m in report.missed} == {
        "kl": "needs the unedited model: give --base, or --delta",
        "negation": "",
        "task:arc": "not among --tasks",
    }
    assert by_name(report)["reliability"].passed
    assert not report.passed
    assert check.report(answered(check, targets)).passed


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"reliabilty": {"min": 1}, "x": {}}', "2 unknown measures (reliabilty, x); there are reliability, "),
        ('{"negation": {"max": 50}}', "for 50 % give 0.5"),
        ('{"kl": {"mn": 1}, "choice": 0.5}', 'kl: expected {"min": …}, {"max": …} or both, got {"mn": 1}; choice: '),
        ('{"kl": {"max": true}}', "max is True; give a number"),
        ('{"kl": {"max": NaN}}', "max is nan; give a number"),
        ('{"kl": {"min": 2, "max": 1}}', "min 2 is above max 1"),
        ("[]", "expected bounds of measures"),
        ('{"kl": {"max": 1}, "choice": {"min": 0.5}, "kl": {"max": 9}}', "kl given more than once in an object"),
        ('{"kl": {"max": 1, "max": 9}}', "max given more than once in an object; keep one"),
    ],
)
def test_thresholds_that_cannot_be_used(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "t.json"
    path.write_text(content)
    with pytest.raises((ConfigError, FileError)) as error:
        load_thresholds(path, MEASURES, SHARES)
    assert message in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("bound", "value", "holds"),
    [
        (Bound(min=0.7), sum([0.7] * 3) / 3, True),  # 0.6999999999999998
        (Bound(max=0.9), sum([0.9] * 10) / 10, True),  # 0.9000000000000001
        (Bound(max=0), 1e-17, True),
        (Bound(min=0.7), 0.6999, False),
        (Bound(max=1e-6), 2e-6, False),
        (Bound(min=0.2, max=0.9), 0.95, False),
        (Bound(min=0), math.nan, False),
        (Bound(max=1), math.inf, False),
    ],
)
def test_a_bound_is_kept_up_to_the_rounding_of_a_mean(bound: Bound, value: float, holds: bool) -> None:
    assert bound.holds(value) is holds


def test_thresholds_are_json_or_toml(tmp_path: Path) -> None:
    wanted = {"reliability": Bound(min=0.95), "perplexity_ratio": Bound(max=1.05), "task:arc_easy": Bound(0.2, 0.9)}
    (tmp_path / "t.json").write_text(
        '{"reliability": {"min": 0.95}, "perplexity_ratio": {"max": 1.05}, "task:arc_easy": {"min": 0.2, "max": 0.9}}'
    )
    assert load_thresholds(tmp_path / "t.json", MEASURES, SHARES) == wanted
    (tmp_path / "t.json").write_text((tmp_path / "t.json").read_text(), encoding="utf-8-sig")  # as by Windows' editors
    assert load_thresholds(tmp_path / "t.json", MEASURES, SHARES) == wanted
    (tmp_path / "t.toml").write_text(
        'reliability.min = 0.95\nperplexity_ratio.max = 1.05\n["task:arc_easy"]\nmin = 0.2\nmax = 0.9'
    )
    if sys.version_info >= (3, 11):
        assert load_thresholds(tmp_path / "t.toml", MEASURES, SHARES) == wanted
    else:
        with pytest.raises(FileError, match="write the thresholds as JSON"):
            load_thresholds(tmp_path / "t.toml", MEASURES, SHARES)


def test_the_page_stands_alone_and_quotes_texts_as_texts(check: Check, tmp_path: Path) -> None:
    bounds = {"reliability": Bound(min=1.0), "negation": Bound(max=0.5)}
    after, before = (answered(check, lambda p: f"<script>{targets(p)}") for _ in range(2))
    check.report(after, before, bounds=bounds).save(tmp_path)
    html = (tmp_path / "check.html").read_text("utf-8")
    tags_of(html)
    assert "&lt;b&gt;w19" in html
    assert "1 of 2 thresholds missed: reliability" in html
    assert json.loads((tmp_path / "check.json").read_text("utf-8"))["missed"] == ["reliability"]


@pytest.fixture
def lm_eval(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A stand-in for lm-eval; gives what it was called with."""
    calls: list[Any] = []

    def simple_evaluate(*, model: Any, tasks: list[str], **more: Any) -> dict[str, Any]:
        calls.append((model, tasks))
        if unknown := {*tasks} - {*more.get("task_manager", TaskManager()).all_tasks}:
            raise KeyError(unknown)
        of_task = {"alias": "arc", "acc,none": 0.4, "acc_stderr,none": 0.01, "acc_norm,none": 0.5}
        found = {"lambada": {"perplexity,none": 7.0}, "odd": {"alias": "odd"}, "mine": {"f1,none": 0.3}}
        return {"results": {"arc_easy": of_task, **found}}

    class TaskManager:
        def __init__(self, include_path: str | None = None) -> None:
            own = [] if include_path is None else sorted(Path(include_path).glob("*.yaml"))
            assert all(file.read_text() for file in own), "while parsing a task"
            self.all_tasks = ["arc_easy", "lambada", "odd", *(file.stem for file in own)]

    modules = {name: ModuleType(name) for name in ("lm_eval", "lm_eval.tasks", "lm_eval.models.huggingface")}
    vars(modules["lm_eval"])["simple_evaluate"] = simple_evaluate
    vars(modules["lm_eval.tasks"])["TaskManager"] = TaskManager
    vars(modules["lm_eval.models.huggingface"])["HFLM"] = lambda **given: given
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return calls


def test_tasks_give_their_main_metric(lm_eval: list[Any], model: Model, check: Check) -> None:
    check_tasks(["arc_easy", "lambada"])
    now = run_tasks(model, ["arc_easy", "lambada"])
    assert now == {"arc_easy": 0.5, "lambada": 7.0}
    assert lm_eval == [({"pretrained": model.network, "tokenizer": model.tokenizer}, ["arc_easy", "lambada"])]
    bounds = {"task:arc_easy": Bound(min=0.5), "task_change:arc_easy": Bound(min=-0.05)}
    after, before = answered(check, targets), answered(check, targets)
    report = check.report(after, before, bounds=bounds, tasks=(now, {"arc_easy": 0.6, "lambada": 7.0}))
    assert [m.name for m in report.missed] == ["task_change:arc_easy"]
    broken = check.report(after, before, bounds=bounds, tasks=({"arc_easy": float("nan")}, {"arc_easy": 0.6}))
    why = {m.name: (m.value, m.why) for m in broken.missed}
    assert why == {
        "task:arc_easy": (None, "lm-eval gives nan"),
        "task_change:arc_easy": (None, "lm-eval gives 0.6 and nan"),
    }
    assert json.dumps(broken.to_dict(), allow_nan=False)
    with pytest.raises(ConfigError, match="no task nonsense"):
        check_tasks(["arc_easy", "nonsense"])


def test_tasks_of_ones_own(lm_eval: list[Any], model: Model, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("task: mine")
    check_tasks(["mine", "arc_easy"], tmp_path)
    assert run_tasks(model, ["mine", "arc_easy"], tmp_path) == {"mine": 0.3, "arc_easy": 0.5}
    with pytest.raises(ConfigError, match=f"no task other, {tmp_path} has none of that name"):
        check_tasks(["mine", "other"], tmp_path)
    with pytest.raises(ConfigError, match="none is named"):
        check_tasks([], tmp_path)
    with pytest.raises(ConfigError, match=r"mine\.yaml is not a folder"):
        check_tasks(["mine"], tmp_path / "mine.yaml")
    (tmp_path / "bad.yaml").touch()
    with pytest.raises(ConfigError, match=f"cannot read the tasks in {tmp_path}: while parsing a task"):
        check_tasks(["mine"], tmp_path)


def test_tasks_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    check_tasks([])
    with pytest.raises(ConfigError, match="pip install lm-eval"):
        check_tasks(["arc_easy"])
