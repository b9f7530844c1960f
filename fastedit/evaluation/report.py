"""The report on an edit: teacher-forced and generated shares, CounterFact's scores, perplexity.

`predict` measures a model with its current weights; `compare` makes a report from its results before and after
an edit.
"""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import compress
from typing import TYPE_CHECKING, Any

from torch import nn

from fastedit.errors import RequestError
from fastedit.evaluation.first_token import divergences
from fastedit.evaluation.page import PART
from fastedit.evaluation.predict import Answers, Prediction, Predictions, predict
from fastedit.evaluation.questions import KINDS
from fastedit.evaluation.sampling import draw, interval, mean
from fastedit.evaluation.texts import normalize
from fastedit.models import Model
from fastedit.requests import AnyPath, EditRequest, as_requests
from fastedit.tensorfile import writing

if TYPE_CHECKING:
    from rich.table import Table

Requests = AnyPath | Sequence[EditRequest | Mapping[str, Any]]

# measure -> the kind of prompt that it is taken on
_SHARES = {"reliability": "rewrite", "generalization": "paraphrase", "portability": "portability"}
_SHARES |= {"locality": "neighbour", "neighbour_accuracy": "neighbour"}
_PREFERENCES = {"es": "rewrite", "ps": "paraphrase", "ns": "neighbour"}
_WAYS = ("teacher_forced", "generated")
_BEGINS = tuple(name for name in _SHARES if name != "locality")
_FIRST = ("first_token", "kl")  # at the first token of neighbours' answers
_FORGOTTEN = ("generated", "probability")  # measures of answers to be forgotten
Pairs = Sequence[tuple[Prediction, Prediction]]


@dataclass(frozen=True)
class EvaluationReport:
    """The measures of an edit; prints as a table.

    ``metrics``, and ``before`` for the unedited model, hold shares in 0 … 1: "reliability", "generalization",
    "portability", "locality" and "neighbour_accuracy", each "teacher_forced" and "generated"; "generated_begins" with
    all of these but the locality; CounterFact's "es", "ps", "ns" and their harmonic mean "score". "first_token"
    and "kl" compare the first token of neighbours' answers with the unedited model: the share of equal likeliest
    tokens, and KL(unedited ‖ edited) in nats. "forgotten", for requests to forget, holds the share of prompts whose
    "generated" text does not say the answer, and the "probability" of the whole answer. The last one is "perplexity".
    What was not measured is None. Shares and "kl" are means over requests of the mean over a request's prompts. ``n``
    counts the prompts of each kind and of "es", "ps" and "ns". ``rows`` holds the measures of each request, the text
    "generated" for it, the mean log-probability "logp" of its target's tokens, and the "changed_neighbours", each
    with its "prompt" and the texts "before" and "after" the edit.

    ``chat_template``: prompts were a user's turn in the tokenizer's chat template.

    For a sample of ``of`` requests (None: all were measured), ``intervals`` holds the 95 % confidence interval of each
    share in ``metrics`` (`evaluation.sampling.interval`).
    """

    metrics: Mapping[str, Any]
    before: Mapping[str, Any] | None
    n: Mapping[str, int]
    rows: Sequence[Mapping[str, Any]]
    of: int | None = None
    chat_template: bool = False

    @property
    def intervals(self) -> dict[str, Any] | None:
        if self.of is None:
            return None
        intervals = _over_rows(self.rows, partial(interval, total=self.of))
        return {name: intervals[name] for name in intervals if name != "kl"}

    def to_dict(self) -> dict[str, Any]:
        """``metrics`` with the other attributes, and for a sample "sample" and "intervals"; for JSON."""
        content = {**self.metrics, "n": self.n, "before": self.before, "chat_template": self.chat_template}
        if self.of is not None:
            content |= {"sample": {"measured": len(self.rows), "of": self.of}, "intervals": self.intervals}
        return content

    def save(self, path: AnyPath) -> None:
        """Write `to_dict` and the rows (as "requests") as JSON, whole or not at all. Raises FileError."""
        text = json.dumps(self.to_dict() | {"requests": self.rows}, ensure_ascii=False, indent=1)
        with writing(path, "the report was not written") as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")

    def lines(self) -> list[tuple[str, str, str, str]]:
        """The table as lines of cells, the titles first."""
        now, old, spread = self.metrics, self.before or {}, self.intervals or {}
        lines = [("", "prompts", "teacher-forced", "generated")]
        for name, kind in _SHARES.items():
            forced, generated = (_share(now[name], old.get(name), spread.get(name), way) for way in _WAYS)
            lines.append((name.replace("_", " "), str(self.n[kind]), forced, generated))
            if name in _BEGINS:
                begins = _share(
                    now["generated_begins"], old.get("generated_begins"), spread.get("generated_begins"), name
                )
                lines.append((PART + "begins with it", "", "", begins))
            else:
                lines.append((PART + "first token", "", _share(now, None, spread, "first_token"), ""))
                lines.append((PART + "KL, nats", "", _cell(now["kl"], None, "{:.3g}"), ""))
        if self.n["forgotten"]:
            gone, was, limits = (measures.get("forgotten") or {} for measures in (now, old, spread))
            lines.append(("forgotten", str(self.n["forgotten"]), "", _share(gone, was, limits, "generated")))
            lines.append((PART + "probability", "", _share(gone, was, None, "probability"), ""))
        lines += [(name.upper(), str(self.n[name]), _share(now, old, spread, name), "") for name in _PREFERENCES]
        lines.append(("score", "", _cell(now["score"], old.get("score")), ""))
        lines.append(("perplexity", "", _cell(now["perplexity"], old.get("perplexity"), "{:.4g}"), ""))
        return lines

    def __rich__(self) -> Table:
        from rich import box
        from rich.table import Table

        titles, *lines = self.lines()
        table = Table(*titles, box=box.SIMPLE_HEAD, caption=self.about, caption_justify="left")
        for column in table.columns[1:]:
            column.justify = "right"
        for cells in lines:
            table.add_row(*cells)
        return table

    def __str__(self) -> str:
        table = self.lines()
        first, *others = (max(map(len, column)) for column in zip(*table, strict=True))
        lines = ["  ".join([f"{x:{first}}", *map(str.rjust, cells, others)]).rstrip() for x, *cells in table]
        return "\n".join([lines[0], "─" * len(lines[0]), *lines[1:], *filter(None, [self.about])])

    @property
    def about(self) -> str | None:
        """The line below the table."""
        if self.of is None:
            return None
        return (
            f"A sample: {len(self.rows)} of {self.of} requests; in brackets the 95 % interval (Wilson) of each share."
        )


def _cell(value: float | None, before: float | None, form: str = "{:.1%}") -> str:
    shown = "—" if value is None else form.format(value)
    return shown if before is None else f"{form.format(before)} → {shown}"


def _share(now: Mapping[str, Any], old: Mapping[str, Any] | None, spread: Mapping[str, Any] | None, name: str) -> str:
    """The cell of a share, with its interval if there is one."""
    limits = (spread or {}).get(name)
    return _cell(now[name], (old or {}).get(name)) + (f" [{limits[0]:.0%}, {limits[1]:.0%}]" if limits else "")


def compare(
    edits: Sequence[EditRequest], after: Predictions, before: Predictions | None = None, *, total: int | None = None
) -> EvaluationReport:
    """Make the report from the results of `predict` after an edit and, if measured, before it.

    Locality needs both: the share of answer tokens of neighbours whose argmax stays the same, and of neighbours
    whose normalized generated text does. "first_token" and "kl" need both, too; "kl" is None if a head changed after
    its `predict` and was not kept (``keep_head``). All else is measured for each model separately.

    Args:
        total: how many edits these are a sample of.

    Raises:
        RequestError: the neighbours before and after are not the same.
    """
    nothing: Answers = {kind: [] for kind in KINDS}
    earlier = before.answers if before else [nothing] * len(edits)
    pairs = [_pairs(now, old) for now, old in zip(after.answers, earlier, strict=True)]
    kl = iter(_divergences(after, before, [pair for of_request in pairs for pair in of_request]))
    apart = [[next(kl) for _ in of_request] for of_request in pairs]
    rows = [_row(*x) for x in zip(edits, after.answers, pairs, apart, strict=True)]
    n = {kind: sum(len(answers[kind]) for answers in after.answers) for kind in KINDS}
    for name, kind in _PREFERENCES.items():
        n[name] = sum(p.preferred is not None for answers in after.answers for p in answers[kind])
    unedited = [_row(request, answers, (), ()) for request, answers in zip(edits, earlier, strict=True)]
    total = total if total and total > len(edits) else None
    metrics, old = _average(rows, after), _average(unedited, before) if before else None
    return EvaluationReport(metrics, old, n, rows, total, after.chat_template)


def evaluate(
    network: nn.Module,
    tokenizer: Any,
    requests: Requests,
    *,
    sample: int | None = None,
    chat_template: bool = False,
    **options: Any,
) -> EvaluationReport:
    """Measure a model, on a sample of the requests if wanted. Locality needs an unedited model, so it is None.

    ``options`` are those of `predict`.

    Raises:
        RequestError, EditError: see `fastedit.requests.as_requests` and `predict`.
        ModelError: an architecture that is not supported.
    """
    checked = as_requests(requests)
    asked = draw(checked, sample)
    model = Model.of(network, tokenizer, chat_template=chat_template)
    return compare(asked, predict(model, asked, **options), total=len(checked))


def _pairs(now: Answers, old: Answers) -> Pairs:
    """The answers to a request's neighbours, after and before the edit."""
    both = now["neighbour"], old["neighbour"]
    pairs = list(zip(*both, strict=True)) if all(both) else []
    if any((a.prompt, a.answer) != (b.prompt, b.answer) for a, b in pairs):
        raise RequestError("the predictions before and after the edit are not of the same requests")
    return pairs


def _divergences(after: Predictions, before: Predictions | None, pairs: Pairs) -> Sequence[float | None]:
    """KL(before ‖ after) of each pair (after, before); None if it cannot be computed."""
    states = [(b.first, a.first) for a, b in pairs if a.first is not None and b.first is not None]
    new, old = after.head, before.head if before else None
    if len(states) < len(pairs) or not new or not old or not (new.stands and old.stands):
        return [None] * len(pairs)
    return divergences(old, new, [state for state, _ in states], [state for _, state in states])


def _row(request: EditRequest, now: Answers, pairs: Pairs, apart: Sequence[float | None]) -> dict[str, Any]:
    """All measures of one request."""
    row: dict[str, Any] = {"id": request.id, "prompt": request.prompt, "target": request.target}
    row["generated"] = next((p.generated for p in now["rewrite"]), None)
    row["logp"] = mean(p.logp for p in now["rewrite"])
    for name, kind in _SHARES.items():
        shares = (mean(mean(p.hits) for p in now[kind]), mean(p.matches for p in now[kind]))
        row[name] = dict(zip(_WAYS, shares, strict=True))
    row["generated_begins"] = {name: mean(p.begins for p in now[_SHARES[name]]) for name in _BEGINS}
    tokens = (mean(map(operator.eq, a.argmax, b.argmax)) for a, b in pairs)
    texts = [(a.prompt, b.generated, a.generated) for a, b in pairs if None not in (a.generated, b.generated)]
    changed = [normalize(str(before)) != normalize(str(after)) for _, before, after in texts]
    row["locality"] = {"teacher_forced": mean(tokens), "generated": mean(not moved for moved in changed)}
    names = ("prompt", "before", "after")
    row["changed_neighbours"] = [dict(zip(names, text, strict=True)) for text in compress(texts, changed)]
    row["first_token"], row["kl"] = mean(a.argmax[0] == b.argmax[0] for a, b in pairs), mean(apart)
    gone = (None if p.said is None else not p.said for p in now["forgotten"])
    probabilities = (math.exp(p.logp * len(p.hits)) for p in now["forgotten"])
    row["forgotten"] = {"generated": mean(gone), "probability": mean(probabilities)}
    return row | {name: mean(p.preferred for p in now[kind]) for name, kind in _PREFERENCES.items()}


def _over_rows(rows: Sequence[Mapping[str, Any]], summary: Callable[[list[float | None]], Any]) -> dict[str, Any]:
    """Apply ``summary`` to the values of each measure over the requests."""
    result: dict[str, Any] = {name: summary([row[name] for row in rows]) for name in (*_PREFERENCES, *_FIRST)}
    for name, parts in (("generated_begins", _BEGINS), ("forgotten", _FORGOTTEN), *((name, _WAYS) for name in _SHARES)):
        result[name] = {part: summary([row[name][part] for row in rows]) for part in parts}
    return result


def _average(rows: Sequence[Mapping[str, Any]], predictions: Predictions) -> dict[str, Any]:
    result = _over_rows(rows, mean)
    es, ps, ns = (result[name] for name in _PREFERENCES)
    score = None if None in (es, ps, ns) else 3 / (1 / es + 1 / ps + 1 / ns) if es * ps * ns else 0.0
    return result | {"score": score, "perplexity": predictions.perplexity}
