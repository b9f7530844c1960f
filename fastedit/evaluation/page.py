"""Self-contained HTML pages, light and dark, also for phones; and the page of `fastedit check`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import islice
from typing import Any

from fastedit.evaluation.thresholds import Measured

PART = "  "
"""Prefix of a title that belongs to the line above it."""
_SHOWN = 200  # items of a list that are shown
_TEXT = 300  # characters of a text that are shown
_STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --ink: #1b1f24; --faint: #5d6673; --line: #dde1e7;
  --bar: #3b6fd4; --good: #1a7f4b; --bad: #c2303a; }
@media (prefers-color-scheme: dark) { :root { --page: #14171b; --card: #1d2126; --ink: #e7eaee; --faint: #9aa4b1;
  --line: #343a42; --bar: #6f9bf0; --good: #4cc38a; --bad: #ff7b82; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .75rem; }
.faint, dt { color: var(--faint); font-size: .875rem; }
.good { color: var(--good); } .bad { color: var(--bad); }
.verdict { border-left: .375rem solid currentColor; padding: .25rem 0 .25rem .75rem; margin: 1rem 0; font-weight: 600; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; }
.measure { display: grid; grid-template-columns: minmax(0, 5fr) minmax(0, 4fr) 9rem 5.5rem; gap: .25rem 1rem;
  align-items: center; padding: .6rem 1rem; border-top: 1px solid var(--line); }
.measure:first-child, details:first-child { border-top: 0; }
.numbers { text-align: right; font-variant-numeric: tabular-nums; }
.bar { position: relative; height: .625rem; border-radius: .25rem; background: var(--line); }
.bar i, .bar b { position: absolute; top: 0; bottom: 0; }
.bar i { left: 0; border-radius: .25rem; background: var(--bar); }
.bar b { width: 2px; margin-left: -1px; top: -.25rem; bottom: -.25rem; background: var(--ink); }
.bar b.before { background: none; border-left: 2px dotted var(--faint); }
details { border-top: 1px solid var(--line); padding: .5rem 1rem; }
summary { cursor: pointer; overflow-wrap: anywhere; }
dl { margin: .5rem 0 .25rem 1rem; overflow-wrap: anywhere; } dd { margin: 0 0 .5rem; }
@media (max-width: 40rem) {
  .measure { grid-template-columns: 1fr auto; } .measure > :first-child { grid-column: 1 / 3; }
  .measure > .place { grid-column: 1 / 3; grid-row: 2; } .measure > .numbers { text-align: left; } }
"""


def frame(title: str, body: str, style: str = "") -> str:
    """A whole page."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}{style}</style></head><body><main>{body}</main></body></html>\n"
    )


def quoted(text: str) -> str:
    """A user's or a model's text, isolated: one from right to left would turn round what stands beside it."""
    return f"<bdi>{escape(cut(text))}</bdi>"


def cut(text: str, length: int = _TEXT) -> str:
    """A text, shortened if it is too long for a page."""
    return text if len(text) <= length else f"{text[:length]}…"


def size(n: float) -> str:
    """A number of bytes in MiB or GiB."""
    return "0" if not n else f"{n / 2**30:.3g} GiB" if n >= 2**30 else f"{n / 2**20:.3g} MiB"


def more_in(items: Iterable[str], n: int, file: str) -> tuple[list[str], str]:
    """The first items of a list of n, and a line that says where the others are."""
    more = f'<p class="faint">{n - _SHOWN} more in {file}.</p>' if n > _SHOWN else ""
    return list(islice(items, _SHOWN)), more


def page(
    measures: Sequence[Measured],
    rows: Sequence[Mapping[str, Any]],
    about: Mapping[str, Any],
    total: int | None,
    broken: str = "",
) -> str:
    """The page of a `CheckReport` as HTML."""
    bounded, missed = [m for m in measures if m.bound], [m.name for m in measures if m.passed is False]
    if broken:
        verdict = f'<p class="verdict bad">The edited model cannot be measured: {escape(broken)}</p>'
    elif not bounded:
        verdict = '<p class="verdict">Measured without thresholds.</p>'
    elif not missed:
        verdict = f'<p class="verdict good">All {len(bounded)} thresholds are kept.</p>'
    else:
        verdict = (
            f'<p class="verdict bad">{len(missed)} of {len(bounded)} thresholds missed: {escape(", ".join(missed))}</p>'
        )
    sample = f", a sample of {total}" if total else ""
    details = "; ".join(f"{name}: {value}" for name, value in about.items() if value)
    body = (
        f'<h1>Does the edited model still work?</h1><p class="faint">{len(rows)} edits{sample}. {escape(details)}</p>'
        f'{verdict}<h2>Measures</h2><div class="card">{"".join(map(_measure, measures))}</div>'
        '<p class="faint">Bar: now. Dotted mark: before the edit. Solid mark: the threshold.</p>'
        f"<h2>Edits</h2>{_requests(rows)}"
    )
    return frame("fastedit check", body)


def _measure(m: Measured) -> str:
    says = f"{escape(m.says)}{f' ({m.n} prompts)' if m.n else ''}"
    name = f'<div><strong>{escape(m.name)}</strong><br><span class="faint">{says}</span></div>'
    if m.value is None:
        cell = f'<div class="place faint">{escape(m.why)}</div>'
    else:
        cell = f'<div class="place">{_bar(m, m.value) if m.share else ""}</div>'
    now = m.shown(m.value) if m.before is None else f"{m.shown(m.before)} → {m.shown(m.value)}"
    spread = f'<br><span class="faint">{m.interval[0]:.0%} … {m.interval[1]:.0%}</span>' if m.interval else ""
    verdict = {None: "", True: '<span class="good">passed</span>', False: '<span class="bad">missed</span>'}[m.passed]
    wanted = f'{verdict}<br><span class="faint">{m.wanted}</span>' if m.bound else ""
    return f'<div class="measure">{name}{cell}<div class="numbers">{now}{spread}</div><div>{wanted}</div></div>'


def _bar(m: Measured, value: float) -> str:
    marks = [] if m.before is None else [("before", m.before)]
    marks += [("", end) for end in ((m.bound.min, m.bound.max) if m.bound else ()) if end is not None]
    drawn = "".join(f'<b class="{kind}" style="left:{100 * position:.1f}%"></b>' for kind, position in marks)
    return f'<div class="bar"><i style="width:{100 * value:.1f}%"></i>{drawn}</div>'


def _requests(rows: Sequence[Mapping[str, Any]]) -> str:
    """The edits, those first that are not written."""
    ordered = sorted(rows, key=lambda row: bool(row["begins"]))
    shown, more = more_in(map(_request, ordered), len(rows), "check.json")
    return f'<div class="card">{"".join(shown)}</div>{more}'


def _request(row: Mapping[str, Any]) -> str:
    mark = '<span class="good">✓</span>' if row["begins"] else '<span class="bad">✗</span>'
    generated = quoted(str(row["generated"] or "nothing"))
    entries = [("wanted", row["target"])]
    for kind, probes in row.items():
        if kind.startswith(("prefix_", "negation")):
            entries += [
                (f"{kind.replace('_', ' of ')}: …{probe['prompt'][-80:]}", probe["generated"]) for probe in probes
            ]
    if row["choice"]:
        ranked = sorted(row["choice"], key=lambda option: -option["logp"])
        entries.append(
            ("choice, log-probability of a token", ", ".join(f"{o['answer']} {o['logp']:.2f}" for o in ranked))
        )
    details = "".join(f"<dt>{escape(title)}</dt><dd>{escape(str(text))}</dd>" for title, text in entries)
    summary = f"<summary>{mark} {quoted(row['prompt'])} → <strong>{generated}</strong></summary>"
    return f"<details>{summary}<dl>{details}</dl></details>"
