"""The parts between an MLP and the residual stream, and the change before them that a change after them takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import FAMILIES, tiny_model
from torch import Tensor

from fastedit.models import MLPTail, hooked
from fastedit.models.topology import topology

NORMS = ("gemma2", "gemma3", "olmo2", "olmo3", "exaone4", "glm4")
TAILS: dict[str, Any] = {
    **dict.fromkeys(FAMILIES, (1.0, False)),
    **dict.fromkeys(NORMS, (1.0, True)),
    "granite": (0.5, False),
    "opt_post_norm": None,  # the norm reads the sum
}


def block_output(found: Any, change: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The outputs [N, h] of the first MLP and of its block for N tokens, each alone; the MLP's changed by `change`."""
    seen: list[Tensor] = []

    def moved(_: Any, __: Any, y: Tensor) -> Tensor:
        seen.append(y.reshape(-1, found.hidden_size))
        return y if change is None else y + change.reshape(y.shape)

    with hooked([found.resolve(0, "down_proj")[1].register_forward_hook(moved)]):
        outputs = found.first_block([3, 4, 5, 6])
    hidden = outputs[0] if found.blocks_return_tuples else outputs
    return seen[0], hidden.reshape(-1, found.hidden_size)


@pytest.mark.parametrize("family", [*dict.fromkeys([*FAMILIES, *NORMS, "granite"])])
def test_the_tail_is_found(family: str) -> None:
    found = topology(tiny_model(family))
    tail, wanted = MLPTail.of(found, 0), TAILS[family]
    if wanted is None:
        assert tail is None
        return
    factor, norm = wanted
    assert tail is not None
    assert tail.factor == pytest.approx(factor, rel=1e-4)
    assert (tail.gain is not None) == norm
    assert tail.adds == (factor == 1.0 and not norm)
    assert not MLPTail(0.95 * tail.factor).adds  # Granite's may be near 1


@pytest.mark.parametrize("size", [0.01, 1.0])
@pytest.mark.parametrize("family", ["llama", "granite", *NORMS])
def test_a_change_that_can_be_had_is_reached(family: str, size: float, seed: int) -> None:
    """Also where outputs before the norm are small beside those after it, as in Gemma 3."""
    model = tiny_model(family)
    found = topology(model)
    with torch.no_grad():
        found.resolve(0, "down_proj")[1].weight.mul_(size)
    generator = torch.Generator().manual_seed(seed)
    y, before = block_output(found)
    other = y + 0.5 * y.square().mean().sqrt() * torch.randn(y.shape, generator=generator)
    other *= y.norm(dim=-1, keepdim=True) / other.norm(dim=-1, keepdim=True)
    _, wanted = block_output(found, other - y)
    tail = MLPTail.of(found, 0)
    assert tail is not None
    change = tail.change(y, wanted - before)
    _, now = block_output(found, change)
    torch.testing.assert_close(
        now - before, wanted - before, rtol=0.0, atol=2e-3 * float((wanted - before).abs().max())
    )
    assert change.norm() < 3 * (other - y).norm()


def test_what_cannot_be_had_is_approached(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    gain = torch.rand(16, generator=generator) + 0.1
    gain[3] = 0.0
    y, wanted = torch.randn(5, 16, generator=generator), 10 * torch.randn(5, 16, generator=generator)
    tail = MLPTail(0.5, gain, 0.25)

    def added(outputs: Tensor) -> Tensor:
        return 0.5 * gain * outputs / (outputs.square().mean(-1, keepdim=True) + 0.25).sqrt()

    def missed(outputs: Tensor) -> Tensor:
        return (added(outputs) - added(y) - wanted).norm(dim=-1)

    shrunk = y + tail.change(y, -0.5 * added(y))  # no direction adds so little
    torch.testing.assert_close(shrunk.norm(dim=-1), y.norm(dim=-1))
    found = y + tail.change(y, wanted)
    torch.testing.assert_close(found.norm(dim=-1), y.norm(dim=-1))
    for scale in (1e-3, 1e-2, 0.1, 1.0):
        other = found + scale * torch.randn(y.shape, generator=generator)
        other *= y.norm(dim=-1, keepdim=True) / other.norm(dim=-1, keepdim=True)
        assert (missed(found) <= missed(other) + 1e-5).all()
