"""Which backend serves a call: by preference, by explicit choice, by FASTEDIT_BACKEND; what cannot serve says why."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastedit import ops
from fastedit.errors import ConfigError
from fastedit.ops import registry
from fastedit.ops.registry import Call, Option, choose, describe, no_triton, only_interpreted, register

CPU, GPU = torch.device("cpu"), torch.device("cuda")
F32 = torch.float32


@pytest.fixture(autouse=True)
def declared(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two invented ops: one whose Triton kernel takes N ≤ 128 and loses below 16, one with C++ alone."""
    monkeypatch.delenv("FASTEDIT_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(registry, "_installed", lambda package: True)

    def cannot(call: Call) -> str | None:
        N = call.sizes.get("N", 0)
        return no_triton(call) or (f"N = {N} is above 128" if N > 128 else None)

    def slower(call: Call) -> str | None:
        return only_interpreted(call) or ("N is below 16" if call.sizes.get("N", 16) < 16 else None)

    before = dict(registry._OPTIONS)
    register("solve", Option("triton", cannot, slower))
    register("count", Option("cpp", lambda call: None if call.dtype == F32 else f"{call.dtype} is not float32"))
    yield
    registry._OPTIONS.clear()
    registry._OPTIONS.update(before)


@pytest.mark.parametrize(
    ("device", "sizes", "taken"),
    [(GPU, {"N": 64}, "triton"), (GPU, {"N": 129}, "torch"), (GPU, {"N": 8}, "torch"), (CPU, {"N": 64}, "torch")],
)
def test_auto_takes_the_first_that_can_and_should(
    device: torch.device, sizes: dict[str, int], taken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert choose("solve", device=device, dtype=F32, **sizes) == taken
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # on CPU auto never picks the interpreter
    assert choose("solve", device=device, dtype=F32, **sizes) == taken


def test_a_choice_is_kept_or_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose("solve", "torch", device=GPU, dtype=F32, N=64) == "torch"
    assert choose("solve", "triton", device=GPU, dtype=F32, N=8) == "triton"  # slower is the caller's business
    with pytest.raises(ConfigError, match=r"ops\.solve cannot take backend='triton': N = 200 is above 128"):
        choose("solve", "triton", device=GPU, dtype=F32, N=200)
    with pytest.raises(ConfigError, match=r"on cpu.*TRITON_INTERPRET=1"):
        choose("solve", "triton", device=CPU, dtype=F32, N=64)
    with pytest.raises(ConfigError, match=r"ops\.solve has no backend='cuda'; it has auto, triton, torch"):
        choose("solve", "cuda", device=GPU, dtype=F32, N=64)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose("solve", "triton", device=CPU, dtype=F32, N=64) == "triton"
    monkeypatch.setattr(registry, "_installed", lambda package: False)
    with pytest.raises(ConfigError, match="triton is not installed"):
        choose("solve", "triton", device=GPU, dtype=F32, N=64)


def test_variable_sets_the_backend_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTEDIT_BACKEND", "torch")
    assert choose("solve", device=GPU, dtype=F32, N=64) == "torch"
    assert choose("solve", "triton", device=GPU, dtype=F32, N=64) == "triton"  # an argument is closer than a variable
    monkeypatch.setenv("FASTEDIT_BACKEND", "cpp")
    assert choose("solve", device=GPU, dtype=F32, N=64) == "triton"  # has no C++: as without the variable
    assert choose("count", device=CPU, dtype=F32) == "cpp"
    with pytest.raises(ConfigError, match=r"FASTEDIT_BACKEND=cpp: torch\.float16 is not float32"):
        choose("count", device=CPU, dtype=torch.float16)
    monkeypatch.setenv("FASTEDIT_BACKEND", "tritn")
    with pytest.raises(ConfigError, match=r"FASTEDIT_BACKEND=tritn.*auto, triton, cuda, cpp, torch"):
        choose("solve", device=GPU, dtype=F32, N=64)


def test_describe_says_what_is_taken_and_why_not_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {op: (taken, why) for op, taken, why in describe(CPU)}
    assert rows["solve"][0] == "torch"
    assert "triton: the tensors are on cpu" in rows["solve"][1]
    assert rows["count"] == ("cpp", "")
    assert {op: taken for op, taken, _ in describe(GPU)}["solve"] == "triton"
    monkeypatch.setenv("FASTEDIT_BACKEND", "triton")
    rows = {op: (taken, why) for op, taken, why in describe(CPU)}
    assert rows["solve"][0] == "none"
    assert "FASTEDIT_BACKEND=triton" in rows["solve"][1]
    assert rows["count"][0] == "cpp"


def test_ops_refuse_what_cannot_serve(seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    hidden, head = torch.randn(3, 4, generator=rng), torch.randn(5, 4, generator=rng)
    with pytest.raises(ConfigError, match=r"ops\.target_cross_entropy .*backend='cpp'"):
        ops.target_cross_entropy(hidden, head, torch.zeros(3, dtype=torch.int64), torch.ones(3), backend="cpp")
    with pytest.raises(ConfigError, match=r"ops\.rank_k_update .*backend='cpp'"):
        ops.rank_k_update(hidden, hidden, torch.eye(4), ridge=1.0, backend="cpp")
    with pytest.raises(ConfigError, match=r"ops\.rank_k_update .*backend='cpp'"):
        ops.null_space_update(hidden, hidden, torch.eye(4), l2=1.0, backend="cpp")


def test_importing_the_ops_leaves_triton_alone() -> None:
    """A CPU user may have no triton, and `fastedit --help` has no time for it."""
    code = "import sys; sys.modules['triton'] = None; import fastedit.ops"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_kernels_are_a_package_of_ours_alone() -> None:
    """A regular package `kernels` at the root would shadow the one of PyPI that transformers imports."""
    assert not (Path(__file__).parents[2] / "kernels" / "__init__.py").exists()
