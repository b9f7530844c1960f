"""Parts of the tables: a figure as text, a table in Markdown, a table for each device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from benchmarks.rows import Row

MISSING = "not measured"
Lines = list[str]


def on_gpu(row: Row) -> bool:
    return not row.device.endswith(("thread", "threads"))


def seconds(value: float) -> str:
    if value >= 999.5:
        return f"{value:,.0f} s"
    for factor, unit in ((1, "s"), (1e3, "ms")):
        if value * factor >= 1:
            return f"{value * factor:.3g} {unit}"
    return f"{value * 1e6:.3g} µs"


def memory(row: Row | None) -> str:
    if row is None or row.peak_memory is None:
        return MISSING
    return f"{row.peak_memory / 2**20:.3g} MiB" if row.peak_memory < 1e9 else f"{row.peak_memory / 2**30:.3g} GiB"


def ratio(base: Row, ours: Row) -> str:
    value = base.p50 / ours.p50
    return f"{value:.2f}" + " (slower)" * (value < 1)


def quality(row: Row | None) -> str:
    if row is None:
        return MISSING
    return f"{row.p50:.2f}" if row.unit == "perplexity" else f"{row.p50:.1%}"


def table(head: Sequence[str], body: Iterable[Sequence[str]]) -> Lines:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *body)]


def together(shapes: Sequence[str]) -> str:
    """Join several sizes: "N=16, d=8" and "N=32, d=8" become "N=16/N=32, d=8"."""
    return ", ".join("/".join(dict.fromkeys(part)) for part in zip(*(s.split(", ") for s in shapes), strict=True))


def by_case(rows: Iterable[Row]) -> dict[tuple[str, ...], dict[str, Row]]:
    """(benchmark, mode, shape, dtype) -> provider -> row, for rows of one device and unit."""
    cases: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        cases.setdefault((row.benchmark, row.mode, row.shape, row.dtype), {})[row.provider] = row
    return cases


def source(rows: Sequence[Row]) -> str:
    commits = ", ".join(f"`{commit}`" for commit in sorted({row.commit for row in rows}))
    return f"{rows[0].device}; {', '.join(sorted({row.version for row in rows}))}; commit {commits}"


def each_device(rows: Sequence[Row], draw: Callable[[Sequence[Row]], Lines], gpu: Lines | None = None) -> Lines:
    """A table for each device, CPUs first; `gpu` is shown if no GPU was measured."""
    lines: Lines = []
    for kind, wanted, otherwise in (("CPU", False, None), ("GPU", True, gpu)):
        devices = dict.fromkeys(row.device for row in rows if on_gpu(row) == wanted)
        for device in devices:
            own = [row for row in rows if row.device == device]
            lines += [source(own) + ":", "", *draw(own), ""]
        if not devices:
            lines += otherwise or [f"{kind}: {MISSING}.", ""]
    return lines[:-1]
