"""The cross-entropy kernel against autograd of the plain formula in fp64; in Triton's interpreter where no GPU is."""

from __future__ import annotations

import mmap
from typing import Any

import pytest
import torch
from cross_entropy import cast, plain, problem
from torch import Tensor

from fastedit import ops
from fastedit.errors import ConfigError

kernel = pytest.importorskip("fastedit.kernels.target_cross_entropy")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
CASES = [  # R, h, V, bias, soft-cap
    (1, 8, 5, False, None),
    (7, 52, 123, True, None),
    (37, 33, 252, False, 5.0),
    (6, 16, 507, True, 5.0),
    (67, 130, 200, False, None),
]


@pytest.fixture(autouse=True)
def allocated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of elements asked for; nobody has written them, and they hold NaN. A chunk is a tile of columns."""
    sizes: list[int] = []

    def poisoned(real: Any) -> Any:
        def make(*args: Any, **options: Any) -> Tensor:
            x = real(*args, **options)
            sizes.append(x.numel())
            return x.fill_(torch.nan) if x.is_floating_point() else x

        return make

    for owner, name in ((torch, "empty"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
    monkeypatch.setattr(kernel, "_CHUNK", 128)
    monkeypatch.setattr(kernel, "_WAVES", 1)
    return sizes


def given(seed: int, R: int, h: int, V: int, *, bias: bool = False, dtype: torch.dtype = F32) -> dict[str, Any]:
    return {k: x if x is None else x.to(DEVICE) for k, x in cast(problem(seed, R, h, V, bias=bias), dtype).items()}


def by_row(inputs: dict[str, Any], softcap: float | None) -> tuple[Tensor, Tensor]:
    """Losses and gradients of the plain formula in the inputs' dtype, row by row."""
    sliced = {"hidden", "labels", "sample_weight"}
    rows = [{k: x[i : i + 1] if k in sliced else x for k, x in inputs.items()} for i in range(len(inputs["hidden"]))]
    losses, grads = zip(*(plain(**row, softcap=softcap) for row in rows), strict=True)
    return torch.stack(losses), torch.cat(grads)


def assert_as_exact_as_torch(inputs: dict[str, Any], softcap: float | None = None) -> None:
    """Errors are at most twice those of the plain formula in the same dtype, and a hair.

    Element by element in fp32; where torch is exact by chance in half precision, its largest and mean errors count, and
    of the gradient what rounding can cost.
    """
    exact = by_row(cast(inputs, torch.float64), softcap)
    found = kernel.target_cross_entropy(**inputs, softcap=softcap)
    assert [x.dtype for x in found] == [F32, inputs["hidden"].dtype]
    for ours, theirs, wanted in zip(found, by_row(inputs, softcap), exact, strict=True):
        scale = 1e-6 * wanted.abs().max()
        our_error, their_error = ((x.double() - wanted).abs() for x in (ours, theirs))
        if inputs["hidden"].dtype == F32:
            assert (our_error <= 2 * their_error + scale).all(), (our_error - 2 * their_error).max() / scale
        rounding = torch.finfo(ours.dtype).eps * wanted.abs()  # of probabilities, and of the gradient itself
        assert our_error.max() <= 2 * their_error.max() + scale + rounding.max()
        our_mean, their_mean, rounded = (x.square().mean().sqrt() for x in (our_error, their_error, rounding))
        assert our_mean <= 2 * their_mean + scale + rounded


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize(("R", "h", "V", "bias", "softcap"), CASES, ids=str)
def test_as_exact_as_torch(
    R: int, h: int, V: int, bias: bool, softcap: float | None, dtype: torch.dtype, seed: int, allocated: list[int]
) -> None:
    inputs = given(seed, R, h, V, bias=bias, dtype=dtype)
    assert_as_exact_as_torch(inputs, softcap)
    if V > 128 and DEVICE == "cpu":
        assert max(allocated) <= R * max(128, h)  # no logits


@pytest.mark.parametrize(("h", "processors", "grid"), [(33, 5, (1, 1, 5)), (70, 7, (1, 2, 3))])
def test_a_chunk_in_parts(
    h: int, processors: int, grid: tuple[int, ...], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where tiles are fewer than multiprocessors, each part of a chunk has its own sum; parts differ in length."""
    grids: list[tuple[int, ...]] = []
    launch = type(kernel._accumulate).__getitem__

    def spy(function: Any, launched: tuple[int, ...]) -> Any:
        grids.append(launched)
        return launch(function, launched)

    monkeypatch.setattr(kernel, "_processors", lambda device: processors)
    monkeypatch.setattr(type(kernel._accumulate), "__getitem__", spy)
    for softcap in (None, 5.0):
        assert_as_exact_as_torch(given(seed, 9, h, 1000), softcap)
    assert grid in grids


@pytest.mark.skipif(DEVICE == "cpu", reason="takes a GPU")
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("R", [64, 200, 515])
def test_many_chunks(R: int, dtype: torch.dtype, seed: int) -> None:
    assert_as_exact_as_torch(given(seed, R, 520, 50_257, dtype=dtype))


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_logits_that_grow_from_chunk_to_chunk(dtype: torch.dtype, seed: int) -> None:
    """By more than fp16 and even fp32 can hold as exponentials, so that every chunk starts the sums anew."""
    inputs = given(seed, 5, 16, 507, dtype=dtype)
    inputs["hidden"].abs_()
    inputs["head_weight"][:] = torch.linspace(-4, 30, 507, dtype=dtype)[:, None]
    inputs["labels"][0] = 506
    assert_as_exact_as_torch(inputs)
    inputs["head_weight"][:] = inputs["head_weight"].flip(0)
    assert_as_exact_as_torch(inputs)


def test_gradient_of_certain_rows_keeps_its_digits(seed: int) -> None:
    """1 − p = 1e-5 and less is no difference of two numbers near one."""
    inputs = given(seed, 9, 33, 252)
    directions = inputs["hidden"] / inputs["hidden"].norm(dim=1, keepdim=True)
    inputs["head_weight"][inputs["labels"]] = 5 * directions
    inputs["hidden"] = torch.linspace(1, 5, 9, device=DEVICE)[:, None] * directions  # of larger ones fp64 loses digits
    losses, grad = kernel.target_cross_entropy(**inputs)
    exact = by_row(cast(inputs, torch.float64), None)
    assert exact[0].min() < 1e-5
    rounding = 25 * torch.finfo(F32).eps  # of the largest logit
    assert ((grad - exact[1]).norm(dim=1) <= 4 * rounding * exact[1].norm(dim=1)).all()
    assert ((losses - exact[0]).abs() <= rounding).all()


def test_labels_alone_and_labels_outside(seed: int) -> None:
    losses, grad = kernel.target_cross_entropy(**given(seed, 3, 4, 1))
    assert not losses.any()
    assert not grad.any()
    inputs = given(seed, 4, 8, 130)
    inputs["labels"][:3] = torch.tensor([-1, 130, 2**31 + 5])
    losses, grad = kernel.target_cross_entropy(**inputs)
    assert losses.isnan().tolist() == [True, True, True, False]
    assert grad.isnan().all(1).tolist() == grad.isnan().any(1).tolist() == [True, True, True, False]


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_strides_and_order_leave_every_bit(dtype: torch.dtype, seed: int) -> None:
    inputs = given(seed, 7, 52, 252, bias=True, dtype=dtype)
    wanted = kernel.target_cross_entropy(**inputs)
    inputs["hidden"] = inputs["hidden"].T.contiguous().T
    inputs["head_weight"] = inputs["head_weight"].repeat_interleave(3, 1)[:, ::3]
    for name in ("labels", "sample_weight", "bias"):
        inputs[name] = inputs[name].repeat_interleave(2)[::2]
    before = {k: x.clone() for k, x in inputs.items()}
    for _ in range(2):
        for x, y in zip(kernel.target_cross_entropy(**inputs), wanted, strict=True):
            assert torch.equal(x, y)
    assert all(torch.equal(x, inputs[k]) for k, x in before.items())


def test_offsets_beyond_31_bits(seed: int) -> None:
    """Rows 2³⁰ elements apart, in memory that is reserved and not taken."""
    inputs, size = given(seed, 3, 33, 3), 2 * 2**30 + 4096
    if DEVICE == "cpu":
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
        memory = torch.frombuffer(mmap.mmap(-1, size * 4, flags=flags), dtype=F32)
    else:
        memory = torch.zeros(size, device=DEVICE)
    wanted = kernel.target_cross_entropy(**inputs)
    for i, name in enumerate(("hidden", "head_weight")):
        inputs[name] = memory.as_strided((3, 33), (2**30, 1), 128 * i).copy_(inputs[name])
    for x, y in zip(kernel.target_cross_entropy(**inputs), wanted, strict=True):
        assert torch.equal(x, y)


def test_op_takes_the_kernel(seed: int) -> None:
    inputs = given(seed, 7, 16, 252)
    losses, grad = kernel.target_cross_entropy(**inputs, softcap=5.0)
    rows = ops.target_cross_entropy(**inputs, softcap=5.0, per_row=True, backend="triton")
    total = ops.target_cross_entropy(**inputs, softcap=5.0, backend="triton")
    assert torch.equal(rows[0], losses)
    assert torch.equal(total[0], losses.sum())
    assert torch.equal(rows[1], grad)
    fewer = inputs | {"labels": inputs["labels"][:5]}  # the last two rows are the caller's
    mixed = ops.target_cross_entropy(
        **fewer, softcap=5.0, others=lambda z: (z[:, 0], torch.zeros_like(z)), per_row=True, backend="triton"
    )
    assert torch.equal(mixed[0][:5], losses[:5])
    assert torch.equal(mixed[1][:5], grad[:5])
    z = inputs["hidden"][5:] @ inputs["head_weight"].T
    torch.testing.assert_close(mixed[0][5:], 5 * torch.tanh(z[:, 0] / 5) * inputs["sample_weight"][5:])
    assert not mixed[1][5:].any()
    with pytest.raises(ConfigError, match=r"hidden is torch\.float64"):
        ops.target_cross_entropy(**cast(inputs, torch.float64), backend="triton")
    empty = {k: x[:0] if k in ("hidden", "labels", "sample_weight") else x for k, x in inputs.items()}
    losses, grad = kernel.target_cross_entropy(**empty)
    assert (losses.shape, grad.shape) == ((0,), (0, 16))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("head_weight", lambda x: x.half(), "float16"),
        ("head_weight", lambda x: x[:, :-1], r"head_weight is \[9, 7\], expected \[9, 8\]"),
        ("labels", lambda x: x[:-1], r"labels is \[2\], expected \[3\]"),
        ("bias", lambda x: x[:-1], r"bias is \[8\], expected \[9\]"),
    ],
)
def test_bad_input(name: str, change: Any, message: str) -> None:
    inputs = given(0, 3, 8, 9, bias=True)
    with pytest.raises(ValueError, match=message):
        kernel.target_cross_entropy(**inputs | {name: change(inputs[name])})
