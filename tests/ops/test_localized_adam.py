"""localized_adam_ on every backend against torch.optim in fp64; stochastic rounding against its probabilities."""

from __future__ import annotations

import mmap
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastedit import ops
from fastedit.errors import ConfigError, ModelError
from fastedit.ops.localized_adam import _gradient_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SHAPES = [(1, 1, 1), (5, 3, 7), (67, 70, 150), (64, 64, 64), (0, 3, 129), (1, 130, 33)]  # T, out, in
OPTIONS: dict[str, dict[str, Any]] = {
    "adam": {},
    "decay": {"weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-3},
    "adamw": {"weight_decay": 0.1, "decoupled": True},
    "clipped": {"max_norm": 0.7, "weight_decay": 0.1},
    "not clipped": {"max_norm": 1e4},
    "no momentum": {"betas": (0.0, 0.999)},
}


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "triton":
        pytest.importorskip("triton")
    return str(request.param)


def problem(
    rng: torch.Generator, T: int, out: int, width: int, *, dtype: torch.dtype = F32, product: torch.dtype = F32,
    moments: torch.dtype | None = F32,
) -> dict[str, Any]:  # fmt: skip
    """Arguments of a step, moments as after some steps with gradients of this size."""

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=rng)

    m, v = normal(out, width) * max(T, 1) ** 0.5 / 3, torch.rand(out, width, generator=rng) * max(T, 1)
    return {
        "weight": normal(out, width).to(DEVICE, dtype),
        "grad_output": normal(T, out).to(DEVICE, product),
        "input": normal(T, width).to(DEVICE, product),
        "exp_avg": None if moments is None else m.to(DEVICE, moments),
        "exp_avg_sq": None if moments is None else v.to(DEVICE, moments),
        "step": int(torch.randint(1, 2000, (), generator=rng)),
        "lr": 0.03,
    }


def stepped(given: dict[str, Any], backend: str, **options: Any) -> dict[str, Tensor]:
    """Weight, moments and copy after a step on copies of them."""
    stored = ("weight", "exp_avg", "exp_avg_sq", "copy")
    given = {name: x.clone() if name in stored and x is not None else x for name, x in (given | options).items()}
    ops.localized_adam_(**given, backend=backend)
    return {name: given[name] for name in stored if given.get(name) is not None}


def by_torch(given: dict[str, Any], dtype: torch.dtype, **options: Any) -> dict[str, Tensor]:
    """The step by torch.optim, everything in `dtype`."""
    given = {name: x.to(dtype) if isinstance(x, Tensor) else x for name, x in (given | options).items()}
    weight = nn.Parameter(given["weight"].clone())
    weight.grad = given["grad_output"].T @ given["input"]
    if given.get("max_norm") is not None:
        nn.utils.clip_grad_norm_([weight], given["max_norm"])
    decay = given.get("weight_decay", 0.0)
    if given["exp_avg"] is None:
        torch.optim.SGD([weight], lr=given["lr"], weight_decay=decay).step()
        return {"weight": weight.detach()}
    kind = torch.optim.AdamW if given.get("decoupled") else torch.optim.Adam
    betas, eps = given.get("betas", (0.9, 0.999)), given.get("eps", 1e-8)
    optimizer = kind([weight], lr=given["lr"], betas=betas, eps=eps, weight_decay=decay, foreach=False)
    state = {"step": torch.tensor(float(given["step"] - 1)), **{k: given[k].clone() for k in ("exp_avg", "exp_avg_sq")}}
    optimizer.state[weight] = state
    optimizer.step()
    return {"weight": weight.detach(), "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}


def assert_as_exact_as_torch(found: dict[str, Tensor], given: dict[str, Any], **options: Any) -> None:
    """Each element errs at most twice as much as torch's in fp32, rounded to what is stored, and a hair."""
    exact, theirs = by_torch(given, torch.float64, **options), by_torch(given, F32, **options)
    for name, wanted in exact.items():
        assert found[name].dtype == given[name].dtype
        our_error = (found[name].double() - wanted).abs()
        their_error = (theirs[name].to(given[name].dtype).double() - wanted).abs()
        hair = 1e-6 * wanted.abs().max()
        worst = int((our_error - 2 * their_error).argmax())
        assert (our_error <= 2 * their_error + hair).all(), (name, divmod(worst, wanted.shape[1]), our_error.max())


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """To the bit, but for libraries on a GPU that sum in another order when strides are others."""
    for name, x in wanted.items():
        rounding = 0.0 if DEVICE == "cpu" else 4 * torch.finfo(x.dtype).eps
        torch.testing.assert_close(found[name], x, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape: tuple[int, int, int], backend: str, rng: torch.Generator) -> None:
    given = problem(rng, *shape)
    for options in ({}, {"max_norm": 0.7, "weight_decay": 0.1}):
        assert_as_exact_as_torch(stepped(given, backend, **options), given, **options)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(options: dict[str, Any], backend: str, rng: torch.Generator) -> None:
    given = problem(rng, 37, 40, 70)
    assert_as_exact_as_torch(stepped(given, backend, **options), given, **options)


@pytest.mark.parametrize("product", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("stored", [(F32, F32), (BF16, F32), (BF16, BF16), (F32, None), (BF16, None)], ids=str)
def test_dtypes(
    stored: tuple[torch.dtype, torch.dtype | None], product: torch.dtype, backend: str, rng: torch.Generator
) -> None:
    given = problem(rng, 37, 40, 70, dtype=stored[0], moments=stored[1], product=product)
    for options in ({"weight_decay": 0.1}, {"max_norm": 0.7}):
        assert_as_exact_as_torch(stepped(given, backend, **options), given, **options)


def test_first_step_is_the_sign_of_the_gradient(backend: str, rng: torch.Generator) -> None:
    """Where bias correction is all: 1 − 0.999 loses four of fp32's digits."""
    given = problem(rng, 67, 70, 150) | {"step": 1, "weight": torch.zeros(70, 150, device=DEVICE)}
    given |= {name: torch.zeros(70, 150, device=DEVICE) for name in ("exp_avg", "exp_avg_sq")}
    change = stepped(given, backend, eps=0.0)["weight"]
    wanted = -0.03 * (given["grad_output"].T @ given["input"]).sign()
    torch.testing.assert_close(change, wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", [torch.int64, torch.int32, F32], ids=str)
def test_step_may_live_on_the_device(kind: torch.dtype, backend: str, rng: torch.Generator) -> None:
    given = problem(rng, 5, 9, 33, dtype=BF16)
    found = stepped(given | {"step": torch.tensor(given["step"], dtype=kind, device=DEVICE)}, backend, seed=3)
    for name, wanted in stepped(given, backend, seed=3).items():
        torch.testing.assert_close(found[name], wanted, rtol=1e-6, atol=1e-7)


def test_skip_is_decided_on_the_device(backend: str, rng: torch.Generator) -> None:
    given = problem(rng, 5, 9, 33) | {"copy": torch.zeros(9, 33, device=DEVICE, dtype=BF16)}
    for name, x in stepped(given, backend, skip=torch.ones((), device=DEVICE)).items():
        assert torch.equal(x, given[name]), name
    wanted = stepped(given, backend)
    for name, x in stepped(given, backend, skip=torch.zeros((), device=DEVICE)).items():
        assert torch.equal(x, wanted[name]), name
        assert not torch.equal(x, given[name]), name


@pytest.mark.parametrize("kind", [BF16, F16], ids=str)
def test_copy_is_the_master_rounded_to_nearest(kind: torch.dtype, backend: str, rng: torch.Generator) -> None:
    given = problem(rng, 5, 9, 33, moments=BF16) | {"copy": torch.full((9, 33), torch.nan, device=DEVICE, dtype=kind)}
    found = stepped(given, backend, seed=1)
    assert torch.equal(found["copy"], found["weight"].to(kind))


def test_change_stays_within_its_bound(backend: str, rng: torch.Generator) -> None:
    """Of fp32 weights, where most elements reach it, and of bf16 weights, to which it is a few units or less."""
    for dtype, bound, seed in ((F32, 0.01, None), (BF16, 0.01, None), (BF16, 0.002, 7)):
        given = problem(rng, 5, 70, 33, dtype=dtype) | {"step": 500}  # the first ones are shorter
        original = given["weight"].clone()
        free = stepped(given, backend, seed=seed)["weight"].double()
        for _ in range(3):
            given |= stepped(given, backend, max_change=bound, original=original, seed=seed)
        change = given["weight"].double() - original.double()
        assert change.abs().max() <= bound * (1 + 1e-6) + 1.2e-7 * float(original.abs().max())
        reached = change.abs() > 0.99 * bound
        assert (free - original.double()).abs().max() > bound
        assert reached.double().mean() > 0.3 if dtype == F32 else change.any()
    inside = stepped(given, backend, max_change=1e3, original=original)["weight"]
    assert torch.equal(inside, stepped(given, backend)["weight"])


def test_conv1d_layout(backend: str, rng: torch.Generator) -> None:
    """A weight stored [in, out] is given transposed, and is written where it is."""
    given = problem(rng, 67, 70, 150, dtype=BF16)
    for name in ("weight", "exp_avg", "exp_avg_sq"):
        given[name] = given[name].T.contiguous().T
    stored = given["weight"].T
    before, wanted = stored.clone(), by_torch(given, F32)
    ops.localized_adam_(**given, backend=backend)
    assert stored.is_contiguous()
    assert not torch.equal(stored, before)
    torch.testing.assert_close(stored.T.float(), wanted["weight"], rtol=2**-8, atol=1e-6)
    torch.testing.assert_close(given["exp_avg"], wanted["exp_avg"], rtol=1e-5, atol=1e-5)


def test_strided_tensors_and_their_surroundings(backend: str, rng: torch.Generator) -> None:
    """Views into larger, NaN-filled tensors: nothing outside is read into a result, or written."""
    given, frames = problem(rng, 37, 70, 33, dtype=BF16, product=BF16), {}
    for name in ("weight", "exp_avg", "exp_avg_sq", "grad_output", "input"):
        rows, columns = given[name].shape
        frames[name] = torch.full((rows + 2, columns + 9), torch.nan, dtype=given[name].dtype, device=DEVICE)
        frames[name][1:-1, 3:-6] = given[name]
    wanted = stepped(given, backend)
    given |= {name: frame[1:-1, 3:-6] for name, frame in frames.items()}
    given["input"] = given["input"].T.contiguous().T  # rows are not contiguous
    given["grad_output"] = given["grad_output"].repeat_interleave(2, dim=1)[:, ::2]
    ops.localized_adam_(**given, backend=backend)
    assert_same(given, wanted)
    for name in wanted:
        frames[name][1:-1, 3:-6] = torch.nan
        assert frames[name].isnan().all(), name


def test_nan_is_not_hidden(backend: str, rng: torch.Generator) -> None:
    given = problem(rng, 5, 9, 33, dtype=BF16)
    given["grad_output"][2, 4] = torch.nan
    given["exp_avg"][0, :4] = torch.tensor([0x7FFFFFFF], dtype=torch.int32, device=DEVICE).view(F32)  # a GPU's NaN
    for options in ({}, {"seed": 4}, {"original": torch.zeros_like(given["weight"]), "max_change": 0.1}):
        wrong = stepped(given, backend, **options)["weight"].isnan()
        assert wrong[4].all()
        assert wrong[0, :4].all()
        assert wrong.sum() == 33 + 4


def test_offsets_beyond_31_bits(backend: str, rng: torch.Generator) -> None:
    """Rows 2³⁰ elements apart: the third begins at element 2³¹. On CPU only the pages touched take memory."""
    given = problem(rng, 3, 3, 33)
    size = 2 * 2**30 + 4096
    if DEVICE == "cpu":
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
        memory = torch.frombuffer(mmap.mmap(-1, size * 4, flags=flags), dtype=F32)
    else:
        memory = torch.zeros(size, device=DEVICE)
    given |= {"original": given["weight"] + 0.01, "max_change": 0.03, "copy": given["weight"] * 0}
    wanted = stepped(given, backend)
    for i, name in enumerate(("weight", "exp_avg", "exp_avg_sq", "original", "copy", "grad_output", "input")):
        far = memory.as_strided(given[name].shape, (2**30, 1), 128 * i)
        given[name] = far.copy_(given[name])
    ops.localized_adam_(**given, backend=backend)
    assert_same(given, wanted)


def test_every_tile_is_visited_once(rng: torch.Generator) -> None:
    """Small tiles, a last group that is not full, ragged edges."""
    kernel = pytest.importorskip("fastedit.kernels.localized_adam")
    given = problem(rng, 37, 70, 150)
    wanted = stepped(given, "torch")
    for config in (
        (16, 64, 16, 3, 0),
        (32, 64, 16, 2, 2),
        (32, 128, 32, 16, 7),
    ):  # the last: when the next eighth is loaded
        args = [given[name].clone() for name in ("weight", "grad_output", "input", "exp_avg", "exp_avg_sq")]
        kernel.localized_adam_(
            *args, given["step"], lr=given["lr"], betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, decoupled=False,
            config=kernel.Config(*config, num_warps=4, num_stages=2),
        )  # fmt: skip
        for name, x in zip(("weight", "exp_avg", "exp_avg_sq"), (args[0], *args[3:]), strict=True):
            torch.testing.assert_close(x, wanted[name], rtol=1e-5, atol=1e-5)


def test_micro_batches_are_concatenated(backend: str, rng: torch.Generator) -> None:
    linear = nn.Linear(33, 9, bias=False, device=DEVICE)
    inputs = torch.randn(31, 33, generator=rng).to(DEVICE)
    for part in inputs.split(8):
        linear(part).square().sum().backward()
    given = problem(rng, 0, 9, 33) | {"weight": linear.weight.detach().clone()}
    given |= {"grad_output": torch.cat([2 * linear(part).detach() for part in inputs.split(8)]), "input": inputs}
    found = stepped(given, backend)
    optimizer = torch.optim.Adam([linear.weight], lr=given["lr"], foreach=False)
    state = {name: given[name] for name in ("exp_avg", "exp_avg_sq")}
    optimizer.state[linear.weight] = {"step": torch.tensor(given["step"] - 1.0), **state}
    optimizer.step()
    torch.testing.assert_close(found["weight"], linear.weight.detach(), rtol=1e-5, atol=1e-6)


def test_norm_from_gram_matrices(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    given = problem(rng, 67, 70, 150)
    exact = (given["grad_output"].double().T @ given["input"].double()).norm()
    for rows in (2048, 67, 16, 1):
        monkeypatch.setattr("fastedit.ops.localized_adam._GRAM_ROWS", rows)
        torch.testing.assert_close(_gradient_norm(given["grad_output"], given["input"]), exact, rtol=1e-6, atol=0)


def test_many_steps_follow_torch_adam(backend: str, rng: torch.Generator) -> None:
    """A regression whose gradient depends on the weight, so that errors could grow. The interpreter is slow."""
    count, lr = (40, 1e-2) if backend == "triton" and DEVICE == "cpu" else (200, 5e-3)
    weight = torch.randn(24, 40, generator=rng).to(DEVICE)
    aim = weight + 0.3 * torch.randn(24, 40, generator=rng).to(DEVICE)
    inputs = [torch.randn(int(T), 40, generator=rng).to(DEVICE) for T in torch.randint(1, 30, (count,), generator=rng)]
    ours = weight.clone()
    m, v = torch.zeros_like(ours), torch.zeros_like(ours)
    parameter = nn.Parameter(weight.clone())
    optimizer = torch.optim.Adam([parameter], lr=lr)
    for step, x in enumerate(inputs, 1):
        ops.localized_adam_(ours, x @ (ours - aim).T / len(x), x, m, v, step, lr=lr, backend=backend)
        parameter.grad = (x @ (parameter.detach() - aim).T / len(x)).T @ x
        optimizer.step()
    change = parameter.detach() - weight
    assert (aim - weight).norm() > 1.3 * (aim - ours).norm()  # it learned
    assert (ours - weight - change).norm() <= 1e-4 * change.norm()


def neighbours(exact: Tensor) -> tuple[Tensor, Tensor]:
    """The bf16 numbers around fp32 ones, and the probability of the one away from zero."""
    bits = exact.view(torch.int32)
    return (bits & -0x10000).view(F32), (bits & 0xFFFF).double() / 65536


def test_stochastic_rounding_is_unbiased(backend: str, rng: torch.Generator) -> None:
    """SGD on fp32 weights gives the exact results; 220,000 roundings of them show a bias of half a percent."""
    given = problem(rng, 4, 128, 216, dtype=BF16, moments=None) | {"lr": 1e-3}  # two tiles
    exact = stepped(given | {"weight": given["weight"].float()}, backend)["weight"]
    toward_zero, p = neighbours(exact)
    assert (p > 0).double().mean() > 0.99
    excess = []
    for step in range(1, 9):
        found = stepped(given | {"step": step}, backend, seed=11)["weight"].float()
        away = ((found.view(torch.int32) - toward_zero.view(torch.int32)) >> 16).double()
        assert ((away == 0) | (away == 1)).all()
        excess.append((away - p)[p > 0] / (p * (1 - p))[p > 0].sqrt())  # mean 0, variance 1
    z = torch.stack(excess)  # [8, elements]
    chance = p[p > 0]

    def score(x: Tensor) -> float:
        return float(x.mean().abs() * x.numel() ** 0.5)

    weight = (chance * (1 - chance)).sqrt()
    assert score(z * weight) / weight.square().mean().sqrt() < 5
    for low in torch.arange(0, 1, 0.1):
        assert (
            score(z[:, (chance >= low) & (chance < low + 0.1)] * weight[(chance >= low) & (chance < low + 0.1)]) < 2.5
        )
    middle = z[:, (chance > 0.1) & (chance < 0.9)]
    for lag in (1, 2, 4, 7):  # elements that share a call of Philox, and steps, are independent
        assert score(middle[:, lag:] * middle[:, :-lag]) < 5.5
        assert score(middle[lag:] * middle[:-lag]) < 5.5


def test_stochastic_rounding_is_the_seed_s_alone(rng: torch.Generator) -> None:
    """Bits depend on seed, step, element and tensor: not on backend, run or layout."""
    pytest.importorskip("triton")
    given = problem(rng, 0, 37, 75, dtype=BF16, moments=BF16) | {"lr": 0.0}  # no rows: only the moments change
    first = stepped(given, "triton", seed=2**40 + 5)
    for backend in ("triton", "torch"):
        for name, x in stepped(given, backend, seed=2**40 + 5).items():
            assert torch.equal(x, first[name]), (backend, name)
    for other in ({"seed": 5}, {"seed": 2**40 + 6}, {"seed": 2**40 + 5, "step": given["step"] + 1}):
        found = stepped(given | other, "triton")
        for name in ("exp_avg", "exp_avg_sq"):
            share = (found[name] != first[name]).double().mean()
            assert 0.1 < share < 0.6, (other, name)
    twins = stepped(given | {"exp_avg_sq": given["exp_avg"].abs(), "betas": (0.9, 0.9)}, "triton", seed=5)
    assert (twins["exp_avg"].abs() != twins["exp_avg_sq"]).double().mean() > 0.1


def test_small_steps_survive_in_bf16_only_with_a_seed(backend: str, rng: torch.Generator) -> None:
    """Steps of a tenth of a unit of bf16 at 1.5: to nearest, none is ever made. The interpreter is slow."""
    count = 8 if backend == "triton" and DEVICE == "cpu" else 20
    given = problem(rng, 4, 40, 40, moments=None) | {"lr": 1.0}
    given |= {"weight": torch.full((40, 40), 1.5, device=DEVICE, dtype=BF16), "grad_output": torch.ones(4, 40) / 4}
    given |= {"grad_output": given["grad_output"].to(DEVICE), "input": torch.full((4, 40), 2**-7 / 10, device=DEVICE)}
    for seed, wanted in ((None, 0.0), (9, count * 2**-7 / 10)):
        current = given | {"seed": seed}
        for step in range(1, count + 1):
            current |= stepped(current | {"step": step}, backend)
        change = 1.5 - current["weight"].double().mean()
        assert abs(change - wanted) <= 5 * (count / 10) ** 0.5 * 2**-7 / 40 * (seed is not None)


def test_what_cannot_be_is_refused(rng: torch.Generator) -> None:
    pytest.importorskip("triton")
    given = problem(rng, 5, 9, 33)
    for wrong, message in (
        ({"input": given["input"][:, :-1]}, r"input is \[5, 32\].*expected \[5, 33\]"),
        ({"grad_output": given["grad_output"][:4]}, r"grad_output is \[4, 9\].*expected \[5, 9\]"),
        ({"exp_avg": given["exp_avg"].half()}, "exp_avg is torch.float16, expected torch.float32 or torch.bfloat16"),
        ({"weight": given["weight"][0]}, r"expected \[out, in\]"),
        ({"copy": given["weight"].T}, r"copy is \[33, 9\]"),
    ):
        with pytest.raises(ModelError, match=message):
            ops.localized_adam_(**given | wrong)
    for wrong, message in (
        ({"exp_avg": None}, "give both, or none for SGD"),
        ({"max_change": 0.1}, "max_change and original come together"),
        ({"step": 0}, "the first step is 1"),
        ({"step": torch.ones(2)}, "step has 2 elements"),
        ({"exp_avg": given["exp_avg"].T.contiguous().T, "backend": "triton"}, "rows nor the columns"),
        ({"backend": "cpp"}, "has no backend='cpp'"),
    ):
        with pytest.raises(ConfigError, match=message):
            ops.localized_adam_(**given | wrong)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_the_gradient_is_never_stored(rng: torch.Generator) -> None:
    given = problem(rng, 64, 2048, 4096, dtype=BF16, product=BF16)
    ops.localized_adam_(**given, backend="triton")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ops.localized_adam_(**given, backend="triton")
    assert torch.cuda.max_memory_allocated() - before < 0.01 * 2048 * 4096 * 4
