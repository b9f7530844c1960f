"""The page of `fastedit edit`: what was edited, how fast it was learned, what it cost, and what went wrong."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from fastedit.evaluation.page import PART, cut, frame, more_in, quoted, size
from fastedit.evaluation.report import EvaluationReport

_POINTS = 300  # points of a curve, at most
_ALL = "report.json"  # the file with what the page leaves out
_STYLE = """
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .75rem; }
.figures > div, figure { padding: .75rem 1rem; margin: 0; } .figures strong { display: block; font-size: 1.25rem; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(18rem, 100%), 1fr)); gap: .75rem; }
svg { display: block; width: 100%; height: 7rem; margin: .5rem 0 .25rem; border: 0 solid var(--line);
  border-width: 1px 0; }
path { fill: none; stroke: var(--bar); stroke-width: 2; vector-effect: non-scaling-stroke; stroke-linecap: round; }
.ends { display: flex; justify-content: space-between; }
.share { display: grid; grid-template-columns: minmax(0, 6rem) minmax(0, 1fr) 8.5rem; gap: 1rem; align-items: center;
  padding: .5rem 1rem; border-top: 1px solid var(--line); } .share:first-child { border-top: 0; }
.wide { overflow-x: auto; padding: .5rem 1rem; } table { border-collapse: collapse; width: 100%; }
th, td { padding: .2rem .6rem .2rem 0; text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; } th { color: var(--faint); font-weight: 400; font-size: .875rem; }
@media (max-width: 40rem) { .share { grid-template-columns: 5.5rem minmax(0, 1fr) 8.5rem; gap: .5rem; }
  .wide { padding: .5rem; overflow-wrap: normal; } th, td { white-space: normal; padding-right: .3rem; }
  td { font-size: .8125rem; } th, td .faint { font-size: .75rem; } }
ul.card { list-style: none; padding: 0; margin: 0; overflow-wrap: anywhere; }
ul.card > li { padding: .5rem 1rem; border-top: 1px solid var(--line); } ul.card > li:first-child { border-top: 0; }
"""


def edit_page(did: Mapping[str, Any], report: EvaluationReport | None) -> str:
    """The page as HTML.

    Args:
        did: the value of "edit" in report.json.
        report: the measures, if there are any.
    """
    rows = report.rows if report else []
    changed = [(row["prompt"], neighbour) for row in rows for neighbour in row["changed_neighbours"]]
    parts = [
        _summary(did),
        _curves(did),
        _stages(did),
        _memory(did["memory"]),
        _quality(report),
        _worst(rows),
        _section(
            "Neighbours whose answer changed",
            (_neighbour(prompt, neighbour) for prompt, neighbour in changed),
            len(changed),
        ),
        _section("Conflicts", map(_conflict, did["conflicting"]), len(did["conflicting"])),
        _section("Not learned", map(_unlearned, did["unlearned"]), len(did["unlearned"])),
        _section("Notes", (f"<li>{escape(cut(note, 1000))}</li>" for note in did["notes"]), len(did["notes"])),
        _choices(did),
    ]
    return frame("fastedit edit", "".join(parts), _STYLE)


def _summary(did: Mapping[str, Any]) -> str:
    n, seconds = did["requested"], did["seconds"]
    learned = n - len(did["unlearned"])
    details = "; ".join(f"{name}: {cut(str(did[name]))}" for name in ("method", "model", "requests") if did.get(name))
    if did["interrupted"]:
        verdict, kind = f"Interrupted: {did['interrupted']}.", "bad"
    else:
        verdict, kind = f"{learned} of {n} edits learned.", "good" if learned == n else ""
    figures = {
        "edits learned": f"{learned / max(n, 1):.1%}",
        "edits/s": f"{n / max(seconds, 1e-9):.4g}",
        "the edit took": _time(seconds),
        "slowest stage": did["slowest"] or "—",
    }
    shown = "".join(
        f'<div class="card"><strong>{escape(value)}</strong><span class="faint">{name}</span></div>'
        for name, value in figures.items()
    )
    return (
        f'<h1>What this edit did</h1><p class="faint">{escape(details)}</p>'
        f'<p class="verdict {kind}">{escape(verdict)}</p><div class="figures">{shown}</div>'
    )


def _curves(did: Mapping[str, Any]) -> str:
    unit = "epoch" if "epochs" in did["config"] else "batch"
    loss = _curve("Mean loss", did["losses"], max(filter(math.isfinite, did["losses"]), default=0.0), "{:.3g}", unit)
    learned = _curve("Edits learned", did["learned"], did["requested"], "{:.0f}", unit)
    return f'<h2>Learning</h2><div class="curves">{loss}{learned}</div>'


def _curve(title: str, values: Sequence[float], top: float, form: str, unit: str) -> str:
    """A line chart from 0 to `top`; the last value is shown after the title."""
    points = [(i, value) for i, value in enumerate(values) if math.isfinite(value)]
    if not points:
        return f'<figure class="card">{title}: <span class="faint">nothing was noted</span></figure>'
    last = points[-1][1]
    step = -(-len(points) // _POINTS)
    drawn = points[:-1:step] + points[-1:]
    right = max(len(values) - 1, 1)
    places = [(100 * i / right, 96 - 92 * value / (top or 1)) for i, value in drawn]
    line = "M" + "L".join(f"{x:.2f} {y:.2f}" for x, y in places) if len(places) > 1 else f"M0 {places[0][1]:.2f}h100"
    span = f"{unit} 1" if len(values) == 1 else f"{unit}s 1 … {len(values)}"
    label = f"{title}: {form.format(points[0][1])} to {form.format(last)}"
    return (
        f'<figure class="card"><figcaption class="ends"><span>{title}</span><strong>{form.format(last)}</strong>'
        f'</figcaption><svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img" aria-label="{label}">'
        f'<path d="{line}"></path></svg>'
        f'<div class="faint ends"><span>{span}</span><span>0 … {form.format(top)}</span></div></figure>'
    )


def _stages(did: Mapping[str, Any]) -> str:
    stages, whole = did["stages"], max(sum(did["stages"].values()), 1e-9)
    rows = "".join(
        f'<div class="share"><span>{escape(name)}</span>'
        f'<div class="bar"><i style="width:{100 * taken / whole:.1f}%"></i></div>'
        f'<span class="numbers">{_time(taken)}, {taken / whole:.0%}</span></div>'
        for name, taken in sorted(stages.items(), key=lambda stage: -stage[1])
    )
    slowest = f'<p class="faint">The slowest stage: {escape(did["slowest"])}.</p>' if did["slowest"] else ""
    return f'<h2>Time</h2><div class="card">{rows}</div>{slowest}'


def _memory(memory: Mapping[str, Any]) -> str:
    lines = [("", "most", "of it cached states")]
    cached = memory["cached states"]
    host = cached.get("host", 0) + cached.get("pinned", 0)
    for tier, states in (("device", cached.get("device", 0)), ("host", host), ("file", cached.get("file", 0))):
        if (most := memory[tier]) is not None:
            lines.append((tier, size(most), size(states)))
    return f"<h2>Memory</h2>{_table(lines)}"


def _quality(report: EvaluationReport | None) -> str:
    if report is None:
        return '<h2>Quality</h2><p class="faint">Not measured (--no-evaluate).</p>'
    caption = f'<p class="faint">{escape(report.about or "Before → after the edit.")}</p>'
    return f"<h2>Quality</h2>{_table(report.lines())}{caption}"


def _table(lines: Sequence[Sequence[str]]) -> str:
    titles, *rows = lines
    head = "".join(f"<th>{escape(cell)}</th>" for cell in titles)
    body = "".join(f"<tr>{''.join(f'<td>{_cell(cell)}</td>' for cell in cells)}</tr>" for cells in rows)
    return f'<div class="card wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(text: str) -> str:
    return f'<span class="faint">&emsp;{escape(text.strip())}</span>' if text.startswith(PART) else escape(text)


def _worst(rows: Sequence[Mapping[str, Any]]) -> str:
    """The edits that were not written, the least probable first."""
    missed = [row for row in rows if not row["generated_begins"]["reliability"] and row["logp"] is not None]
    missed.sort(key=lambda row: row["logp"])
    items = (
        f'<li>{quoted(row["prompt"])}<br><span class="bad">{quoted(row["generated"] or "nothing")}</span>'
        f' <span class="faint">instead of</span> {quoted(row["target"])}'
        f' <span class="faint">(a token of it has a probability of {math.exp(row["logp"]):.2g})</span></li>'
        for row in missed
    )
    return _section("The worst edits, and what the model says now", items, len(missed))


def _neighbour(prompt: str, one: Mapping[str, Any]) -> str:
    return (
        f"<li>{quoted(one['prompt'])}<br>{quoted(one['before'] or 'nothing')} → "
        f"<strong>{quoted(one['after'] or 'nothing')}</strong><br>"
        f'<span class="faint">a neighbour of: {quoted(prompt)}</span></li>'
    )


def _conflict(conflict: Mapping[str, Any]) -> str:
    targets = "; ".join(
        f"{quoted(target['target'])} (id {quoted(', '.join(map(str, target['ids'])))})"
        for target in conflict["targets"][:20]
    )
    return f'<li>{quoted(conflict["prompt"])}<br><span class="faint">targets:</span> {targets}</li>'


def _unlearned(one: Mapping[str, Any]) -> str:
    name = f"{quoted(str(one['id']))}: " if one["id"] is not None else ""
    return f'<li>{name}{quoted(one["prompt"])}<br><span class="faint">{escape(cut(one["why"]))}</span></li>'


def _section(title: str, items: Iterable[str], n: int) -> str:
    """A list of items, cut if it is long, under a title with their number; empty without items."""
    if not n:
        return ""
    shown, more = more_in(items, n, _ALL)
    return f'<h2>{title} ({n})</h2><ul class="card">{"".join(shown)}</ul>{more}'


def _choices(did: Mapping[str, Any]) -> str:
    choices = {**did["config"], **{f"version of {name}": value for name, value in did["versions"].items()}}
    choices |= {"chat template": did["chat_template"], "fingerprint": did["fingerprint"]}
    lines = "".join(f"<dt>{escape(name)}</dt><dd>{escape(cut(str(value)))}</dd>" for name, value in choices.items())
    return f'<h2>Choices</h2><div class="card"><details><summary>All settings</summary><dl>{lines}</dl></details></div>'


def _time(seconds: float) -> str:
    minutes = int(seconds) // 60
    if minutes < 2:
        return f"{seconds:.3g} s"
    if minutes < 10:
        return f"{minutes} min {int(seconds) % 60} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
