"""The plot of `fastedit tune`: what was written against what was kept, with a point for each trial."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from fastedit.requests import AnyPath
from fastedit.tensorfile import writing


def draw_front(
    trials: Sequence[tuple[int, float, float]], front: Sequence[tuple[float, float]], chosen: int, path: AnyPath
) -> None:
    """Write the PNG of `TuneReport.draw`.

    Args:
        trials: number, share kept and share written of each trial.
        front: share kept and share written of the trials on the front, in order.
        chosen: number of the chosen trial.
    """
    figure = Figure(figsize=(6, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.plot([100 * kept for kept, _ in front], [100 * written for _, written in front], color="tab:blue", lw=1)
    for number, kept, written in trials:
        point = 100 * kept, 100 * written
        axes.scatter(*point, s=24, color="tab:blue" if (kept, written) in front else "tab:gray", zorder=2)
        axes.annotate(str(number), point, textcoords="offset points", xytext=(4, 4), fontsize=7)
        if number == chosen:
            axes.scatter(*point, s=90, facecolors="none", edgecolors="tab:red", zorder=3)
    axes.set_xlabel("kept, %: first tokens of neighbours, over the perplexity's ratio")
    axes.set_ylabel("written, %: edits, generated")
    axes.set_title(f"trial {chosen} is chosen", fontsize=9)
    axes.grid(alpha=0.3)
    with writing(path, "the picture was not written") as temporary:
        figure.savefig(temporary, format="png")
