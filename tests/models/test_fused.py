"""Fused norms and gated MLPs: which modules they run, and whole passes and edits that are the same with them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import FAMILIES, ragged_samples, random_edits, tiny_model, values
from torch import Tensor, nn

from fastedit import Editor
from fastedit.errors import ConfigError
from fastedit.methods.batch import Batch
from fastedit.methods.locate_then_edit.config import TargetConfig
from fastedit.methods.locate_then_edit.targets import find_targets
from fastedit.models import BlockCalls, Model, PrefixCache, forwards, fuse, fused, pack, resume, topology
from fastedit.ops import registry
from fastedit.ops.registry import Option, no_triton

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # σ(−100) = 0, in the interpreter
SAMPLES = ragged_samples([9, 2, 18, 7, 3, 12])
LAYER = 1
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# norms of a block and after it, gated MLPs; in four blocks
FUSED = {
    "llama": (9, 4),
    "mistral": (9, 4),
    "qwen2": (9, 4),
    "qwen3": (17, 4),
    "gemma2": (17, 4),
    "gemma3": (25, 4),
    "phi3": (9, 4),
    "olmo2": (17, 4),
    "gemma4_text": (25, 4),
    "lfm2": (13, 4),
    "granite": (9, 4),
    "qwen2_moe": (9, 4),
}


@pytest.fixture(autouse=True)
def said_anew() -> Iterator[None]:
    fused._warn_once.cache_clear()
    yield
    fused._warn_once.cache_clear()


def tiny(family: str, **options: Any) -> Any:
    return tiny_model(family, **options).to(DEVICE)


def said(caplog: Any) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == fused.log.name]


# Triton's interpreter does not round to bf16
CASES = [(torch.float32, "torch"), (torch.bfloat16, "torch"), (torch.float16, "triton")]
CASES += [(torch.bfloat16, "triton")] if DEVICE == "cuda" else []


@pytest.mark.parametrize(("dtype", "backend"), CASES, ids=str)
@pytest.mark.parametrize("family", FUSED)
def test_each_module_does_what_it_did(family: str, dtype: torch.dtype, backend: Any, seed: int, caplog: Any) -> None:
    """At rows that nobody has compared: by torch to the bit, so that what is rounded when is known too."""
    if backend == "triton":
        pytest.importorskip("triton")
    parts = topology(tiny(family, dtype=dtype, seed=seed))
    overrides = fuse(parts, backend=backend)
    mlps = [module for module, _ in overrides if any(True for _ in module.children())]
    assert (len({*overrides}) - len(mlps), len(mlps)) == FUSED[family]
    assert not said(caplog)
    rng = torch.Generator().manual_seed(seed)
    for module, forward in overrides:
        width = parts.hidden_size if module in mlps else len(module.weight)
        x = torch.randn(2, 5, width, generator=rng).to(DEVICE, dtype)
        found, wanted = forward(x).detach(), module(x).detach()
        if backend == "torch" and family != "gemma4_text":  # it takes a power of −0.5 and not a root
            assert torch.equal(found, wanted), module
        hair = max(1e-5, 2 * torch.finfo(dtype).eps) * float(wanted.abs().max())
        torch.testing.assert_close(found, wanted, rtol=0, atol=hair)


def states_and_gradients(model: Any, overrides: list[Any], *, again: bool = False) -> list[Tensor]:
    """Of a pass from block 1 on, packed and pruned, and then of one that repeats the calls of its blocks."""
    parts = topology(model)
    weight = parts.resolve(LAYER, "down_proj")[1].weight
    rows = pack(SAMPLES, torch.arange(len(SAMPLES)), packed=parts.packs).to(DEVICE)
    model.requires_grad_(False)
    weight.requires_grad_()
    with PrefixCache(parts, SAMPLES, LAYER) as cache, forwards(overrides):
        hidden = cache.hidden(rows).requires_grad_()
        calls = BlockCalls(parts, rows, LAYER)
        calls.resume(hidden)
        found = []
        for states in (resume(parts, hidden, rows, LAYER), calls.resume(hidden)):
            loss = torch.nn.functional.cross_entropy(parts.logits(states), rows.labels)
            found += [states.detach(), loss.detach(), *torch.autograd.grad(loss, [hidden, weight])]
    return found


OF_A_PASS = [("torch", family) for family in FAMILIES if family in FUSED]
OF_A_PASS += [("triton", family) for family in ("llama", "gemma3", "phi3")]


@pytest.mark.parametrize(("backend", "family"), OF_A_PASS)
def test_a_pass_gives_the_same_with_them(family: str, backend: Any, seed: int) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    model = tiny(family, seed=seed)
    before = {module: module.__dict__.get("forward") for module in model.modules()}
    found = states_and_gradients(model, fuse(topology(model), backend=backend))
    assert {module: module.__dict__.get("forward") for module in model.modules()} == before
    for one, other in zip(found, states_and_gradients(model, []), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * float(other.abs().max()))


def test_nothing_is_fused_on_a_cpu_or_where_torch_is_chosen(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """Then passes keep every bit."""
    parts = topology(tiny_model("llama"))
    assert fuse(parts) == []
    monkeypatch.setenv("FASTEDIT_BACKEND", "torch")
    assert fuse(parts) == []
    assert not said(caplog)
    with pytest.raises(ConfigError, match="no backend='cuda'"):
        fuse(parts, backend="cuda")


class Centered(nn.Module):
    """It subtracts the mean first."""

    def __init__(self, like: Any) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(like.weight.detach()), like.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


class OtherEpsilon(Centered):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 2 * self.eps) * self.weight


class OtherGradient(Centered):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps).detach() * self.weight


class Gated(Centered):
    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


@pytest.mark.parametrize("kind", [Centered, OtherEpsilon, OtherGradient, Gated])
def test_a_norm_that_is_another_runs_as_it_is_and_is_named(kind: type[Centered], caplog: Any) -> None:
    model = tiny_model("llama")
    for block in model.model.layers[:2]:
        block.input_layernorm = kind(block.input_layernorm)
    with caplog.at_level(logging.WARNING):
        overrides = fuse(topology(model), backend="torch")
        fuse(topology(model), backend="torch")
    assert len(overrides) == sum(FUSED["llama"]) - 2
    assert not any(isinstance(module, kind) for module, _ in overrides)
    (what,) = said(caplog)  # once
    assert what.startswith(f"{kind.__name__} runs by its own forward")
    assert what.endswith("model.layers.0.input_layernorm and 1 more")


def erf(mlp: Any) -> None:
    mlp.act_fn = nn.GELU()


def after_down(mlp: Any) -> None:
    own = type(mlp).forward
    mlp.__class__ = type("Scaled", (type(mlp),), {"forward": lambda self, x: 2 * own(self, x)})


def replaced(mlp: Any) -> None:
    own = mlp.forward
    mlp.forward = lambda x: own(x)  # as accelerate does to move weights


@pytest.mark.parametrize("change", [erf, after_down, replaced])
def test_an_mlp_that_is_another_runs_as_it_is_and_is_named(change: Callable[[Any], None], caplog: Any) -> None:
    model = tiny_model("llama")
    change(model.model.layers[2].mlp)
    overrides = fuse(topology(model), backend="torch")
    assert len(overrides) == sum(FUSED["llama"]) - 1
    assert model.model.layers[2].mlp not in [module for module, _ in overrides]
    assert said(caplog)[0].endswith(": model.layers.2.mlp")


def test_trained_norms_and_norms_of_another_dtype_keep_their_forward(caplog: Any) -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    norm = model.model.layers[2].input_layernorm
    overrides = fuse(topology(model), model.model.layers[2].parameters(), backend="torch")
    assert len(overrides) == sum(FUSED["llama"]) - 2
    assert norm not in [module for module, _ in overrides]
    assert not said(caplog)
    norm.float()
    assert len(fuse(topology(model), backend="torch")) == sum(FUSED["llama"]) - 1
    assert "bfloat16 and torch.float32, expected one" in said(caplog)[0]
    assert said(caplog)[0].endswith("): model.layers.2.input_layernorm")


def test_rows_of_a_dtype_that_was_not_compared_go_the_norm_s_own_way(caplog: Any, rng: torch.Generator) -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    x = torch.randn(3, 32, generator=rng)
    norm = model.model.layers[2].input_layernorm
    forward = dict(fuse(topology(model), backend="torch"))[norm]
    assert torch.equal(forward(x), norm(x))
    assert "because its rows are torch.float32 and not torch.bfloat16" in said(caplog)[0]


def test_a_kernel_that_fails_stays_out_and_is_named(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """Such as on a GPU that Triton does not know."""

    def fail(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("PassManager::run failed\nmore")

    monkeypatch.setattr(fused.ops, "gated_activation", fail)
    assert len(fuse(topology(tiny_model("llama")), backend="torch")) == FUSED["llama"][0]
    assert "(RuntimeError: PassManager::run failed): model.layers.0.mlp and 3 more" in said(caplog)[0]


@pytest.fixture
def separate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets auto take neither kernel, on a GPU either, until `launched` does."""
    for op in ("rms_norm", "gated_activation"):
        monkeypatch.setitem(registry._OPTIONS, op, registry._OPTIONS[op][-1:])


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lets auto take these two kernels, in the interpreter too; notes which of them run, but to be compared."""
    names: list[str] = []
    for op in ("rms_norm", "gated_activation"):
        kernel = pytest.importorskip(f"fastedit.kernels.{op}")
        monkeypatch.setitem(registry._OPTIONS, op, (Option("triton", no_triton), registry._OPTIONS[op][-1]))
        for name in (op, f"{op}_backward"):
            real = getattr(kernel, name)
            monkeypatch.setattr(kernel, name, lambda *a, real=real, name=name: (names.append(name), real(*a))[1])
    compare = fused._same
    monkeypatch.setattr(fused, "_same", lambda *given: (compare(*given), names.clear())[0])
    return names


BOTH_WAYS = {"rms_norm", "rms_norm_backward", "gated_activation", "gated_activation_backward"}


@pytest.mark.parametrize(("family", "module"), [("llama", "down_proj"), ("phi3", "mlp"), ("gemma3", "block")])
@pytest.mark.usefixtures("separate")
def test_training_is_the_same_with_them(
    family: str, module: str, tokenizer: Any, make_edits: Any, seed: int, request: pytest.FixtureRequest
) -> None:
    """Their rounding is another, which Adam's division by √v enlarges. A norm that is trained stays as it is."""
    trained = []
    for fused_ones in (False, True):
        names = request.getfixturevalue("launched") if fused_ones else []
        model = tiny(family, seed=seed)
        before = values(model)
        config = {"layer": 2, "module": module, "lr": 1e-3, "batch_size": 4, "epochs": 2}
        Editor(model, tokenizer, "locft-bf", **config).edit(make_edits(6))
        assert {*names} == (BOTH_WAYS if fused_ones else set())
        trained.append({name: p - before[name] for name, p in values(model).items() if not p.equal(before[name])})
        assert not any("forward" in vars(m) for m in model.modules())
    plain, found = trained
    assert plain.keys() == found.keys()
    assert any("norm" in name for name in plain) == (module == "block")
    for name, change in plain.items():
        assert (found[name] - change).norm() <= 2e-2 * change.norm(), name


@pytest.mark.usefixtures("separate")
def test_targets_are_the_same_with_them(tokenizer: Any, seed: int, request: pytest.FixtureRequest) -> None:
    model = Model.of(tiny("qwen3", seed=seed), tokenizer)
    batch = Batch(model, random_edits(4, seed), ["w20 w21 . {}"])
    wanted = find_targets(batch, 1, TargetConfig(steps=4, lr=0.1))
    names = request.getfixturevalue("launched")
    found = find_targets(batch, 1, TargetConfig(steps=4, lr=0.1))
    assert {*names} == BOTH_WAYS
    torch.testing.assert_close(found.z, wanted.z, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.loss, wanted.loss, rtol=1e-3, atol=1e-3)
