"""The running sum of x xᵀ over rows x: a symmetric rank-T update of a lower triangle in fp64."""

from __future__ import annotations

import os
import warnings
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastedit.errors import ConfigError, TensorError
from fastedit.ops.library import define, writes_in_place
from fastedit.ops.registry import Backend, Call, Option, choose, register
from fastedit.ops.trust import trust, trusted

CHUNK = 1024
"""Rows whose products are summed in fp32 before the sum is added to the fp64 total."""
GPU_CHUNK = 8192
"""The same for bf16 and fp16 rows on a GPU, where a pass over the total costs as much as the products of 2,000 rows,
counted by an H200's bandwidth and rate."""
LARGEST_VALUE = 2.0**57
"""Largest magnitude in a row: squares of GPU_CHUNK rows then have a finite sum in fp32."""
_BLOCK = 1024
_NOT_BUILT = "the extension fastedit._C is not built"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@torch.no_grad()
def syrk_(total: Tensor, rows: Tensor, mask: Tensor | None = None, *, backend: Backend = "auto") -> None:
    """Add rowsᵀ rows to the lower triangle of `total`, in place; nothing above the diagonal changes.

    Products are summed in fp32 over at most CHUNK rows, on a GPU GPU_CHUNK rows of bf16 and fp16, whose products are
    exact in fp32; chunks are summed in fp64.

    Args:
        total: [d, d] fp64, contiguous.
        rows: [T, d] fp32, bf16 or fp16, with any strides; T may be 0.
        mask: [T] bool, True for the rows that count; the others may hold anything, even NaN. None for all rows.
        backend: see `fastedit.ops.registry`; ConfigError if it cannot serve. cpp gives the same bits with any number
            of threads (torch.get_num_threads()).

    Raises:
        TensorError: shapes, dtypes or devices do not fit, or a row that counts holds NaN, infinity or a magnitude above
            LARGEST_VALUE (checked only on a CPU; on a GPU the check would wait). `total` is then unchanged.
    """
    if torch.compiler.is_compiling():
        _operator(total, rows, mask, backend=backend)
        return
    _check(total, rows, mask)
    taken = choose("syrk_", backend, device=rows.device, dtype=rows.dtype, T=len(rows), d=rows.shape[1])
    if not rows.numel():
        return
    if taken == "cpp":
        _cpp(total, rows, mask)
    elif taken == "cuda":
        _cuda(total, rows, mask)
    else:
        _torch(total, rows, mask)


def _torch(total: Tensor, rows: Tensor, mask: Tensor | None) -> None:
    if mask is not None:
        rows = rows[mask]
    if rows.device.type == "cpu" and rows.numel():
        bad = ~(torch.linalg.vector_norm(rows, torch.inf, dim=1, dtype=torch.float32) <= LARGEST_VALUE)
        if bad.any():
            raise _not_finite(int(bad.nonzero()[0] if mask is None else mask.nonzero()[bad][0]))
    tensor_cores = rows.device.type == "cuda" and rows.dtype != torch.float32
    for chunk in rows.split(GPU_CHUNK if tensor_cores else CHUNK):
        x = chunk if tensor_cores else chunk.float()
        for start in range(0, x.shape[1], _BLOCK):  # block columns, so that half of the products are not formed
            left, right = x[:, start:].T, x[:, start : start + _BLOCK]
            if tensor_cores:
                product = torch.mm(left, right, out_dtype=torch.float32)
            else:  # autocast does not change products with `out`
                product = torch.mm(left, right, out=x.new_empty(len(left), right.shape[1]))
            product[:_BLOCK].tril_()
            total[start:, start : start + _BLOCK] += product


def _cpp(total: Tensor, rows: Tensor, mask: Tensor | None, isa: str = "auto") -> None:
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    mask = mask if mask is None else mask.contiguous()
    bad = _extension().syrk_cpu(
        total=total.data_ptr(),
        rows=rows.data_ptr(),
        dtype=_dtype(rows),
        width=rows.shape[1],
        stride=rows.stride(0),
        mask=0 if mask is None else mask.data_ptr(),
        count=len(rows),
        threads=torch.get_num_threads(),
        isa=isa,
    )
    if bad >= 0:
        raise _not_finite(bad)


def _cuda(total: Tensor, rows: Tensor, mask: Tensor | None, instruction: str = "auto") -> None:
    """`instruction` is wgmma, mma, or auto for wgmma if the GPU and the extension have it."""
    T, d = rows.shape
    wgmma = instruction == "wgmma" or (instruction == "auto" and _has_wgmma(rows.device))
    padded = -(-d // 8) * 8
    if rows.dtype != torch.float32 and (rows.stride(1) != 1 or rows.stride(0) % 8 or rows.data_ptr() % 16):
        # the kernel copies 16 bytes at a time; clone, because a single row counts as contiguous with any stride
        rows = pad(rows, (0, padded - d)).clone(memory_format=torch.contiguous_format)
    elif rows.stride(1) != 1:
        rows = rows.contiguous()
    mask = mask if mask is None else mask.contiguous()
    kept = None if mask is None else rows.new_empty(T + 1, dtype=torch.int32)
    planes = parts = None
    if rows.dtype == torch.float32:
        planes = rows.new_empty(3, T, padded, dtype=torch.bfloat16)
    elif wgmma and mask is not None:
        planes = rows.new_empty(T, padded)
    splits = _extension().syrk_cuda_splits(d, T, rows.device.index) if wgmma else 1
    if splits > 1:
        parts = rows.new_empty(splits, d, d, dtype=torch.float32)
    stream = torch.cuda.current_stream(rows.device)
    _extension().syrk_cuda(
        total=total.data_ptr(),
        rows=rows.data_ptr(),
        dtype=_dtype(rows),
        width=d,
        stride=rows.stride(0),
        mask=0 if mask is None else mask.data_ptr(),
        count=T,
        kept=0 if kept is None else kept.data_ptr(),
        planes=0 if planes is None else planes.data_ptr(),
        plane_stride=padded,
        wgmma=wgmma,
        parts=0 if parts is None else parts.data_ptr(),
        splits=splits,
        device=rows.device.index,
        stream=stream.cuda_stream,
    )


@cache
def _extension() -> Any:
    """The extension fastedit._C, or None if it cannot be used; warns once."""
    try:
        return import_module("fastedit._C")
    except ImportError as error:
        message = (
            f"the extension fastedit._C cannot be used ({error}), torch does its work, at half its speed; to build it, "
            "install a C++20 compiler and then fastedit anew"
        )
        if os.environ.get("FASTEDIT_REQUIRE_EXT") == "1":
            raise ConfigError(message) from error
        warnings.warn(message, stacklevel=2)
        return None


def _has_wgmma(device: torch.device) -> bool:
    built = getattr(_extension(), "cuda_architectures", ())
    return torch.cuda.get_device_capability(device) == (9, 0) and "90a" in built


def _no_cpp(call: Call) -> str | None:
    if call.device.type != "cpu":
        return f"the tensors are on {call.device.type}"
    return None if _extension() else _NOT_BUILT


def _no_cuda(call: Call) -> str | None:
    if call.device.type != "cuda":
        return f"the tensors are on {call.device.type}"
    if _extension() is None:
        return _NOT_BUILT
    if not hasattr(_extension(), "syrk_cuda"):
        return "fastedit._C was built without nvcc"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    major, minor = torch.cuda.get_device_capability(call.device)
    return f"sm_{major}{minor} has no bf16 tensor cores" if major < 8 else None


def trust_cuda() -> None:
    """Let `auto` take the CUDA kernels on GPUs like the current one from now on: their tests have just passed.

    Raises:
        ConfigError: there is no GPU, or the kernels are not built.
    """
    device = torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_available() else 0)
    if reason := _no_cuda(Call(device, torch.bfloat16, {})):
        raise ConfigError(f"the CUDA kernels of syrk_ cannot be trusted: {reason}")
    print(f"backend='auto' of syrk_ takes cuda here, by {trust('syrk_', device, _extension().__file__)}")


def _untried(call: Call) -> str | None:
    if trusted("syrk_", call.device, _extension().__file__):
        return None
    return "its tests have not passed on this GPU yet; let make gpu-test run them, or ask for it by name"


def _check(total: Tensor, rows: Tensor, mask: Tensor | None) -> None:
    if rows.ndim != 2 or rows.dtype not in _DTYPES:
        raise TensorError(f"rows are {_name(rows)}, expected [T, d] of float32, bfloat16 or float16")
    d = rows.shape[1]
    if total.shape != (d, d) or total.dtype != torch.float64 or not total.is_contiguous():
        raise TensorError(f"total is {_name(total)}, expected [{d}, {d}] float64, contiguous, for rows of width {d}")
    if mask is not None and (mask.shape != rows.shape[:1] or mask.dtype != torch.bool):
        raise TensorError(f"mask is {_name(mask)}, expected [{len(rows)}] bool, one for each row")
    for name, tensor in (("total", total), ("mask", mask)):
        if tensor is not None and tensor.device != rows.device:
            raise TensorError(f"{name} is on {tensor.device}, the rows on {rows.device}; bring them to one device")


def _name(x: Tensor) -> str:
    return f"{list(x.shape)} {_dtype(x)}"


def _dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _not_finite(row: int) -> TensorError:
    return TensorError(
        f"rows[{row}] holds NaN, infinity or a magnitude above {LARGEST_VALUE:.1e}; leave it out by the mask, or look "
        "at what the model makes of that text. The total is as it was"
    )


register("syrk_", Option("cuda", _no_cuda, slower=_untried), Option("cpp", _no_cpp))
_operator = define(
    'syrk_(Tensor(a!) total, Tensor rows, Tensor? mask=None, *, str backend="auto") -> ()', syrk_, writes_in_place
)
