"""Run the suite one benchmark after the other: `python -m benchmarks` (on a GPU: `--device cuda`).

Rows are appended as they are measured, so the run can be stopped at any time; a failure does not stop the rest. At the
end the pictures and the tables of both READMEs are made again.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time

from benchmarks.rows import ROOT, VARIABLE

# with these sizes all of it takes under 14 minutes on two cores, and should take under 12 on an H200
PLAN = {
    "cpu": [
        "-m benchmarks.kernels --device cpu",
        "-m benchmarks.covariance --documents 32 --budget 1",
        "-m benchmarks.locft_bf",
        "-m benchmarks.locate_then_edit --n 16 --steps 10 --scaling 8 16 32",
        "-m benchmarks.end_to_end --n 32",
        "-m benchmarks.scaling --device cpu",
        "-m benchmarks.schedules --n 100",
        "-m benchmarks.emmet_vs_memit --batch-sizes 1 64 --batches 1",
        "-m benchmarks.real_models --model smollm2-135m --n 10 --variants LocFT-BF 'LocFT-BF, published'",
        "-m pytest -q -p no:cacheprovider --benchmark-columns=median,iqr,rounds benchmarks/micro",
    ],
    "cuda": [
        "-m benchmarks.end_to_end --device cuda --size 8b --budget 240",
        "-m benchmarks.kernels --device cuda --budget 0.5",
        "-m benchmarks.covariance --device cuda",
        "-m benchmarks.locft_bf --device cuda --size 1b",
        "-m benchmarks.locate_then_edit --device cuda --size 1b --n 16 --steps 10 --scaling 16 64 256",
        "-m benchmarks.end_to_end --device cuda --n 64",
        "-m benchmarks.scaling --device cuda --budget 0.3",
    ],
}
LIMIT = {"cpu": 840.0, "cuda": 710.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=PLAN, default="cpu")
    parser.add_argument("--limit", type=float, help="seconds after which nothing more runs")
    args = parser.parse_args()
    started, failed = time.monotonic(), []
    limit = args.limit or LIMIT[args.device]
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    for command in PLAN[args.device]:
        left = limit - (time.monotonic() - started)
        print(f"\n$ python {command}", flush=True)
        try:
            if left <= 0:
                raise subprocess.TimeoutExpired(command, limit)
            before = time.monotonic()
            done = subprocess.run([sys.executable, *shlex.split(command)], cwd=ROOT, env=environment, timeout=left)
            print(f"{time.monotonic() - before:.0f} s", flush=True)
            if done.returncode:
                failed.append(command)
        except subprocess.TimeoutExpired:
            print(f"not measured, or not all of it: {limit:.0f} s are over", flush=True)
            failed.append(command)
    if VARIABLE not in os.environ:
        for command in ("benchmarks.plot", "benchmarks.tables"):
            subprocess.run([sys.executable, "-m", command], cwd=ROOT, check=True)
    if failed:
        sys.exit("\n".join(["failed, or out of time:", *failed]))


if __name__ == "__main__":
    main()
