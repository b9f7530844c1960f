"""The heat map of `fastedit locate`: blocks × modules, with a panel for each measure."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure

from fastedit.evaluation.cells import RATIOS, SHARES, LocateCell
from fastedit.requests import AnyPath
from fastedit.tensorfile import writing

_WRITTEN = 40  # most blocks for which the picture has room for numbers


def draw(cells: Sequence[LocateCell], path: AnyPath) -> None:
    """Write the PNG of `LocateReport.draw`."""
    blocks = sorted({cell.block for cell in cells})
    modules = list(dict.fromkeys(cell.module for cell in cells))
    taken = [name for name in SHARES + RATIOS if any(getattr(c, name) is not None for c in cells)]
    size = 2.5 + 0.45 * min(len(blocks), _WRITTEN), len(taken) * (1 + 0.35 * len(modules))
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    panels = figure.subplots(len(taken), squeeze=False)[:, 0]
    for name, axes in zip(taken, panels, strict=True):
        unit = 100 if name in SHARES else 1
        known = {(c.module, c.block): unit * value for c in cells if (value := getattr(c, name)) is not None}
        values = [[known.get((module, block), math.nan) for block in blocks] for module in modules]
        scale = Normalize(0, max(unit, *known.values()))
        if name == "perplexity_ratio":
            scale = LogNorm(min(1.0, *known.values()), max(2.0, *known.values()))
        colors = "viridis_r" if name == "perplexity_ratio" else "viridis"
        image = axes.imshow(values, colors, norm=scale, aspect="auto")
        figure.colorbar(image, ax=axes).ax.tick_params(which="both", labelsize=7)
        axes.set_title(f"{name}, %" if unit > 1 else name.replace("_ratio", " after / before"), fontsize=9)
        axes.set_yticks(range(len(modules)), modules, fontsize=7)
        step = -(-len(blocks) // _WRITTEN)
        axes.set_xticks(range(0, len(blocks), step), blocks[::step], fontsize=7)
        for y, row in enumerate(values if len(blocks) <= _WRITTEN else []):
            for x, value in enumerate(row):
                red, green, blue, _ = image.cmap(scale(value))
                bright = math.isnan(value) or 0.3 * red + 0.6 * green + 0.1 * blue > 0.5
                color = "black" if bright else "white"
                axes.text(x, y, _short(value, unit), color=color, fontsize=7, ha="center", va="center")
    panels[-1].set_xlabel("block")
    with writing(path, "the report was not written") as temporary:
        figure.savefig(temporary, format="png")


def _short(value: float, unit: int) -> str:
    """A percentage without decimals, or a ratio with at most three digits."""
    if math.isnan(value):
        return "—"
    return f"{value:.0f}" if unit > 1 else f"{value:.2f}" if value < 9.995 else f"{value:.2g}"
