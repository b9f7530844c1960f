"""The step of a block between its MLP and the residual stream: a norm, a factor, or nothing.

A locate-then-edit update is made for a change of the residual stream. In Gemma 3 a norm makes vectors of size 40 and
more of `down_proj` outputs of size 0.1, so that the same change there would be hundreds of times too large.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastedit.models.hooks import hooked
from fastedit.models.topology import Topology

_HALVINGS = 60  # of the bracket of a multiplier


@dataclass(frozen=True)
class MLPTail:
    """The residual stream gets factor · gain · y / √(mean y² + eps) of an output y of `down_proj`, or factor · y.

    Attributes:
        factor: such as Granite's residual multiplier.
        gain: [h] fp32, the weight of an RMS norm; None without a norm.
        eps: of the norm.
    """

    factor: float
    gain: Tensor | None = None
    eps: float = 0.0

    @classmethod
    def of(cls, topology: Topology, layer: int) -> MLPTail | None:
        """The tail of a block's MLP; None if it is none of these, or a norm stands after the sum."""
        first, down = topology.block(0), topology.resolve(0, "down_proj")[1]
        norms = _readers(topology, down)
        if len(norms) > 1:
            return None
        factor = _factor(topology, first.get_submodule(norms[0]) if norms else down)
        norm = _measured(topology, topology.block(layer).get_submodule(norms[0])) if norms else (None, 0.0)
        return None if factor is None or norm is None else cls(factor, *norm)

    @property
    def adds(self) -> bool:
        """Whether the residual stream gets the output itself."""
        return self.gain is None and abs(self.factor - 1) < 0.02  # measured in bf16, 1 is within 0.01 of 1

    def change(self, outputs: Tensor, wanted: Tensor) -> Tensor:
        """The change of `down_proj` outputs that changes the residual stream as wanted, or as nearly as can be.

        A norm keeps the direction of an output alone, so that the stream cannot change by more than about what the MLP
        adds to it. The change keeps the size of the output.

        Args:
            outputs: [N, h] fp32, before the change; `wanted` [N, h].
        """
        if self.gain is None:
            return wanted / self.factor
        root = (outputs.square().mean(-1, keepdim=True) + self.eps).sqrt()
        target = (self.gain * outputs / root + wanted / self.factor).double()
        return root * _nearest(self.gain.double(), target, _rms(outputs / root).double()).to(outputs) - outputs


def _rms(x: Tensor) -> Tensor:
    return x.square().mean(-1, keepdim=True).sqrt()


def _nearest(gain: Tensor, target: Tensor, size: Tensor) -> Tensor:
    """The u [N, h] with the root mean squares `size` [N, 1] whose gain · u is nearest to `target` [N, h].

    Where the gradient of ‖gain · u − target‖² + μ‖u‖² is 0, u = gain · target / (gain² + μ). It shrinks as μ grows, so
    that bisection finds the μ ≥ 0 of the right size for every row. If u is too small even with μ = 0, it is scaled up:
    a negative μ would put all that is missing into the channel with the least gain.
    """
    low, high = torch.zeros_like(size), _rms(gain * target) / size
    tiny = gain.square().max() * 1e-12  # so that a channel with gain 0 does not divide by 0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        large = _rms(gain * target / (gain.square() + middle + tiny)) > size
        low, high = torch.where(large, middle, low), torch.where(large, high, middle)
    u = gain * target / (gain.square() + high + tiny)
    return u * size / _rms(u)


def _readers(topology: Topology, down: nn.Module) -> list[str]:
    """Names in a block of the modules that make something else of `down_proj`'s output. Measured in block 0."""
    block, readers, written = topology.block(0), list[str](), list[Tensor]()
    names = {module: name for name, module in block.named_modules() if module is not block}

    def ran(module: nn.Module, inputs: Any, output: Any) -> None:
        if module is down:
            written.append(output)
        elif written and inputs and isinstance(inputs[0], Tensor) and isinstance(output, Tensor):
            changed = output.shape == inputs[0].shape and not torch.equal(output, inputs[0])  # dropout does nothing
            if changed and torch.equal(inputs[0].reshape(-1), written[0].reshape(-1)):
                readers.append(names[module])

    with hooked([module.register_forward_hook(ran) for module in names]):
        _first_output(topology)
    return readers


def _factor(topology: Topology, module: nn.Module) -> float | None:
    """The factor by which a change of a module's output changes that of block 0; None if it is not one factor."""
    before = _first_output(topology)
    shift = before.new_ones(topology.hidden_size) * before.square().mean().sqrt()
    shift[::2] *= -1
    with hooked([module.register_forward_hook(lambda _, __, y: y + shift.to(y.dtype))]):
        moved = _first_output(topology) - before
    factor = float((moved * shift).mean() / shift.square().mean())
    return factor if (moved - factor * shift).norm() < 0.1 * (moved + factor * shift).norm() else None


def _first_output(topology: Topology) -> Tensor:
    """The output of block 0 for a token, in fp32."""
    output = topology.first_block([topology.config.vocab_size // 4])
    hidden: Tensor = output[0] if topology.blocks_return_tuples else output
    return hidden.float()


@torch.no_grad()
def _measured(topology: Topology, norm: nn.Module) -> tuple[Tensor, float] | None:
    """The weight [h] and the eps of an RMS norm; None if the module computes something else."""
    weight = next(norm.parameters(), None)
    if weight is None:
        return None
    channel = torch.arange(1, topology.hidden_size + 1, device=topology.device)  # an offloaded weight is on none
    one, other = ((2 + torch.cos(channel * step)).to(weight.dtype) for step in (1.0, 0.37))
    gain, again, small = (norm(x[None, None])[0, 0].float() / x.float() for x in (one, other, one * 1e-3))
    gain, again = gain * _rms(one.float()), again * _rms(other.float())
    if not torch.allclose(gain, again, rtol=0.02, atol=0.02 * float(gain.abs().mean())):
        return None
    root = (gain * small).sum() / small.square().sum()  # √(mean x² + eps) of the small one
    return gain, max(0.0, float(root.square() - (one * 1e-3).float().square().mean()))
