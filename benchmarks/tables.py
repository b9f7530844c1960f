"""Write the tables of README.md and benchmarks/README.md from the results file.

    python -m benchmarks.tables           # --check to fail if they differ, --show NAME to print one

A table is between `<!-- results:NAME -->` and `<!-- /results -->`. A figure is the median of the latest row of its key,
or "not measured".
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

if not __package__:  # run as a file; imports are from the root
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
from benchmarks.cells import (
    MISSING,
    Lines,
    by_case,
    each_device,
    memory,
    on_gpu,
    quality,
    ratio,
    seconds,
    table,
    together,
)
from benchmarks.rows import ROOT, Row, latest, read
from benchmarks.scaling import EXPECTED, fits

FILES = (ROOT / "README.md", ROOT / "benchmarks" / "README.md")
_MARKED = re.compile(r"(<!-- results:(\S+) -->\n).*?(<!-- /results -->)", re.DOTALL)
KERNELS = {
    "localized_adam": "localized Adam",
    "rank_k_solve": "rank-k",
    "target_cross_entropy": "cross-entropy",
    "rms_norm": "RMS norm",
    "gated_activation": "gated activation",
}

# (name, benchmark, mode, sizes): the lines of the table in the main README
HEADLINES = (
    (
        "LocFT-BF",
        "locft_bf",
        "LocFT-BF",
        (
            "300 edits (zsre_3k), small Llama, batch 100, 4 epochs",
            "300 edits (fact world), 1b Llama, batch 100, 4 epochs",
        ),
    ),
    (
        "MEMIT",
        "memit",
        "MEMIT",
        ("64 edits, small Llama, 4 layers, 25 steps", "16 edits, 1b Llama, 4 layers, 10 steps"),
    ),
    ("MEMIT's solve alone", "rank_k_against_direct", "solve alone", ("d=4096, N=32",)),
    ("second moments", "covariance", "run", ("128 documents, 5 of 8 layers",)),
    *((f"{name}, fact world", "end_to_end", name, ("1000 edits",)) for name in ("LocFT-BF", "MEMIT", "EMMET", "ROME")),
)

Pair = tuple[Row | None, Row]
"""The published procedure's time, if measured, and ours."""


def headlines(rows: Sequence[Row]) -> list[tuple[str, str, dict[str, Pair]]]:
    """Name, size, and device -> times for each comparison; without devices if it was not measured.

    A size is listed if a device timed both the published procedure and ours.
    """
    times = [row for row in rows if row.unit == "s"]
    lines = []
    for what, benchmark, mode, sizes in HEADLINES:
        listed: list[tuple[str, str, dict[str, Pair]]] = []
        for size in sizes:
            own = [row for row in times if (row.benchmark, row.mode, row.shape) == (benchmark, mode, size)]
            theirs = {row.device: row for row in own if row.provider == "published"}
            pairs = {row.device: (theirs.get(row.device), row) for row in own if row.provider == "ours"}
            if theirs.keys() & pairs.keys():
                listed.append((what, size, pairs))
        lines += listed or [(what, sizes[0], {})]
    return lines


def headline(rows: Sequence[Row]) -> Lines:
    """The main table: a line for each comparison with the published procedure, a column for each device."""
    compared = headlines(rows)
    measured = {device: pair[1] for *_, pairs in compared for device, pair in pairs.items()}
    devices = sorted(measured, key=lambda device: (on_gpu(measured[device]), device))
    kinds = {on_gpu(row) for row in measured.values()}
    missing = [kind for kind, gpu in (("CPU", False), ("GPU", True)) if gpu not in kinds]

    def cell(pair: Pair | None) -> str:
        if pair is None:
            return MISSING
        theirs, ours = pair
        if theirs is None:
            return f"{MISSING} → {seconds(ours.p50)}"
        return f"{seconds(theirs.p50)} → {seconds(ours.p50)}, **{ratio(theirs, ours)}×**"

    lines = table(
        ("published → ours", "size", *devices, *missing),
        (
            (what, size, *map(cell, map(pairs.get, devices)), *[MISSING] * len(missing))
            for what, size, pairs in compared
        ),
    )
    if measured:
        commits = sorted({row.commit for *_, pairs in compared for pair in pairs.values() for row in pair if row})
        lines += ["", f"Measured at commits {', '.join(f'`{commit}`' for commit in commits)}."]
    return lines


def title(benchmark: str, mode: str) -> str:
    return KERNELS.get(benchmark, mode) + f" {mode}" * (mode in ("solve", "update"))


def operations(own: Sequence[Row]) -> Lines:
    """A line for each of our operations, with the times of others."""
    head = ("operation", "size", "dtype", "ours", "share of floor", "peak memory", "others' time over ours")
    body = []
    for (benchmark, mode, shape, dtype), by_provider in by_case(row for row in own if row.unit == "s").items():
        ours = by_provider.get("ours")
        others = [row for name, row in by_provider.items() if not name.startswith("ours")]
        against = "; ".join(f"{row.provider}: {ratio(row, ours)}, {memory(row)}" for row in others if ours)
        share = f"{ours.floor_share:.0%}" if ours and ours.floor_share else MISSING
        time = seconds(ours.p50) if ours else MISSING
        body.append((title(benchmark, mode), shape, dtype, time, share, memory(ours), against or MISSING))
    return table(head, body)


def kernels(rows: Sequence[Row]) -> Lines:
    from benchmarks.kernels import cases

    planned: dict[tuple[str, str], list[str]] = {}
    for case in cases(torch.device("cuda")):
        planned.setdefault((title(case.benchmark, case.mode), case.dtype), []).append(case.shape)
    missing = ((name, together(shapes), dtype, *[MISSING] * 4) for (name, dtype), shapes in planned.items())
    gpu = ["GPU:", "", *operations([])[:2], *table((), missing)[2:], ""]
    return each_device([row for row in rows if row.benchmark in KERNELS], operations, gpu=gpu)


def covariance(rows: Sequence[Row]) -> Lines:
    def draw(own: Sequence[Row]) -> Lines:
        lines = operations(own)
        for (_, _, shape, dtype), by_provider in by_case(row for row in own if row.unit == "relative error").items():
            errors = ", ".join(f"{row.provider} {row.p50:.1e}" for row in by_provider.values())
            lines += ["", f"Relative error of the sum of {shape}, {dtype}: {errors}."]
        return lines

    return each_device([row for row in rows if row.benchmark == "covariance"], draw)


def against_published(*benchmarks: str) -> Callable[[Sequence[Row]], Lines]:
    head = ("", "size", "published", "ours", "ratio", "peak memory, published", "ours", "relative difference")

    def draw(own: Sequence[Row]) -> Lines:
        apart = {key[:3]: f["ours"] for key, f in by_case(r for r in own if r.unit == "difference").items()}
        body = []
        for key, by_provider in by_case(row for row in own if row.unit == "s").items():
            ours, theirs, other = by_provider.get("ours"), by_provider.get("published"), apart.get(key[:3])
            if ours is None:
                continue
            body.append((
                ours.mode or ours.benchmark, ours.shape, seconds(theirs.p50) if theirs else MISSING, seconds(ours.p50),
                f"**{ratio(theirs, ours)}**" if theirs else MISSING, memory(theirs), memory(ours),
                f"{other.p50:.1e}" if other else MISSING,
            ))  # fmt: skip
        return table(head, body)

    return lambda rows: each_device([row for row in rows if row.benchmark in benchmarks], draw)


def end_to_end(rows: Sequence[Row]) -> Lines:
    head = ("method", "by", "size", "edits/s", "peak memory")

    def draw(own: Sequence[Row]) -> Lines:
        units = list(dict.fromkeys(row.unit for row in own if row.unit != "s"))
        body = []
        for row in own:
            if row.unit != "s":
                continue
            by_unit = {x.unit: x for x in own if x.key[:-1] == row.key[:-1]}
            speed = f"{int(row.shape.split()[0]) / row.p50:.3g}"
            measures = (quality(by_unit.get(unit)) for unit in units)
            body.append((row.mode, row.provider, row.shape, speed, memory(row), *measures))
        return table((*head, *units), body)

    return each_device([row for row in rows if row.benchmark == "end_to_end"], draw)


def shapes(rows: Sequence[Row]) -> Lines:
    """Speed on random models of published shapes: a line for each way; then the shares of time."""
    speeds = ("edits/s", "edits/s without the prefix")

    def draw(own: Sequence[Row]) -> Lines:
        times, cells = [row for row in own if row.unit == "s"], {(*row.key[1:4], row.unit): row for row in own}
        body, parts = [], []
        for row in times:
            n, ours = int(row.shape.split()[0]), cells.get(("ours", row.mode, row.shape, "s"))
            without = cells.get((*row.key[1:4], speeds[1]))
            more = f"{without.p50:.3g}" if without else ""
            share = f"{row.floor_share:.0%}" if row.floor_share else ""
            against = ratio(row, ours) if ours and row is not ours else ""
            speed = f"{n / row.p50:.3g}"
            body.append((row.mode, row.shape, row.provider, seconds(row.p50), speed, more, share, memory(row), against))
        for mode, shape in dict.fromkeys((row.mode, row.shape) for row in own):
            shares = [r for r in own if (r.mode, r.shape) == (mode, shape) and r.unit not in ("s", *speeds)]
            if shares:
                parts.append((mode, shape, "; ".join(f"{row.unit} {row.p50:.1%}" for row in shares)))
        head = ("", "size", "by", "time", *speeds, "share of the ceiling", "peak memory", "time over ours")
        return [*table(head, body), "", *table(("", "size", "where ours spends its time"), parts)]

    return each_device([row for row in rows if row.benchmark == "shapes"], draw)


def measures(benchmark: str) -> Callable[[Sequence[Row]], Lines]:
    """A table of quality: a line for each (mode, shape), a column for each unit."""

    def draw(own: Sequence[Row]) -> Lines:
        units = list(dict.fromkeys(row.unit for row in own))
        of_case = {(row.mode, row.shape): {} for row in own}
        for row in own:
            of_case[row.mode, row.shape][row.unit] = row
        return table(
            ("", "size", *("time" if unit == "s" else unit for unit in units)),
            (
                (*key, *(seconds(cells[u].p50) if u == "s" and u in cells else quality(cells.get(u)) for u in units))
                for key, cells in of_case.items()
            ),
        )

    return lambda rows: each_device([row for row in rows if row.benchmark == benchmark], draw)


def by_variant(rows: Sequence[Row]) -> dict[tuple[str, str], dict[str, Row]]:
    """(size, variant) -> its measures on a trained model, by unit."""
    variants: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        if row.benchmark == "real_models":
            variants.setdefault((row.shape, row.mode), {})[row.unit] = row
    return variants


def perplexity_change(cells: dict[str, Row]) -> str:
    before, after = cells.get("perplexity before"), cells.get("perplexity")
    return f"{after.p50 / before.p50 - 1:+.1%}" if before and after else MISSING


def real_models(rows: Sequence[Row]) -> Lines:
    """A line for each variant on each model."""
    units = ("reliability", "begins", "generalization", "first token", "KL", "PS", "NS", "known facts")

    def number(row: Row | None) -> str:
        return f"{row.p50:.2f}" if row and row.unit == "KL" else quality(row)

    def draw(own: Sequence[Row]) -> Lines:
        body = []
        for (shape, mode), cells in by_variant(own).items():
            time = cells.get("s")
            shown = (seconds(time.p50), memory(time)) if time else (MISSING, MISSING)
            body.append((mode, shape, *(number(cells.get(unit)) for unit in units), perplexity_change(cells), *shown))
        return table(("", "size", *units, "perplexity", "time", "peak memory"), body)

    return each_device([row for row in rows if row.benchmark == "real_models"], draw)


def protected(rows: Sequence[Row]) -> Lines:
    """For the main README: what edits of CounterFact by LocFT-BF keep and cost, by default and as published.

    Of the CPUs, and of the GPUs, only the one that was measured last is shown: older rows are of older defaults.
    """
    recipes = {"LocFT-BF, published": "published", "LocFT-BF": "default"}

    def draw(own: Sequence[Row]) -> Lines:
        variants, body = by_variant(own), []
        sizes = [shape for shape, mode in variants if mode == "LocFT-BF"]
        for shape, (mode, recipe) in itertools.product(sizes, recipes.items()):
            cells = variants.get((shape, mode), {})
            shares = (quality(cells.get(unit)) for unit in ("reliability", "PS", "first token", "known facts"))
            time = seconds(cells["s"].p50) if "s" in cells else MISSING
            edits, model = shape.split()[0], shape.rpartition(", ")[2]
            body.append((model, edits, recipe, *shares, perplexity_change(cells), time))
        head = ("model", "edits", "recipe", "written", "paraphrases", "neighbours kept", "other facts kept")
        return table((*head, "perplexity", "time"), body)

    rows = [row for row in rows if row.benchmark == "real_models" and row.mode in recipes]
    own = (row for row in rows if "counterfact" in row.shape)
    by_date = sorted(own, key=lambda row: row.date)
    newest = {on_gpu(row): row.device for row in by_date}
    return each_device([row for row in by_date if row.device == newest[on_gpu(row)]], draw)


def scaling(rows: Sequence[Row]) -> Lines:
    def draw(own: Sequence[Row]) -> Lines:
        fitted = fits(own)
        body = []
        for mode, (variable, expected) in EXPECTED.items():
            fit = fitted.get(mode)
            shown = (f"{fit.low:g} … {fit.high:g}", f"{fit.exponent:.2f} ± {fit.error:.2f}") if fit else [MISSING] * 2
            body.append((mode, variable, *shown, expected))
        return table(("cost of", "against", "from … to", "measured exponent", "expected"), body)

    return each_device([row for row in rows if row.benchmark == "scaling"], draw)


def scale(rows: Sequence[Row]) -> Lines:
    """A line for each number of edits: the cost, where the time goes, and what was learned."""
    units = ("prefix", "train", "evaluate", "read, plan, save", "learned", "generated")

    def draw(own: Sequence[Row]) -> Lines:
        body = []
        for shape, cells in {row.shape: {x.unit: x for x in own if x.shape == row.shape} for row in own}.items():
            time = cells["s"]
            cost = seconds(time.p50 / int(shape.split()[0]))
            body.append((shape, seconds(time.p50), cost, memory(time), *(quality(cells.get(unit)) for unit in units)))
        return table(("size", "time", "an edit", "memory beyond the model", *units), body)

    return each_device([row for row in rows if row.benchmark == "scale"], draw)


def upstream(rows: Sequence[Row]) -> Lines:
    """A line for each method of each repository that ours replaces."""

    def draw(own: Sequence[Row]) -> Lines:
        body = []
        for (mode, shape), cells in {(row.mode, row.shape): {} for row in own}.items():
            cells |= {(row.provider, row.unit): row for row in own if (row.mode, row.shape) == (mode, shape)}
            theirs, ours = cells["published", "s"], cells["ours", "s"]
            apart = (f"{cells['ours', u].p50:.1e}" if ("ours", u) in cells else "" for u in ("solve", "ΔW"))
            shares = (quality(cells.get((by, "efficacy"))) for by in ("published", "ours"))
            times = seconds(theirs.p50), seconds(ours.p50), f"**{ratio(theirs, ours)}**"
            body.append((mode, shape, *times, *apart, *shares))
        return table(("", "size", "theirs", "ours", "ratio", "solve", "ΔW", "efficacy, theirs", "ours"), body)

    return each_device([row for row in rows if row.benchmark == "upstream"], draw)


TABLES: dict[str, Callable[[Sequence[Row]], Lines]] = {
    "headline": headline,
    "kernels": kernels,
    "locft_bf": against_published("locft_bf"),
    "locate_then_edit": against_published("rank_k_against_direct", "memit"),
    "upstream": upstream,
    "covariance": covariance,
    "end_to_end": end_to_end,
    "shapes": shapes,
    "emmet_vs_memit": measures("emmet_vs_memit"),
    "schedules": measures("schedules"),
    "real_models": real_models,
    "protected": protected,
    "scaling": scaling,
    "scale": scale,
}


def render(text: str, rows: Sequence[Row]) -> str:
    """The text with every marked table made again. Raises ValueError for an unknown table."""
    newest = latest(rows)

    def make(match: re.Match[str]) -> str:
        if match[2] not in TABLES:
            raise ValueError(f"results:{match[2]} is no table; there are {', '.join(TABLES)}")
        return match[1] + "\n".join(TABLES[match[2]](newest)) + "\n" + match[3]

    return _MARKED.sub(make, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="*", default=FILES, help="default: both READMEs")
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if a table differs")
    parser.add_argument("--show", choices=TABLES)
    args = parser.parse_args()
    rows = read()
    if args.show:
        print("\n".join(TABLES[args.show](latest(rows))))
        return
    for file in args.files:
        text = file.read_text(encoding="utf-8")
        made = render(text, rows)
        if args.check and made != text:
            sys.exit(f"the tables of {file} differ from the results: python -m benchmarks.tables")
        if made != text:
            file.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()
