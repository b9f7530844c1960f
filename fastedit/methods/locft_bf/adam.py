"""Adam on fp32 master weights of a part of a model; after every step the model gets them, rounded to its dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fastedit import ops, parallel
from fastedit.models import hooked
from fastedit.ops.registry import Backend, choose

GradientParts = dict[str, list[tuple[Tensor, Tensor]]]
"""Path of a weight -> (gradient of the output [T, out], input [T, in]) of each call of its linear map."""


def with_kernel(model: nn.Module, parameters: Mapping[str, nn.Parameter], tokens: int) -> dict[str, nn.Linear | Conv1D]:
    """Those linear maps of `parameters` for which `ops.localized_adam_` has a kernel, by the paths of their weights.

    Without a kernel its reference also forms the gradient, and torch's fused Adam is then faster.

    Args:
        tokens: approximate number of tokens in a batch.
    """
    return {
        path: module
        for path, module in linear_maps(model, parameters).items()
        if choose("localized_adam_", device=module.weight.device, dtype=module.weight.dtype, T=tokens) == "triton"
    }


def linear_maps(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Linear | Conv1D]:
    """The linear maps whose weights are among `parameters`, by the paths of the weights."""
    maps = {f"{path}.weight": m for path, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    return {path: maps[path] for path in parameters if path in maps}


def smaller_in_parts(maps: Mapping[str, nn.Linear | Conv1D], tokens: int) -> dict[str, nn.Linear | Conv1D]:
    """The maps whose gradient is larger than the parts that it is made from, in a batch of this many tokens.

    Processes exchange a gradient in fp32, and its parts in the model's dtype.
    """
    smaller = {}
    for path, module in maps.items():
        size = tokens * sum(module.weight.shape) * module.weight.element_size()
        if size < 4 * module.weight.numel():
            smaller[path] = module
    return smaller


@contextmanager
def recorded(
    maps: Mapping[str, nn.Linear | Conv1D], at: Callable[[Tensor], Tensor | None] = lambda _: None
) -> Iterator[GradientParts]:
    """Collect the parts of the weight gradients of these maps; inside the block the gradients are not formed.

    Args:
        at: returns the rows of a flattened input [T, in] that count in the current pass; None is all.
    """
    parts: GradientParts = {path: [] for path in maps}

    def recorder(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if torch.is_grad_enabled():
                inputs = args[0].detach().flatten(0, -2)
                rows = at(inputs)
                taken = inputs if rows is None else inputs[rows]

                def note(grad: Tensor) -> None:
                    grad = grad.flatten(0, -2)
                    parts[path].append((grad if rows is None else grad[rows], taken))

                (output if output.requires_grad else output.requires_grad_()).register_hook(note)

        return hook

    weights = [module.weight for module in maps.values()]
    flags = [weight.requires_grad for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_(False)
        with hooked(module.register_forward_hook(recorder(path)) for path, module in maps.items()):
            yield parts
    finally:
        for weight, flag in zip(weights, flags, strict=True):
            weight.requires_grad_(flag)


class Adam:
    """One run of Adam: moments start at zero, and steps use the gradients of backward passes.

    Args:
        parameters: parameters of the model, by path; their gradients are read and cleared.
        masters: fp32 master weights in the parameters' shapes, or the parameters themselves.
        maps: linear maps whose weights `ops.localized_adam_` updates, from their `gradients`.
        gradients: filled by `recorded(maps)`; cleared by a step.
        lr: may be changed between steps.
        backend: backend of `ops.localized_adam_`.
        scale: factor by which all gradients are too large. Steps do not depend on it: ε and the weight decay are
            scaled alike.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        masters: Mapping[str, Tensor],
        maps: Mapping[str, nn.Linear | Conv1D],
        gradients: GradientParts,
        *,
        lr: float,
        weight_decay: float,
        scale: float = 1.0,
        backend: Backend = "triton",
    ) -> None:
        self._backend: Backend = backend
        self._parameters, self._masters, self._gradients = parameters, masters, gradients
        self.lr, self._weight_decay, self._eps = lr, scale * weight_decay, scale * 1e-8
        self._steps = torch.zeros((), device=next(iter(masters.values())).device)
        self._stored: dict[str, list[Tensor]] = {}
        for path, module in maps.items():
            weight, parameter = masters[path], parameters[path].detach()
            stored = [weight, torch.zeros_like(weight), torch.zeros_like(weight)]
            stored += [parameter] * (parameter.dtype in (torch.bfloat16, torch.float16))
            self._stored[path] = [x.T for x in stored] if isinstance(module, Conv1D) else stored
        without_map = [master for path, master in masters.items() if path not in maps]
        options: dict[str, Any] = {"lr": lr, "weight_decay": self._weight_decay, "eps": self._eps, "fused": True}
        self._torch_adam = torch.optim.Adam(without_map, **options) if without_map else None

    @torch.no_grad()
    def gather(self) -> None:
        """Add the gradients of one backward pass to those for the next step, in fp32."""
        for path, parameter in self._parameters.items():
            if path not in self._stored:
                assert parameter.grad is not None
                master, grad = self._masters[path], parameter.grad.float()
                master.grad = grad if master.grad is None else master.grad.add_(grad)
                parameter.grad = None

    @torch.no_grad()
    def step(self, skip: Tensor | None = None) -> None:
        """Take a step with the gradients of all processes.

        If `skip`, a scalar on the device, is not 0, the weights, moments and step count stay as they are.
        """
        if parallel.world() > 1:
            self._exchange()
        self._steps += 1 if skip is None else skip == 0
        for path, (weight, m, v, *copy) in self._stored.items():
            grads, inputs = (torch.cat(rows) for rows in zip(*self._gradients[path], strict=True))
            if grads.dtype == torch.float64:
                grads, inputs = grads.float(), inputs.float()
            ops.localized_adam_(
                weight,
                grads,
                inputs,
                m,
                v,
                self._steps,
                lr=self.lr,
                weight_decay=self._weight_decay,
                eps=self._eps,
                copy=copy[0] if copy else None,
                skip=skip,
                backend=self._backend,
            )
        if self._torch_adam is not None:
            if skip is not None:
                self._torch_adam.found_inf = skip  # type: ignore[attr-defined]
            self._torch_adam.param_groups[0]["lr"] = self.lr
            self._torch_adam.step()
        self.clear()
        for path, parameter in self._parameters.items():
            copied = path in self._stored and parameter.dtype != torch.float64
            if not copied and parameter.dtype != torch.float32:
                parameter.copy_(self._masters[path])

    def _exchange(self) -> None:
        """Combine the gradients of all processes: join the parts of recorded maps, and sum the other gradients."""
        for path, rows in self._gradients.items():
            shape, like = self._stored[path][0].shape, self._parameters[path]
            parts = list(zip(*rows, strict=True)) or [(like.new_zeros(0, size),) for size in shape]
            grads, inputs = (parallel.joined_rows(torch.cat(tensors)) for tensors in parts)
            self._gradients[path] = [(grads, inputs)]
        for path, master in self._masters.items():
            if path not in self._stored:
                grad = torch.zeros_like(master) if master.grad is None else master.grad
                master.grad = parallel.summed(grad.contiguous())

    def state(self) -> dict[str, Tensor]:
        """Moments and steps by name; the tensors are not copies."""
        state = {"steps": self._steps}
        for path, (_, m, v, *_) in self._stored.items():
            state |= {f"exp_avg {path}": m, f"exp_avg_sq {path}": v}
        if self._torch_adam is not None:
            for path, master in self._masters.items():
                state |= {f"{name} {path}": x for name, x in self._torch_adam.state.get(master, {}).items()}
        return state

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what `state` returned."""
        if self._torch_adam is not None:  # torch makes the moments at the first step only
            for path, master in self._masters.items():
                if path not in self._stored and f"step {path}" in state:
                    names = ("step", "exp_avg", "exp_avg_sq")
                    self._torch_adam.state[master] = {n: state[f"{n} {path}"].clone().to(master.device) for n in names}
        for name, x in self.state().items():
            x.copy_(state[name])

    def clear(self) -> None:
        """Clear the gradients for the next step."""
        for rows in self._gradients.values():
            rows.clear()
        for master in self._masters.values():
            master.grad = None
