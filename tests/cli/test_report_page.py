"""`report.html` of `fastedit edit`: all of it is in report.json, quoted, and small however many edits there are."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from calling import works
from helpers import tags_of

from fastedit.demo import World, checkpoint_path
from fastedit.evaluation.edit_page import edit_page
from fastedit.evaluation.report import EvaluationReport

EVIL = "<script>alert('x')</script>"


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six edits of the shipped model, much too fast: nothing is learned, neighbours break, two edits conflict."""
    folder = tmp_path_factory.mktemp("page")
    records = [
        {"id": f"{EVIL}{i}", "prompt": r.prompt, "target": r.target, "neighbours": [*r.neighbours]}
        for i, r in enumerate(World().requests(5))
    ]
    records[1]["prompt"] = f"{EVIL} is {records[1]['prompt']}"
    records.append({**records[1], "id": "other", "target": EVIL})
    (folder / "facts.json").write_text(json.dumps(records))
    works(
        *("edit", "--model", checkpoint_path(), "--requests", folder / "facts.json", "--output", folder / "out"),
        *("--published", "--lr", 0.5, "--epochs", 2, "--stop-loss", 0, "--batch-size", 2, "--dtype", "float32"),
    )
    return folder / "out"


@pytest.fixture(scope="module")
def report(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "report.json").read_text("utf-8"))
    return found


def test_the_page_says_how_it_went(output: Path, report: dict[str, Any]) -> None:
    html, did = (output / "report.html").read_text("utf-8"), report["edit"]
    assert {"svg", "table", "details"} <= {*tags_of(html)}
    assert EVIL not in html
    assert EVIL.replace("<", "&lt;").replace(">", "&gt;").replace("'", "&#x27;") in html
    for title in ("Learning", "Time", "Memory", "Quality", "The worst edits", "Neighbours whose answer changed",
                  "Conflicts (1)", f"Not learned ({len(did['unlearned'])})", "Notes", "Choices"):  # fmt: skip
        assert f"<h2>{title}" in html
    assert f"{6 - len(did['unlearned'])} of 6 edits learned." in html
    assert did["model"] in html
    assert f"The slowest stage: {did['slowest']}." in html


def test_report_json_has_all_that_the_page_shows(report: dict[str, Any]) -> None:
    did = report["edit"]
    assert did["requested"] == 6
    assert len(did["learned"]) == len(did["losses"]) == 2
    assert did["stages"].keys() == {"planning", "prefix", "training", "evaluation", "saving", "other"}
    assert did["slowest"] == max(did["stages"], key=did["stages"].__getitem__)
    assert did["memory"]["host"] > did["memory"]["cached states"]["host"] > 0
    (conflict,) = did["conflicting"]
    assert [(one["ids"], one["target"]) for one in conflict["targets"]][1] == (["other"], EVIL)
    changed = [one for row in report["requests"] for one in row["changed_neighbours"]]
    assert changed
    assert all(one["before"] != one["after"] for one in changed)
    assert report["locality"]["generated"] < 1
    assert all(row["logp"] < 0 for row in report["requests"])


def test_a_text_from_right_to_left_turns_nothing_round(report: dict[str, Any]) -> None:
    """ "before → after" of two Hebrew texts would be shown as "after → before"."""
    texts = {
        name: f"{name} \u05d0\u05d1\u202e <" for name in ("prompt", "before", "after", "target", "generated", "id")
    }
    row = report["requests"][0] | {name: texts[name] for name in ("prompt", "target", "generated")}
    row |= {"changed_neighbours": [{name: texts[name] for name in ("prompt", "before", "after")}], "logp": -9.0}
    row["generated_begins"] = {**row["generated_begins"], "reliability": 0.0}
    conflict = {"prompt": texts["prompt"], "targets": [{"target": texts["target"], "ids": [texts["id"]]}]}
    missed = {"prompt": texts["prompt"], "id": texts["id"], "why": ""}
    did = report["edit"] | {"unlearned": [missed], "conflicting": [conflict]}
    html = edit_page(did, EvaluationReport(report, report["before"], report["n"], [row]))
    tags_of(html)
    for name, text in texts.items():
        assert html.count(text.replace("<", "&lt;")) == html.count(f"<bdi>{text.replace('<', '&lt;')}</bdi>") > 0, name


def test_a_page_of_many_edits_is_small(output: Path, report: dict[str, Any]) -> None:
    n, long = 100_000, "long " * 1000
    did = report["edit"]
    did = {**did, "requested": n, "losses": [1.0, math.nan] * n, "learned": [*range(n)], "notes": [long] * n}
    did |= {name: did[name][:1] * n for name in ("unlearned", "conflicting")}
    did["config"] = {**did["config"], "contexts": [long] * 9}
    row = report["requests"][0] | {"prompt": long, "generated": None}
    row |= {"changed_neighbours": [{"prompt": long, "before": long, "after": long}]}
    row["generated_begins"] = {**row["generated_begins"], "reliability": 0.0}
    measured = EvaluationReport(report, report["before"], report["n"], [row] * n)
    html = edit_page(did, measured)
    tags_of(html)
    assert len(html) < 1e6
    assert html.count(f"{n - 200} more in report.json.") == 5


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({}, "Not measured (--no-evaluate)."),
        ({"losses": [math.nan], "learned": []}, "nothing was noted"),
        ({"losses": [2.5], "learned": [0]}, "epoch 1<"),
        ({"interrupted": "kept the weights of <b>epoch 1</b>"}, "Interrupted: kept the weights of &lt;b&gt;epoch 1"),
        ({"unlearned": []}, 'good">6 of 6 edits learned.'),
        ({"stages": {}, "slowest": None}, "Time"),
    ],
)
def test_what_is_missing(report: dict[str, Any], found: dict[str, Any], said: str) -> None:
    html = edit_page(report["edit"] | found, None)
    tags_of(html)
    assert said in html
