"""`localized` beside torch.optim.Adam in the same loop, for every way in which a module is called."""

from __future__ import annotations

import io
from collections.abc import Callable
from copy import copy, deepcopy
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from fastedit import ops
from fastedit.errors import TensorError

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
WIDTH, OUT = 24, 40


class Net(nn.Module):
    """A map below, the trained one in a residual block that is passed `uses` times, and a map above."""

    def __init__(
        self, rng: torch.Generator, kind: str = "linear", bias: bool = True, uses: int = 1, checkpointed: bool = False
    ) -> None:
        super().__init__()
        self.below, self.above = nn.Linear(8, WIDTH), nn.Linear(WIDTH, 3)
        self.up = nn.Linear(WIDTH, OUT, bias=bias) if kind == "linear" else Conv1D(OUT, WIDTH)
        self.down = nn.Linear(OUT, WIDTH)
        self.uses, self.checkpointed = uses, checkpointed
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=rng) / parameter.shape[-1] ** 0.5)

    def block(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(layer_norm(x, (WIDTH,))).relu())

    def forward(self, x: Tensor) -> Tensor:
        x = self.below(x).tanh()
        for _ in range(self.uses):
            x = checkpoint(self.block, x, use_reentrant=False) if self.checkpointed else self.block(x)
        found: Tensor = self.above(x)
        return found


@dataclass(frozen=True)
class Case:
    net: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    loop: dict[str, Any] = field(default_factory=dict)
    tolerance: float = 1e-4
    """Of the change in the weight, by its norm."""


CASES = {
    "linear": Case(),
    "no bias": Case({"bias": False}),
    "Conv1D": Case({"kind": "conv"}),
    "kernel": Case(options={"backend": "triton"}),
    "kernel, Conv1D": Case({"kind": "conv"}, {"backend": "triton"}),
    "adamw": Case(options={"weight_decay": 0.1, "decoupled": True, "betas": (0.8, 0.95)}),
    "clipped": Case(options={"max_norm": 0.05}),
    "called twice": Case({"uses": 2}),
    "checkpointed": Case({"checkpointed": True}),
    "checkpointed, called twice": Case({"uses": 2, "checkpointed": True}),
    "below trained": Case(loop={"trained": ("below.weight", "up.bias", "down.weight")}),
    "compiled": Case({"uses": 2}, loop={"compiled": True}),
    # the gradient is not rounded to bf16 here, and Adam's first steps are ±lr; to leave out a call gives 0.66 and more
    "autocast": Case({"uses": 2, "checkpointed": True}, loop={"autocast": True}, tolerance=0.2),
    "autocast, backward inside": Case(loop={"autocast": True, "inside": True}, tolerance=2e-2),
    "two passes a step": Case(options={"accumulate": True}, loop={"passes": 2}),
}


def trained(
    net: Net, seed: int, step: Callable[[], Any], *, passes: int = 1, compiled: bool = False, autocast: bool = False,
    inside: bool = False, steps: int = 5, **_: Any,
) -> Net:  # fmt: skip
    """Passes over random data, and `step` after every `passes` of them."""
    rng = torch.Generator().manual_seed(seed + 1)
    run = torch.compile(net, fullgraph=True, backend="aot_eager") if compiled else net
    for _ in range(steps):
        for _ in range(passes):
            x, y = torch.randn(2, 9, 8, generator=rng), torch.randn(2, 9, 3, generator=rng)
            with torch.autocast("cpu", BF16, enabled=autocast):
                loss = (run(x).float() - y).square().mean() / passes
                if inside:
                    loss.backward()
            if not inside:
                loss.backward()
        step()
    return net


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_it_follows_torch_adam(case: Case, rng: torch.Generator, seed: int) -> None:
    torch._dynamo.reset()
    nets = [(net := Net(rng, **case.net).requires_grad_(False)), deepcopy(net)]
    names = case.loop.get("trained", ())
    for net in nets:
        for name in names:
            net.get_parameter(name).requires_grad_(True)
    before = nets[0].up.weight.clone()
    options = {name: x for name, x in case.options.items() if name not in ("max_norm", "accumulate", "backend")}
    kind = torch.optim.AdamW if options.pop("decoupled", False) else torch.optim.Adam
    weight = nets[1].up.weight.requires_grad_(True)
    others = [torch.optim.SGD([net.get_parameter(name) for name in names], lr=0.01) for net in nets if names]
    theirs = kind([weight], lr=0.01, foreach=False, **options)
    ours = ops.localized(nets[0].up, lr=0.01, **case.options)

    def their_step() -> None:
        if "max_norm" in case.options:
            nn.utils.clip_grad_norm_([weight], case.options["max_norm"])
        for optimizer in (theirs, *others[1:]):
            optimizer.step()
            optimizer.zero_grad()

    def our_step() -> None:
        assert nets[0].up.weight.grad is None
        for optimizer in (ours, *others[:1]):
            optimizer.step()
            optimizer.zero_grad()

    trained(nets[0], seed, our_step, **case.loop)
    trained(nets[1], seed, their_step, **case.loop)
    change = weight.detach() - before
    assert change.abs().max() > 0.02
    assert (nets[0].up.weight - weight).norm() <= case.tolerance * change.norm()
    for name in names:
        torch.testing.assert_close(nets[0].get_parameter(name), nets[1].get_parameter(name), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("dtype", "seed_of"), [(BF16, None), (F16, None), (BF16, 5)], ids=["bf16", "fp16", "rounded"])
def test_steps_below_half_a_unit_count(dtype: torch.dtype, seed_of: int | None) -> None:
    """By an fp32 master, which the weight is rounded from, or by stochastic rounding."""
    layer = nn.Linear(WIDTH, OUT, bias=False).to(dtype)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    optimizer = ops.localized(layer, lr=4e-5, seed=seed_of)
    for _ in range(100):  # each the same sign: a change of 0.004, where a unit of bf16 below one is 0.0039
        layer(torch.ones(2, WIDTH, dtype=dtype)).sum().backward()
    assert layer.weight.float().mean().item() == pytest.approx(1 - 0.004, abs=5e-4)
    assert ("master" in optimizer.state[layer.weight]) == (seed_of is None)


def test_a_state_is_saved_and_loaded(rng: torch.Generator, seed: int, tmp_path: Any) -> None:
    """In bf16, whose master and moments torch would round when it loads them."""
    net = Net(rng).to(BF16).requires_grad_(False)

    def run(net: Net, optimizer: ops.LocalizedAdam, salt: int) -> None:
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(seed + salt)).to(BF16)
        net(x).float().square().mean().backward()
        optimizer.step()

    first = ops.localized(net.up, lr=0.01)
    schedule = torch.optim.lr_scheduler.ExponentialLR(first, 0.5)
    run(net, first, 0)
    schedule.step()
    torch.save(first.state_dict(), tmp_path / "state.pt")
    copy = deepcopy(net)
    assert type(copy.up) is nn.Linear  # which would otherwise add its rows to those of the first
    run(net, first, 1)
    second = ops.localized(copy.up, lr=1.0)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert second.param_groups[0]["lr"] == 0.005
    run(copy, second, 1)
    for name, x in first.state[net.up.weight].items():
        assert x.dtype == F32
        assert torch.equal(second.state[copy.up.weight][name], x), name
    assert torch.equal(net.up.weight, copy.up.weight)
    with pytest.raises(TensorError, match=r"'exp_avg': \[40, 24\].*expected.*\[24, 40\].* of another weight or dtype"):
        ops.localized(net.down, lr=0.1).load_state_dict(first.state_dict())


def test_a_weight_that_others_have_written_is_what_is_updated() -> None:
    layer = nn.Linear(WIDTH, OUT).to(BF16)
    ops.localized(layer, lr=1e-3)
    layer(torch.ones(2, WIDTH, dtype=BF16)).sum().backward()
    layer.load_state_dict({name: torch.full_like(x, 3.0) for name, x in layer.state_dict().items()})
    layer(torch.ones(2, WIDTH, dtype=BF16)).sum().backward()
    torch.testing.assert_close(layer.weight.float(), torch.full((OUT, WIDTH), 3.0), rtol=0, atol=0.02)


def test_only_a_whole_backward_pass_counts(rng: torch.Generator) -> None:
    """Gradients of other tensors, and a pass that fails between two calls, leave the weight and later steps alone."""
    layer, x = nn.Linear(8, 8), torch.randn(4, 8, generator=rng)
    twin = deepcopy(layer)
    for one in (layer, twin):
        ops.localized(one, lr=0.01)
    wanted = x.clone().requires_grad_()
    torch.autograd.grad(layer(wanted).sum(), wanted)

    def fail(_: Tensor) -> None:
        raise KeyError

    first = layer(x)
    first.register_hook(fail)
    with pytest.raises(KeyError):
        layer(first).sum().backward()
    with torch.no_grad():
        layer(x)
    assert torch.equal(layer.weight, twin.weight)
    for one in (layer, twin):
        one(x).square().sum().backward()
    assert torch.equal(layer.weight, twin.weight)


def test_a_graph_of_the_old_weight_is_refused(rng: torch.Generator) -> None:
    """As after any optimizer's step, also where a kernel has written the weight."""
    pytest.importorskip("triton")
    net = Net(rng).requires_grad_(False)
    ops.localized(net.up, lr=0.01, backend="triton")
    x = torch.randn(4, 8, generator=rng).requires_grad_()
    first, second = net(x).sum(), net(x).sum()
    first.backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        second.backward()


def test_rows_are_collected_until_the_step(rng: torch.Generator) -> None:
    net = Net(rng).requires_grad_(False)
    optimizer = ops.localized(net.up, lr=0.01, accumulate=True)
    before, x = net.up.weight.clone(), torch.randn(4, 8, generator=rng)
    net(x).sum().backward()
    optimizer.zero_grad()
    optimizer.step()
    assert torch.equal(net.up.weight, before)  # they were forgotten
    net(x).sum().backward()
    assert torch.equal(net.up.weight, before)
    optimizer.step()
    assert not torch.equal(net.up.weight, before)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_remove_gives_the_module_back(kind: str, rng: torch.Generator) -> None:
    net = Net(rng, kind)
    before = dict(net.up.__dict__), type(net.up)
    optimizer = ops.localized(net.up, lr=0.01)
    assert isinstance(net.up, before[1])
    assert not net.up.weight.requires_grad
    for _ in range(2):
        optimizer.remove()
        assert (net.up.__dict__, type(net.up)) == before
    weight = net.up.weight.detach().clone()
    net(torch.randn(4, 8, generator=rng)).sum().backward()
    assert net.up.weight.grad is not None
    assert torch.equal(net.up.weight, weight)


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("way", ["deepcopy", "save"])
def test_a_copy_has_the_plain_module(kind: str, way: str, rng: torch.Generator) -> None:
    net = Net(rng, kind)
    plain = type(net.up)
    net.tied = net.up.weight
    optimizer = ops.localized(net.up, lr=0.01)
    if way == "deepcopy":
        copied = deepcopy(net)
    else:
        torch.save(net, file := io.BytesIO())
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    assert type(copied.up) is plain
    assert "_tap" not in copied.up.__dict__
    assert copied.tied is copied.up.weight
    assert copied.up.weight.requires_grad
    assert torch.equal(copied.up.weight, net.up.weight)
    copy(net.up)
    assert not net.up.weight.requires_grad
    optimizer.remove()


class Sizes(TorchDispatchMode):
    """The largest tensor that any call makes, in elements."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        known = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
        for x in found if isinstance(found, tuple | list) else [found]:
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in known:
                self.largest = max(self.largest, x.untyped_storage().nbytes() // x.element_size())
        return found


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_no_gradient_of_the_weights_size_exists(
    backend: str, kind: str, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even for a moment: the kernel forms tiles, torch some rows at a time."""
    if backend == "triton":
        pytest.importorskip("triton")
    monkeypatch.setattr("fastedit.ops.localized_adam._TILE", 256)
    net = Net(rng, kind).requires_grad_(False)
    optimizer = ops.localized(net.up, lr=0.01, backend=backend)
    x = torch.randn(3, 8, generator=rng)
    with Sizes() as sizes:
        net(x).square().sum().backward()
    assert net.up.weight.grad is None
    assert 0 < sizes.largest <= 256 < net.up.weight.numel()
    optimizer.remove()
    net.up.weight.requires_grad_(True)
    with Sizes() as sizes:
        net(x).square().sum().backward()
    assert sizes.largest >= net.up.weight.numel()  # it would be seen
