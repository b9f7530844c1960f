"""Every shipped configuration of every Triton kernel, compiled for real targets; needs no GPU.

`python -m tests.ops.aot` prints a table of registers, spills and shared memory, `--json FILE` writes it for
test_aot.py. TRITON_INTERPRET must not be set. A compilation gives the same every time: what aot.json records for the
same source, configuration and Triton is not compiled again, except with `--all`. `--record` writes aot.json.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import importlib
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

RECORD = Path(__file__).with_suffix(".json")
VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TENSOR_CORES = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}


@dataclass(frozen=True)
class Case:
    """A kernel as it is launched.

    Attributes:
        name: of the configuration, in the table.
        module: file in kernels/ that holds the kernel.
        kernel: its name there.
        types: of arguments that are no int32: "*bf16" for a pointer, "fp32", "i64".
        constants: values of constexpr arguments, None for pointers left out, 1 for strides of contiguous columns.
        aligned: integers that are multiples of 16; pointers always are.
        instruction: what a product must compile to, None where there is none.
    """

    name: str
    module: str
    kernel: str
    types: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    aligned: tuple[str, ...] = ()
    instruction: str | None = None
    maxnreg: int | None = None


@dataclass(frozen=True)
class Usage:
    """The cost of a compiled case: registers a thread, bytes spilled, bytes of shared memory."""

    name: str
    target: str
    num_warps: int
    registers: int
    spilled: int
    shared: int
    instruction: str | None
    instructions: int


def localized_adam(target: str) -> Iterator[Case]:
    """bf16 weights alone, fp32 masters as LocFT-BF has them, and every option at once, which takes most registers."""
    from fastedit.kernels.localized_adam import config_for

    strides = ("w_row", "m_row", "v_row", "copy_row", "origin_row")
    floats = ("lr", "beta1", "rest1", "beta2", "rest2", "log_beta1", "log_beta2", "eps", "decay", "bound")
    optional = ("copy_ptr", "origin_ptr", "clip_ptr", "skip_ptr")
    fp32 = dict.fromkeys(("w_ptr", "m_ptr", "v_ptr"), "*fp32")
    state = {**fp32, "skip_ptr": "*fp32", "step": "*fp32"}
    master = {**state, "copy_ptr": "*bf16"}
    full = {**master, "origin_ptr": "*fp32", "clip_ptr": "*fp32"}
    for name, kind, tf32, stored in (
        ("bf16, stochastic", "bf16", False, {**fp32, "w_ptr": "*bf16"}),
        ("bf16, clipped", "bf16", False, {**state, "w_ptr": "*bf16", "clip_ptr": "*fp32"}),
        ("bf16, ragged", "bf16", False, {**fp32, "w_ptr": "*bf16"}),
        ("bf16, bf16 moments", "bf16", False, dict.fromkeys(("w_ptr", "m_ptr", "v_ptr"), "*bf16")),
        ("bf16, bound", "bf16", False, {**fp32, "w_ptr": "*bf16", "origin_ptr": "*bf16"}),
        ("bf16, master", "bf16", False, master),
        ("bf16, full", "bf16", False, full),
        ("fp32, full", "fp32", False, full),
        ("tf32, full", "fp32", True, full),
    ):
        dtype = torch.bfloat16 if kind == "bf16" else torch.float32
        spare = stored["m_ptr"] == "*fp32" and "origin_ptr" not in stored
        config = config_for(dtype, tf32, name != "bf16, ragged", spare, TARGETS[target])._asdict()
        launch = {option: config.pop(option) for option in ("num_warps", "num_stages", "maxnreg")}
        fixed = {"a_col": 1, "b_col": 1, "DECOUPLED": False, "STOCHASTIC": "copy_ptr" not in stored, "UPCAST": False}
        yield Case(
            name,
            "localized_adam",
            "localized_adam_kernel",
            stored | dict.fromkeys(floats, "fp32") | {"a_ptr": f"*{kind}", "b_ptr": f"*{kind}", "seed": "i64"},
            fixed | config | {"PRECISION": "tf32" if tf32 else "ieee"} | dict.fromkeys({*optional} - {*stored}),
            **launch,
            aligned=() if name == "bf16, ragged" else ("M", "N", "a_row", "b_row", *strides),
            instruction=None if dtype == torch.float32 and not tf32 and target != "gfx942" else TENSOR_CORES[target],
        )


def target_cross_entropy(target: str) -> Iterator[Case]:
    """Both sizes of tiles; bias and soft-cap together are the most registers, none is what most models have."""
    from fastedit.kernels.target_cross_entropy import config_for

    precision = "tf32x3" if target.startswith("sm") else "ieee"
    for kind, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
        pointers = dict.fromkeys(("hidden", "head", "bias", "p", "grad"), f"*{kind}") | {"labels": "*i64"}
        sums = ("exponent", "mass", "top", "own", "total", "shrink", "acc", "losses", "weight")
        types = pointers | dict.fromkeys(sums, "*fp32") | {"softcap": "fp32"}
        fixed = {"PRECISION": precision, "UPCAST": False, "head_col": 1}
        for R in (64, 512) if kind != "fp32" else (64,):
            dense = {"aligned": ("V", "h", "head_row", "hidden_row"), "instruction": TENSOR_CORES[target]}
            for extra, left_out in (("bias, cap", ()), ("bias", ("softcap",)), ("", ("bias", "softcap"))):
                first, second = config_for(dtype, R, "softcap" not in left_out, TARGETS[target])
                launch = {"num_warps": first.num_warps, "num_stages": first.num_stages, **dense}
                tile = {"BLOCK_R": first.BLOCK_R, "BLOCK_V": first.BLOCK_N, "BLOCK_K": first.BLOCK_K, "hidden_col": 1}
                constants = fixed | tile | dict.fromkeys(left_out)
                given = {name: of for name, of in types.items() if name not in left_out}
                name = f"{kind}, R={R}{', ' * bool(extra)}{extra}"
                yield Case(name, "target_cross_entropy", "_exponentials", given, constants, **launch)
            launch = {option: getattr(second, option) for option in ("num_warps", "num_stages", "maxnreg")} | dense
            tile = {"BLOCK_R": second.BLOCK_R, "BLOCK_H": second.BLOCK_N, "BLOCK_K": second.BLOCK_K}
            constants = fixed | tile | {"BLOCK_V": first.BLOCK_N}
            yield Case(f"{kind}, R={R}", "target_cross_entropy", "_accumulate", types, constants, **launch)
            constants = {"BLOCK_V": first.BLOCK_N, "BLOCK_T": 32}
            yield Case(f"{kind}, R={R}", "target_cross_entropy", "_settle", types, constants, 4, 1)
        constants = {"head_col": 1, "BLOCK_H": 1024}
        yield Case(kind, "target_cross_entropy", "_finish", types, constants, 4, 1, ("V", "h", "head_row"))


def rank_k_solve(target: str) -> Iterator[Case]:
    """Every height of tile; products of fp64 use their own tensor cores."""
    from fastedit.kernels.rank_k_solve import config_for

    # Triton before 3.8 multiplied on Blackwell as it does fp32
    product = "v_mfma" if target == "gfx942" else None if target == "sm_100" and VERSION < (3, 8) else "mma.sync"
    names = ("white", "system", "ridge", "inverse", "source", "target")
    types = dict.fromkeys(names, "*fp64") | {"failed": "*i32", "group": "i64"}
    for N in (16, 32, 64, 128):
        config = config_for(N, TARGETS[target])
        halves = product if config.SIZE < config.BLOCK_N else None
        wide = ("d", "span", "width", "group", "row")
        products = (product, halves, product)
        launches = zip(("_gram", "_invert", "_apply"), config.launches(), products, strict=True)
        for kernel, launch, instruction in launches:
            options = {option: launch.pop(option, None) for option in ("num_warps", "num_stages", "maxnreg")}
            constants = launch if kernel == "_invert" else launch | {"col": 1}
            aligned = () if kernel == "_invert" else wide
            case = Case(f"fp64, N={N}", "rank_k_solve", kernel, types, constants, **options)
            yield replace(case, aligned=aligned, instruction=instruction)


def rms_norm(target: str) -> Iterator[Case]:
    """Rows of a head, of models of 1B to 70B, and the widest."""
    from fastedit.kernels.rms_norm import config_for

    for kind in ("bf16", "fp32"):
        types = dict.fromkeys(("x", "weight", "y", "grad", "slope"), f"*{kind}") | {"eps": "fp32", "offset": "fp32"}
        for D in (128, 2048, 4096, 8192, 16384):
            tile = config_for(D)._asdict()
            warps = tile.pop("num_warps")
            for kernel, constants in (("rms_norm_kernel", {"ROUND": True}), ("rms_norm_backward_kernel", {})):
                yield Case(f"{kind}, D={D}", "rms_norm", kernel, types, constants | tile, warps, 3, ("D",))


def gated_activation(target: str) -> Iterator[Case]:
    from fastedit.kernels.gated_activation import BLOCK

    for kind in ("bf16", "fp32"):
        types = dict.fromkeys(("gate", "up", "y", "grad", "d_gate", "d_up"), f"*{kind}")
        for name, gelu in (("SiLU", False), ("GELU", True)):
            for kernel in ("gated_activation_kernel", "gated_activation_backward_kernel"):
                constants, aligned = {"GELU": gelu, "BLOCK": BLOCK}, ("N", "gate_row", "up_row")
                yield Case(f"{kind}, {name}", "gated_activation", kernel, types, constants, 4, 3, aligned)


KERNELS: list[Callable[[str], Iterator[Case]]] = [
    localized_adam,
    target_cross_entropy,
    rank_k_solve,
    rms_norm,
    gated_activation,
]


def source(case: Case) -> tuple[ASTSource, dict[str, Any]]:
    """The source that Triton compiles, and its options."""
    kernel = getattr(importlib.import_module(f"fastedit.kernels.{case.module}"), case.kernel)
    signature = {
        name: "constexpr" if name in case.constants else case.types.get(name, "i32") for name in kernel.arg_names
    }
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or (name in case.aligned and kind != "constexpr")
    }
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, "enable_fp_fusion": True}
    if case.maxnreg:
        options["maxnreg"] = case.maxnreg
    return ASTSource(kernel, signature, case.constants, aligned), options


def key(case: Case, target: str) -> str:
    """Of all that decides what comes of a compilation, and of what is looked for in it."""
    kernel, options = source(case)
    asked = (triton.__version__, kernel.hash(), target, sorted(options.items()), name_of(case), case.instruction)
    return hashlib.sha256(repr(asked).encode()).hexdigest()[:24]


def compiled(case: Case, target: str) -> Usage:
    """Compile a case and read what it takes from the machine code."""
    kernel, options = source(case)
    built = triton.compile(kernel, target=TARGETS[target], options=options)
    if TARGETS[target].backend == "cuda":
        registers, spilled = _cubin_usage(built.asm["cubin"])
        text = built.asm["ptx"]
    else:
        text = built.asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1])
        spilled = int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", text)[1])
    count = text.count(case.instruction) if case.instruction else 0
    return Usage(
        name_of(case), target, case.num_warps, registers, spilled, built.metadata.shared, case.instruction, count
    )


def name_of(case: Case) -> str:
    return f"{case.kernel.removesuffix('_kernel')}: {case.name}"


def _cubin_usage(cubin: bytes) -> tuple[int, int]:
    """Registers a thread, and bytes of its stack, by the cuobjdump that triton ships."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        text = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    assert found, text
    return int(found[1]), int(found[2]) + int(found[3])


def _work(work: tuple[Case, str]) -> Usage:
    return compiled(*work)


def usage(targets: list[str], only: str = "", known: dict[str, Usage] | None = None) -> dict[str, Usage]:
    """By key, of all cases whose kernel's name contains `only`, for each target; on all processors."""
    work = [(case, target) for of in KERNELS if only in of.__name__ for target in targets for case in of(target)]
    keys, known = [key(*each) for each in work], known or {}
    new = {at: each for at, each in zip(keys, work, strict=True) if at not in known}
    context = get_context("forkserver")
    context.set_forkserver_preload(["__main__", *(f"fastedit.kernels.{of.__name__}" for of in KERNELS)])
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), context, gc.disable) as pool:
        found = known | dict(zip(new, pool.map(_work, new.values()), strict=True))
    print(f"{len(new)} of {len({*keys})} compiled")
    return {at: found[at] for at in keys}


def table(rows: list[Usage]) -> str:
    lines = [f"{'kernel: configuration':48} {'target':8} warps registers spilled B shared KiB  dot"]
    lines += [
        f"{u.name:48} {u.target:8} {u.num_warps:5} {u.registers:9} {u.spilled:9} {u.shared / 1024:10.1f}  "
        f"{f'{u.instruction} × {u.instructions}' if u.instruction else '-'}"
        for u in rows
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--only", default="", help="part of a kernel's name")
    parser.add_argument("--all", action="store_true", help="compile what is recorded, too")
    parser.add_argument("--record", action="store_true", help="compile all, and write aot.json")
    chosen = parser.parse_args()
    recorded = {} if chosen.all or chosen.record else json.loads(RECORD.read_text(encoding="utf-8"))
    found = usage(chosen.targets, chosen.only, {at: Usage(**u) for at, u in recorded.items()})
    print(table([*found.values()]))
    as_json = {at: asdict(u) for at, u in found.items()}
    if chosen.json:
        chosen.json.write_text(json.dumps(as_json))
    if chosen.record:
        lines = (f"{json.dumps(at)}: {json.dumps(u, ensure_ascii=False)}" for at, u in as_json.items())
        RECORD.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
