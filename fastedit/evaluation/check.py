"""Check whether an edited model still works: its facts, harder questions about them, and what should not change."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastedit.errors import ConfigError, listed
from fastedit.evaluation.page import page
from fastedit.evaluation.predict import Answers, Predictions
from fastedit.evaluation.probes import PREFIXES, PROBE_KINDS, Probes, probes_of
from fastedit.evaluation.questions import KINDS, kinds_in
from fastedit.evaluation.report import EvaluationReport, compare
from fastedit.evaluation.sampling import interval, mean
from fastedit.evaluation.thresholds import TASK, TASK_CHANGE, Bound, Measured
from fastedit.models import Model
from fastedit.requests import AnyPath, EditRequest
from fastedit.statistics.own_text import write_text
from fastedit.tensorfile import writing

if TYPE_CHECKING:
    from rich.table import Table

_OWN_TEXT = 2048  # tokens that a model writes if no text is given
_NO_PROMPTS = "the requests have no {} prompts"
_NO_TASK = "not among --tasks"
_COMPARED = ("first_token", "kl", "perplexity_ratio")
_BASE = "needs the unedited model: give --base, or --delta"


@dataclass(frozen=True)
class _About:
    """A measure: what it says, its path in an `EvaluationReport` (None: taken by probes), and its kind of prompts."""

    says: str
    path: tuple[str, ...] | None = None
    prompts: str = "rewrite"
    share: bool = True


_MEASURES: dict[str, _About] = {
    "reliability": _About("the answer begins with the target", ("generated_begins", "reliability")),
    "reliability_exact": _About("the answer is the target", ("reliability", "generated")),
    "generalization": _About(
        "so it does at paraphrases", ("generated_begins", "generalization"), prompts="paraphrase"
    ),
    "generalization_exact": _About("it is the target there", ("generalization", "generated"), prompts="paraphrase"),
    **{f"prefix_{n}": _About(f"it begins so after {n} tokens of other text") for n in PREFIXES},
    "negation": _About("it begins so at the negated prompt, where it should not"),
    "choice": _About("of several answers the target is the likeliest"),
    "portability": _About("the answer to what follows from the fact (two hops)", ("generated_begins", "portability"),
                          prompts="portability"),
    "neighbour_accuracy": _About("the answer to a neighbour is its own", ("generated_begins", "neighbour_accuracy"),
                                 prompts="neighbour"),
    "first_token": _About("a neighbour's answer begins as before", ("first_token",), prompts="neighbour"),
    "kl": _About("how far its first token's probabilities moved, nats", ("kl",), prompts="neighbour", share=False),
    "forgotten": _About("the answer to be forgotten is not said", ("forgotten", "generated"), prompts="forgotten"),
    "forgotten_probability": _About("of all its tokens", ("forgotten", "probability"), prompts="forgotten"),
    "perplexity": _About("of text", ("perplexity",), prompts="text", share=False),
    "perplexity_ratio": _About("after the edit / before", prompts="text", share=False),
}  # fmt: skip
MEASURES = tuple(_MEASURES)
SHARES = tuple(name for name, about in _MEASURES.items() if about.share)


@dataclass(frozen=True)
class CheckReport:
    """All measures of an edited model; prints as a table.

    ``rows`` holds, for each request, what was generated for its prompt, after prefixes and for negated prompts, and
    what the model chose. The report is of a sample of ``of`` requests (None: of all). ``broken`` says why the edited
    model could not be measured.
    """

    measures: Sequence[Measured]
    rows: Sequence[Mapping[str, Any]]
    about: Mapping[str, Any]
    of: int | None = None
    broken: str = ""

    @property
    def missed(self) -> list[Measured]:
        """The measures that do not keep their bounds."""
        return [measured for measured in self.measures if measured.passed is False]

    @property
    def passed(self) -> bool:
        """Whether the model could be measured and keeps all bounds; also true without bounds."""
        return not self.missed and not self.broken

    def to_dict(self) -> dict[str, Any]:
        """The report for JSON: "passed", "missed", "broken", "measures" by name, "about", "sample" and "requests"."""
        sample = None if self.of is None else {"measured": len(self.rows), "of": self.of}
        measures = {m.name: {**asdict(m), "passed": m.passed} for m in self.measures}
        missed = [m.name for m in self.missed]
        summary = {"passed": self.passed, "missed": missed, "broken": self.broken, "measures": measures}
        return {**summary, "about": self.about, "sample": sample, "requests": self.rows}

    def save(self, directory: AnyPath) -> None:
        """Write check.json and check.html to a folder, each whole or not at all. Raises FileError."""
        folder = Path(directory)
        contents = {
            "check.json": json.dumps(self.to_dict(), ensure_ascii=False, indent=1, allow_nan=False) + "\n",
            "check.html": page(self.measures, self.rows, self.about, self.of, self.broken),
        }
        for name, content in contents.items():
            with writing(folder / name, "the check was not written") as temporary:
                temporary.write_text(content, encoding="utf-8")

    def __rich__(self) -> Table:
        from rich import box
        from rich.table import Table

        table = Table("", "prompts", "before", "now", "wanted", "", box=box.SIMPLE_HEAD)
        for column in table.columns[1:5]:
            column.justify = "right"
        for m in self.measures:
            now = m.shown(m.value) + (f" [{m.interval[0]:.0%}, {m.interval[1]:.0%}]" if m.interval else "")
            verdict = {None: "", True: "passed", False: "[bold red]missed[/]"}[m.passed]
            remark = ", ".join(filter(None, (verdict, f"[dim]{m.why}[/]" if m.why else "")))
            table.add_row(m.name, str(m.n) if m.n else "", m.shown(m.before), now, m.wanted, remark)
        return table


def check_bounds(
    bounds: Mapping[str, Bound], edits: Sequence[EditRequest], *, compared: bool, tasks: Sequence[str] = ()
) -> None:
    """Check, before anything is measured, that all measures with bounds can be taken.

    Args:
        compared: whether the unedited model is measured, too.
        tasks: the lm-eval tasks that will run.

    Raises:
        ConfigError: some measures cannot be taken; names all of them.
    """
    kinds, problems = kinds_in(edits), []
    for name in bounds:
        task = name.removeprefix(TASK).removeprefix(TASK_CHANGE)
        prompts = _MEASURES[name].prompts if name in _MEASURES else ""
        if prompts in KINDS and prompts not in kinds:
            problems.append(f"{name} ({_NO_PROMPTS.format(prompts)})")
        elif name not in _MEASURES and task not in tasks:
            problems.append(f"{name} ({_NO_TASK})")
        elif not compared and (name in _COMPARED or name.startswith(TASK_CHANGE)):
            problems.append(f"{name} ({_BASE})")
    if problems:
        raise ConfigError(f"{len(problems)} of the measures cannot be taken: {listed(problems)}")


def broken_report(
    why: str,
    before: CheckReport | None = None,
    *,
    bounds: Mapping[str, Bound] | None = None,
    about: Mapping[str, Any] | None = None,
    total: int | None = None,
) -> CheckReport:
    """The report on an edited model that cannot be measured; it misses all bounds.

    Args:
        before: the report on the unedited model.
        total: how many requests the measured ones are a sample of.
    """
    known = {m.name: m for m in before.measures} if before else {}
    known |= {
        name: Measured(name, measure.says, None, share=measure.share)
        for name, measure in _MEASURES.items()
        if name not in known
    }
    known |= {m.name: m for m in _of_tasks({}, {}, {*(bounds or {})})}
    measures = [
        replace(m, value=None, before=m.value, why="the model cannot be measured", bound=(bounds or {}).get(m.name))
        for m in known.values()
    ]
    return CheckReport(measures, [], about or {}, total, why)


class Check:
    """The questions of a check: made once, then put to the unedited and to the edited model.

    Args:
        unedited: the model before the edit, or else the edited one; it writes the text if none is given.
        requests: the edits.
        text: documents for the perplexity, and for the prefixes.
        of: how many requests these are a sample of.

    Raises:
        ModelError: the model computes NaN or infinity, so it cannot write text.
    """

    def __init__(
        self, unedited: Model, edits: Sequence[EditRequest], *, text: Sequence[str] = (), of: int | None = None
    ) -> None:
        self.edits = list(edits)
        self.of = of if of and of > len(self.edits) else None
        self.own_text = not text
        self.text = list(text) or write_text(unedited, _OWN_TEXT)
        self.probes: Probes = probes_of(unedited, self.edits, self.text)

    @property
    def requests(self) -> list[EditRequest]:
        """The requests for `predict`, to be used with ``text``: the edits, then the probes."""
        return [*self.edits, *(probe.request for probe in self.probes.probes)]

    def report(
        self,
        after: Predictions,
        before: Predictions | None = None,
        *,
        bounds: Mapping[str, Bound] | None = None,
        tasks: tuple[Mapping[str, float], Mapping[str, float]] = ({}, {}),
        about: Mapping[str, Any] | None = None,
    ) -> CheckReport:
        """Make the report from the predictions of the edited model and, if measured, of the unedited one.

        Args:
            bounds: measure -> its bound.
            tasks: values of lm-eval's tasks, of the edited and of the unedited model.
            about: other entries of the report.
        """
        n = len(self.edits)
        own, old = (
            (predictions and replace(predictions, answers=predictions.answers[:n])) for predictions in (after, before)
        )
        assert own is not None
        report = compare(self.edits, own, old, total=self.of)
        probed = self._probed(after.answers[n:])
        unedited = None if before is None else self._probed(before.answers[n:])
        measures = [self._measured(name, report, probed, unedited, before is not None) for name in _MEASURES]
        measures += _of_tasks(*tasks, {*(bounds or {})})
        rows = [
            {
                **{name: row[name] for name in ("id", "prompt", "target", "generated")},
                "begins": row["generated_begins"]["reliability"],
                **more,
            }
            for row, more in zip(report.rows, probed, strict=True)
        ]
        bounded = [replace(m, bound=(bounds or {}).get(m.name)) for m in measures]
        text = "written by the model" if self.own_text else "given"
        return CheckReport(bounded, rows, {**(about or {}), "text": text}, self.of)

    def _probed(self, answers: Sequence[Answers]) -> list[dict[str, Any]]:
        """The answers to each request's probes, by kind."""
        rows: list[dict[str, Any]] = [{kind: [] for kind in PROBE_KINDS} for _ in self.edits]
        for probe, by_kind in zip(self.probes.probes, answers, strict=True):
            (prediction,) = by_kind["rewrite"]
            entry: dict[str, Any] = {
                "prompt": prediction.prompt,
                "generated": prediction.generated,
                "begins": prediction.begins,
            }
            if probe.kind == "choice":
                entry = {"answer": prediction.answer, "logp": prediction.logp}
            rows[probe.place][probe.kind].append(entry)
        return rows

    def _measured(
        self,
        name: str,
        report: EvaluationReport,
        probed: Sequence[Mapping[str, Any]],
        unedited: Sequence[Mapping[str, Any]] | None,
        compared: bool,
    ) -> Measured:
        measure = _MEASURES[name]
        rows: list[float | None] = []
        if name == "perplexity_ratio":
            value, old, n = _ratio(report), None, 0
        elif measure.path is None:
            rows = [_share(name, row[name]) for row in probed]
            value = mean(rows)
            old = None if unedited is None else mean([_share(name, row[name]) for row in unedited])
            n = sum(len(row[name]) for row in probed) if name != "choice" else sum(map(bool, rows_of(probed, name)))
        else:
            value = _at(report.metrics, measure.path)
            old = _at(report.before, measure.path) if report.before else None
            rows = [] if name == "perplexity" else [_at(row, measure.path) for row in report.rows]
            n = report.n.get(measure.prompts, 0)
        why = "" if value is not None else self._why(name, report, compared)
        spread = interval(rows, self.of) if self.of and measure.share else None
        return Measured(name, measure.says, value, old, n, why, measure.share, interval=spread)

    def _why(self, name: str, report: EvaluationReport, compared: bool) -> str:
        """The reason why a measure could not be taken."""
        prompts = _MEASURES[name].prompts
        if name in self.probes.left_out:
            return self.probes.left_out[name]
        if prompts in report.n and not report.n[prompts]:
            return _NO_PROMPTS.format(prompts)
        return "the unedited model's head was changed" if compared else _BASE


def rows_of(probed: Sequence[Mapping[str, Any]], kind: str) -> list[Any]:
    """The answers to the probes of a kind, request after request."""
    return [row[kind] for row in probed]


def _share(kind: str, entries: Sequence[Mapping[str, Any]]) -> float | None:
    """A request's share of passed probes of a kind; None if it has none."""
    if not entries:
        return None
    if kind == "choice":  # the target comes first
        return float(all(entries[0]["logp"] > other["logp"] for other in entries[1:]))
    return mean([entry["begins"] for entry in entries])


def _ratio(report: EvaluationReport) -> float | None:
    now, old = report.metrics["perplexity"], report.before["perplexity"] if report.before else None
    return now / old if now and old else None


def _of_tasks(now: Mapping[str, float], old: Mapping[str, float], wanted: set[str]) -> list[Measured]:
    """Measures of tasks and of their changes, and of wanted tasks that were not run."""
    measures = []
    for task, raw in now.items():
        value, before = (x if x is None or math.isfinite(x) else None for x in (raw, old.get(task)))
        why = "" if value is not None else f"lm-eval gives {raw}"
        measures.append(Measured(TASK + task, f"lm-eval's {task}", value, before, why=why, share=False))
        change = None if value is None or before is None else value - before
        why = "" if change is not None else _BASE if task not in old else f"lm-eval gives {old[task]} and {raw}"
        measures.append(Measured(TASK_CHANGE + task, f"{task} now less before", change, why=why, share=False))
    names = {m.name for m in measures}
    lacking = sorted(name for name in wanted if name.startswith((TASK, TASK_CHANGE)) and name not in names)
    return measures + [Measured(name, "an lm-eval task", None, why=_NO_TASK, share=False) for name in lacking]


def _at(metrics: Mapping[str, Any], path: Sequence[str]) -> float | None:
    value: Any = metrics
    for name in path:
        value = value[name]
    return None if value is None else float(value)
