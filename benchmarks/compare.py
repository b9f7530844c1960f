"""Show whether anything became slower: ratios of two sets of results, and which of them are beyond the noise.

    python -m benchmarks.compare OLD NEW

OLD and NEW are results files, or commits with rows in the results file. A ratio counts if the intervals from p20 to p80
of the two runs do not overlap. Rows of a single repetition have no interval and are only printed. The exit code is 1 if
something of ours is slower.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a file; imports are from the root
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
from benchmarks.rows import Row, latest, read


def load(name: str) -> dict[tuple[str, ...], Row]:
    """The latest rows by key. Raises ValueError if the name is neither a file nor a commit with rows."""
    if Path(name).is_file():
        rows = read(Path(name))
    elif not (rows := [row for row in read() if row.commit == name]):
        known = ", ".join(dict.fromkeys(row.commit for row in read())) or "none"
        raise ValueError(f"{name} is neither a file nor a commit with results; commits: {known}")
    return {row.key: row for row in latest(rows)}


def verdict(old: Row, new: Row) -> str:
    """ "slower", "faster", "within noise", or "one run" if a row has no interval."""
    if None in (old.p20, old.p80, new.p20, new.p80):
        return "one run"
    if new.p20 > old.p80:
        return "slower"
    return "faster" if new.p80 < old.p20 else "within noise"


def compare(old: dict[tuple[str, ...], Row], new: dict[tuple[str, ...], Row]) -> list[tuple[Row, float, str]]:
    """(new row, new time over old time, verdict) for every time that both have."""
    shared = (key for key in old if key in new and old[key].unit == "s")
    return [(new[key], new[key].p50 / old[key].p50, verdict(old[key], new[key])) for key in shared]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old")
    parser.add_argument("new")
    args = parser.parse_args(arguments)
    try:
        found = compare(load(args.old), load(args.new))
    except ValueError as error:
        parser.error(str(error))
    if not found:
        parser.error("the two have no measurement in common (benchmark, provider, mode, shape, dtype and device)")
    slower = 0
    for row, ratio, what in found:
        mine = row.provider.startswith("ours") and what == "slower"
        slower += mine
        print(f"{ratio:6.2f}  {what:12s}  {'!' if mine else ' '} {', '.join(filter(None, row.key[:-1]))}")
    print(f"{len(found)} times compared (new over old), {slower} of ours slower beyond the noise")
    sys.exit(int(slower > 0))


if __name__ == "__main__":
    main()
