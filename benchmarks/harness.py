"""Measure times of correct results only: verify first, in the same run; measure ceilings; append a row per measurement.

    suite = Suite("cuda")
    suite.run(Case("localized_adam", setup, reference, {"ours": ours, "torch": torch_way}, tolerance=1e-3, bytes=…))
    suite.close()

A case is set up outside the timed region. Before any provider is timed, each is compared with a reference on its own
copy of the inputs; if one is wrong, the case prints no time and the run ends with exit code 1. Then the providers take
turns. On a GPU inputs rotate among several sets, and a larger buffer is read before each call, so that L2 holds none of
them.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.rows import Row, append, device_name, gpu_state, make_row, results_file
from fastedit.errors import ConfigError

Inputs = tuple[Any, ...]
_RATES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
_MOST_SETS = 8


@dataclass(frozen=True)
class Case:
    """A comparison to make.

    Attributes:
        benchmark, mode, shape, dtype: as in `rows.Row`.
        setup: makes one set of inputs, on the device.
        reference: computes the correct outputs for a set of inputs, in fp64.
        providers: name -> function of the inputs that returns the same outputs. The baseline is the first after ours.
        tolerance: largest ‖out − reference‖ / ‖reference‖, for all providers or for each.
        bytes, flops: the least that has to be moved and computed, for the floor.
        rate: dtype whose measured rate of matrix products bounds the flops.
    """

    benchmark: str
    setup: Callable[[], Inputs]
    reference: Callable[..., Sequence[Tensor]]
    providers: Mapping[str, Callable[..., Sequence[Tensor]]]
    tolerance: float | Mapping[str, float]
    mode: str = ""
    shape: str = ""
    dtype: str = "float32"
    bytes: float = 0.0
    flops: float = 0.0
    rate: str = "float32"


@dataclass
class Run:
    """The results of `measured`."""

    seconds: float = math.nan
    peak_memory: int | None = None


@dataclass
class Suite:
    """The measurements of one process on one device; `close` ends them, with exit code 1 if any result was wrong."""

    device: torch.device | str = "cpu"
    budget: float = 1.0
    """Seconds of timing for each provider of a case."""
    red: list[str] = field(default_factory=list)
    gpu: str = field(default="", init=False)
    """Clock, power and temperature while the last case was timed, as in `rows.Row`."""

    def __post_init__(self) -> None:
        self.device = torch.device(self.device)
        print(f"{device_name(self.device)}; rows go to {results_file() or 'no file'}", flush=True)

    @classmethod
    def of(cls, args: argparse.Namespace) -> Suite:
        """A suite for a benchmark's arguments `device`, `threads` and, if it has one, `budget`; seeds torch."""
        torch.set_num_threads(args.threads)
        torch.manual_seed(0)
        return cls(args.device, getattr(args, "budget", cls.budget))

    def run(self, case: Case) -> dict[str, Row]:
        """Verify and time a case, print it and append its rows; returns {} if a result is wrong."""
        print(f"\n{' '.join(filter(None, (case.benchmark, case.mode, case.shape, case.dtype)))}", flush=True)
        able, memory, right = {}, {}, True
        inputs = case.setup()
        expected = case.reference(*inputs)
        for name, provider in case.providers.items():
            limit = case.tolerance if isinstance(case.tolerance, float) else case.tolerance[name]
            try:
                provider(*copied(inputs))  # compiles, and fills the caches of BLAS, before memory is measured
                mine = copied(inputs)
                with measured(self.device) as run:
                    outputs = provider(*mine)
                error = difference(outputs, expected)
            except (ConfigError, torch.OutOfMemoryError) as reason:
                print(f"  {name:28s} not measured: {reason}", flush=True)
                continue
            except Exception as fault:  # one broken provider must not stop the others
                right = self.fail(f"{case.benchmark} {case.mode} {case.shape} {name}: {fault!r}")
                continue
            if not error <= limit:  # NaN included
                right = self.fail(f"{case.benchmark} {case.mode} {case.shape} {name}: error {error:.1e} > {limit:.0e}")
            able[name], memory[name] = provider, run.peak_memory
            del outputs, mine
        if not right or not able:
            return {}
        del expected
        taken = self._sample(able, inputs, case.setup)
        floor = self.floor(case.bytes, case.flops, case.rate)
        rows = {}
        for name, samples in taken.items():
            rows[name] = make_row(
                case.benchmark,
                name,
                samples,
                mode=case.mode,
                shape=case.shape,
                dtype=case.dtype,
                device=self.device,
                peak_memory=memory[name],
                floor_share=floor / float(np.median(samples)) if floor else None,
                bytes=case.bytes or None,
                flops=case.flops or None,
                gpu=self.gpu,
            )
            self.record(rows[name])
        return rows

    def record(self, row: Row, label: str | None = None) -> Row:
        """Append a row and print it."""
        append(row)
        spread = f"  [{row.p20:.4g}, {row.p80:.4g}]" if row.p20 is not None else ""
        share = f"  {row.floor_share:.0%} of the floor's speed" if row.floor_share else ""
        memory = f"  {row.peak_memory / 2**20:.1f} MiB" if row.peak_memory is not None else ""
        state = f"  {row.gpu}" if row.gpu else ""
        print(f"  {label or row.provider:28s} {row.p50:10.4g} {row.unit}{spread}{share}{memory}{state}", flush=True)
        return row

    def fail(self, reason: str) -> bool:
        """Note that a result is wrong; returns False for the caller."""
        print(f"  RED: {reason}; no time is printed", flush=True)
        self.red.append(reason)
        return False

    def close(self) -> None:
        if self.red:
            sys.exit("\n".join(["wrong results:", *self.red]))

    def floor(self, bytes: float, flops: float, rate: str) -> float:
        """The least seconds that any version needs, by the ceilings of this run; 0 without bytes and flops."""
        if not bytes and not flops:
            return 0.0
        return max(bytes / self.ceilings["copy"], flops / self.ceilings[rate])

    @cached_property
    def ceilings(self) -> dict[str, float]:
        """Bytes/s of a copy (reads and writes) and flops/s of a matrix product in each dtype, measured now."""
        cuda = torch.device(self.device).type == "cuda"
        size = 1 << (30 if cuda else 26)  # elements, several times any cache
        source, target = torch.rand(size, device=self.device), torch.empty(size, device=self.device)
        tasks: dict[str, tuple[Callable[[], Any], float, str]] = {
            "copy": (lambda: target.copy_(source), 2.0 * source.nbytes, "B/s")
        }
        for name, dtype in _RATES.items():
            n = {"float32": (4096, 2048), "bfloat16": (8192, 512), "float64": (4096, 1024)}[name][not cuda]
            a, b = torch.randn(2, n, n, device=self.device).to(dtype)
            tasks[name] = (lambda a=a, b=b: a @ b, 2.0 * n**3, "flop/s")
        found = {}
        print("\nceilings", flush=True)
        for name, (task, work, unit) in tasks.items():
            samples = [work / s for s in self._sample({name: task}, (), tuple)[name]]
            mode, dtype = ("copy", "float32") if name == "copy" else ("matmul", name)
            row = make_row(
                "ceiling", "torch", samples, mode=mode, dtype=dtype, device=self.device, unit=unit, gpu=self.gpu
            )
            self.record(row, f"{mode} {dtype}")
            found[name] = row.p80 or row.p50  # p80: other load on the machine only lowers it
        return found

    def _sample(
        self, calls: Mapping[str, Callable[..., Any]], inputs: Inputs, setup: Callable[[], Inputs]
    ) -> dict[str, list[float]]:
        """Seconds of each call; the calls take turns."""
        if torch.device(self.device).type == "cuda":
            return self._sample_cuda(calls, inputs, setup)
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for call in calls.values():
            call(*inputs)
        started, rounds, budget = time.perf_counter(), 0, self.budget * len(calls)
        while (spent := time.perf_counter() - started) < budget or rounds < (5 if spent < 5 * budget else 3):
            for name, call in calls.items():
                before = time.perf_counter()
                call(*inputs)
                seconds[name].append(time.perf_counter() - before)
            rounds += 1
        return seconds

    def _sample_cuda(
        self, calls: Mapping[str, Callable[..., Any]], inputs: Inputs, setup: Callable[[], Inputs]
    ) -> dict[str, list[float]]:
        cache = torch.cuda.get_device_properties(self.device).L2_cache_size
        held = max(1, sum(x.nbytes for x in inputs if isinstance(x, Tensor)))
        room = torch.cuda.mem_get_info(self.device)[0] // (3 * held)
        sets = [inputs, *(setup() for _ in range(min(_MOST_SETS - 1, math.ceil(2 * cache / held), room)))]
        # only read: dirty lines would be written back while something else is timed
        flush = torch.ones(16 * cache // 4, device=self.device)
        for call in calls.values():
            for some in sets:
                call(*some)
        torch.cuda.synchronize(self.device)
        before = time.perf_counter()
        for call in calls.values():
            call(*inputs)
        torch.cuda.synchronize(self.device)
        rounds = int(min(200, max(10, self.budget * len(calls) / (time.perf_counter() - before))))
        events: dict[str, list[tuple[Any, Any]]] = {name: [] for name in calls}
        for i in range(rounds):
            for name, call in calls.items():
                pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                flush.sum()  # also keeps the device busy while the host launches what is timed
                pair[0].record(torch.cuda.current_stream(self.device))
                call(*sets[i % len(sets)])
                pair[1].record(torch.cuda.current_stream(self.device))
                events[name].append(pair)
        self.gpu = gpu_state(torch.device(self.device))  # while it works off the rest
        torch.cuda.synchronize(self.device)
        return {name: [a.elapsed_time(b) / 1e3 for a, b in pairs] for name, pairs in events.items()}


class measured:  # noqa: N801 — a function to its callers
    """Measure seconds, and peak bytes beyond those held before.

    On a GPU the bytes are those of torch's allocator. On a CPU they are the process's peak resident memory, which Linux
    can reset; None if it cannot. Freed memory that malloc keeps is returned first, because it would hide some.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device, self.run = torch.device(device), Run()

    def __enter__(self) -> Run:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before: int | None = torch.cuda.memory_allocated(self.device)
        else:
            self.before = _forget_peak()
        self.started = time.perf_counter()
        return self.run

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.run.seconds = time.perf_counter() - self.started
        if self.before is not None:
            peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else _resident("VmHWM")
            self.run.peak_memory = max(0, peak - self.before)


def copied(inputs: Inputs) -> Inputs:
    """A copy of the inputs, for providers that work in place."""
    return tuple(x.clone(memory_format=torch.preserve_format) if isinstance(x, Tensor) else x for x in inputs)


def difference(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest ‖out − expected‖ / ‖expected‖; NaN if any of them is NaN."""
    errors = []
    for out, right in zip(outputs, expected, strict=True):
        norm = right.double().norm()
        errors.append((out.double() - right.double()).norm() / (norm if norm else 1.0))
    return float(torch.stack(errors).max())


def _forget_peak() -> int | None:
    """Reset VmHWM to the current resident bytes and return these; None if that is not possible."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        descriptor = os.open("/proc/self/clear_refs", os.O_WRONLY)
        try:
            os.write(descriptor, b"5")
        finally:
            os.close(descriptor)
        return _resident("VmRSS")
    except (OSError, AttributeError):
        return None


def _resident(name: str) -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        return int(re.search(rf"{name}:\s+(\d+) kB", file.read())[1]) * 1024
