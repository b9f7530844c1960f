"""The picture of `fastedit tune`: what was written against what was kept, a point a trial."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from fastedit.requests import AnyPath
from fastedit.tensorfile import writing

if TYPE_CHECKING:
    from fastedit.evaluation.tune import TuneReport


def draw_front(report: TuneReport, path: AnyPath) -> None:
    """Write the PNG of `TuneReport.draw`."""
    figure = Figure(figsize=(6, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    front = report.front
    axes.plot([100 * t.kept for t in front], [100 * t.reliability for t in front], color="tab:blue", lw=1, zorder=1)
    for number, trial in enumerate(report.trials):
        if trial.error is None:
            on_front = any(trial is other for other in front)
            place = 100 * trial.kept, 100 * trial.reliability
            axes.scatter(*place, s=24, color="tab:blue" if on_front else "tab:gray", zorder=2)
            axes.annotate(str(number), place, textcoords="offset points", xytext=(4, 4), fontsize=7)
    best = report.best
    axes.scatter(100 * best.kept, 100 * best.reliability, s=90, facecolors="none", edgecolors="tab:red", zorder=3)
    axes.set_xlabel("kept, %: first tokens of neighbours, over the perplexity's ratio")
    axes.set_ylabel("written, %: edits, generated")
    axes.set_title(f"trial {report.trials.index(best)} is chosen", fontsize=9)
    axes.grid(alpha=0.3)
    with writing(path, "the picture was not written") as temporary:
        figure.savefig(temporary, format="png")
