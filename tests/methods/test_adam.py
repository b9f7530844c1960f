"""LocFT-BF's Adam: with localized gradients it makes the edits that torch's Adam makes from weight gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import MakeEdits, tiny_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fastedit import ops
from fastedit.methods import LocFTBFConfig
from fastedit.methods.base import MethodResult
from fastedit.methods.locft_bf import adam
from fastedit.methods.locft_bf.method import plan
from fastedit.models import Model

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def by_kernel(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """Lets LocFT-BF take the kernel from the call on, torch before it; gives the backends of the op's calls."""
    monkeypatch.setattr(adam, "choose", lambda *args, **call: "torch")

    def take() -> list[str]:
        taken: list[str] = []
        real = ops.localized_adam_

        def noted(*args: Any, **options: Any) -> None:
            taken.append(options["backend"])
            real(*args, **options)

        monkeypatch.setattr(adam, "choose", lambda *args, **call: "triton")
        monkeypatch.setattr(ops, "localized_adam_", noted)
        return taken

    return take


@pytest.mark.parametrize(
    ("family", "module", "options"),
    [
        ("llama", "down_proj", {"weight_decay": 0.1}),
        ("llama", "mlp", {"schedule": "depth-first", "stop_loss": 0.5}),
        ("llama", "block", {"layer": 3}),  # the last: its MLP runs at target tokens only
        ("gpt2", "mlp", {"skip_loss": 4.4}),  # Conv1D, whose biases torch's Adam steps
        ("opt", "down_proj", {"layer": 3}),
    ],
)
def test_localized_steps_make_the_same_edit(
    family: str, module: str, options: dict[str, Any], tokenizer: Any, make_edits: MakeEdits, seed: int,
    by_kernel: Callable[[], list[str]],
) -> None:  # fmt: skip
    settings = {"layer": 2, "lr": 1e-3, "batch_size": 4, "epochs": 3, "skip_loss": 0.0, "stop_loss": 0.0, **options}
    config, edits = LocFTBFConfig(module=module, **settings), make_edits(9)

    def edited() -> tuple[MethodResult, nn.Module]:
        model = tiny_model(family, seed=seed).to(DEVICE)
        return plan(Model.of(model, tokenizer), edits, config).run(), model

    (wanted, _), taken = edited(), by_kernel()
    found, model = edited()
    assert set(taken) == {"triton"}
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert found.updates.keys() == wanted.updates.keys()
    assert found.losses == pytest.approx(wanted.losses, rel=1e-5)
    size = torch.stack([update.norm() for update in wanted.updates.values()]).norm()
    for name, update in wanted.updates.items():
        assert (found.updates[name] - update).norm() <= 1e-4 * size, name


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_masters_of_a_bf16_model(
    family: str, tokenizer: Any, make_edits: MakeEdits, seed: int, by_kernel: Callable[[], list[str]]
) -> None:
    """The model holds the masters rounded, and learns as well as with gradients that were rounded to bf16."""
    settings = {"layer": 2, "lr": 1e-2, "batch_size": 4, "epochs": 5, "skip_loss": 0.0, "stop_loss": 0.0}
    config, edits, losses = LocFTBFConfig(module="mlp", **settings), make_edits(8), []
    for path in ("torch", "kernel"):
        if path == "kernel":
            by_kernel()
        model = tiny_model(family, seed=seed).to(DEVICE, torch.bfloat16)
        result = plan(Model.of(model, tokenizer), edits, config).run()
        losses.append(result.losses)
        for name, update in result.updates.items():
            assert update.dtype == torch.float32
            assert torch.equal(model.get_parameter(name), (result.originals[name].float() + update).bfloat16())
    assert losses[1] == pytest.approx(losses[0], rel=0.03)
    assert losses[1][-1] < 0.8 * losses[1][0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_watched_makes_the_gradient(dtype: torch.dtype, seed: int) -> None:
    """Of a map that is called twice, of one that is not the first to need a gradient, of a Conv1D."""
    torch.manual_seed(seed)
    first, second, last = nn.Linear(6, 7).to(dtype), Conv1D(5, 7).to(dtype), nn.Linear(5, 5, bias=False).to(dtype)
    maps = {"first.weight": first, "second.weight": second, "last.weight": last}
    first.bias.requires_grad_(False)
    x = torch.randn(2, 9, 6, dtype=dtype)

    def run() -> Tensor:
        y = last(second(first(x).tanh()))
        return last(y.tanh()).float().square().sum()

    run().backward()
    wanted = {path: m.weight.grad for path, m in maps.items()}
    first.weight.grad = second.weight.grad = last.weight.grad = None
    with adam.recorded(maps) as seen:
        run().backward()
        with torch.no_grad():
            run()  # measures, as loops do; leaves nothing
    run()
    assert [len(seen[path]) for path in maps] == [1, 1, 2]
    for path, module in maps.items():
        assert module.weight.grad is None
        assert module.weight.requires_grad
        grads, inputs = (torch.cat(rows).double() for rows in zip(*seen[path], strict=True))
        left, right = (inputs, grads) if isinstance(module, Conv1D) else (grads, inputs)
        size = left.abs().T @ right.abs()  # terms of the sums, of which some cancel
        assert ((left.T @ right - wanted[path]).abs() <= 4 * torch.finfo(dtype).eps * size).all()


def test_a_skipped_step_does_not_count(seed: int) -> None:
    """As on a GPU, where the loss is not waited for."""
    torch.manual_seed(seed)
    results = []
    for skips in ((0, 0), (1, 0, 1, 0)):
        torch.manual_seed(seed)
        linear, x = nn.Linear(6, 7).to(DEVICE), torch.randn(9, 6).to(DEVICE)
        parameters = {"weight": linear.weight, "bias": linear.bias}
        masters = {name: p.detach() for name, p in parameters.items()}
        with adam.recorded({"weight": linear}) as seen:
            optimizer = adam.Adam(parameters, masters, {"weight": linear}, seen, lr=0.1, weight_decay=0.0)
            for skip in skips:
                linear(x).square().sum().backward()
                before = linear.weight.detach().clone(), linear.bias.detach().clone()
                optimizer.gather()
                optimizer.step(torch.tensor(float(skip), device=DEVICE))
                for old, new in zip(before, (linear.weight, linear.bias), strict=True):
                    assert torch.equal(old, new) == bool(skip)
        results.append((linear.weight.detach(), linear.bias.detach()))
    for wanted, found in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_passes_of_a_step_are_summed_in_fp32(dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    linear = nn.Linear(6, 7, bias=False).to(DEVICE, dtype)
    master = linear.weight.detach().float()
    optimizer = adam.Adam({"weight": linear.weight}, {"weight": master}, {}, {}, lr=0.1, weight_decay=0.0)
    for _ in range(2):  # what is cleared does not count
        optimizer.clear()
        gradient = torch.zeros_like(master)
        for x in torch.randn(5, 9, 6).to(DEVICE, dtype):
            linear(x).backward(out := torch.randn(9, 7).to(DEVICE, dtype))
            optimizer.gather()
            gradient += (out.T.float() @ x.float()).to(dtype).float()
    assert master.grad is not None
    rounding = torch.finfo(dtype).eps * gradient.abs().max()  # of a product, not of the sum
    torch.testing.assert_close(master.grad, gradient, rtol=0, atol=5 * float(rounding))
    before = linear.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(before, linear.weight)
    assert linear.weight.grad is None
    assert master.grad is None


@pytest.mark.parametrize("watched", [False, True])
def test_steps_do_not_depend_on_the_scale_of_the_gradients(watched: bool, seed: int) -> None:
    """A power of two rounds nothing; ε and decay count here."""
    results = []
    for scale in (1.0, 64.0):
        torch.manual_seed(seed)
        linear, x = nn.Linear(6, 7, bias=False).to(DEVICE), torch.randn(9, 6).to(DEVICE) * 1e-8
        maps = {"weight": linear} if watched else {}
        parameters = {"weight": linear.weight}
        masters = {"weight": linear.weight.detach()}
        with adam.recorded(maps) as seen:
            optimizer = adam.Adam(parameters, masters, maps, seen, lr=0.1, weight_decay=1e-7, scale=scale)
            for _ in range(3):
                linear(x).backward(torch.full((9, 7), scale, device=DEVICE))
                optimizer.gather()
                optimizer.step()
        results.append(linear.weight.detach().clone())
    torch.manual_seed(seed)
    assert not torch.equal(results[0], nn.Linear(6, 7, bias=False).weight.to(DEVICE))
    assert torch.equal(*results)


def test_on_cpu_torch_s_adam_stays(seed: int) -> None:
    model = tiny_model("llama", seed=seed)
    assert adam.with_kernel(model, dict(model.named_parameters()), 100) == {}
