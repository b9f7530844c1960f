"""Adam in the backward pass: it updates the weight of one linear map, whose gradient is never stored."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from itertools import count
from typing import Any, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from fastedit.errors import ConfigError, TensorError
from fastedit.ops.library import define
from fastedit.ops.localized_adam import localized_adam_
from fastedit.ops.registry import Backend

Rows = list[tuple[Tensor, Tensor]]
"""For each call of the linear map: gradient of its output [T, out], input [T, in]."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_NAMES = "float32, bfloat16 or float16"
_OPTIONS: dict[str, tuple[Callable[[Any], Any], str]] = {
    **dict.fromkeys(("lr", "eps", "weight_decay"), (lambda x: 0 <= x < math.inf, "≥ 0")),
    "betas": (lambda x: len(x) == 2 and all(0 <= beta < 1 for beta in x), "two numbers from 0 up to 1"),
    "max_norm": (lambda x: x is None or x > 0, "> 0, or None"),
    "seed": (lambda x: x is None or x == int(x), "a whole number, or None"),
}
"""Name of an option -> whether it can take a value, and what is expected."""
_KEYS: Iterator[int] = count()
_OWNERS: WeakValueDictionary[int, LocalizedAdam] = WeakValueDictionary()


class LocalizedAdam(torch.optim.Optimizer):
    """The optimizer of one linear map that `localized` returns.

    It works with learning-rate schedules, checkpoints and a `Trainer` like any optimizer. `state_dict()` has the
    moments and the number of steps under the names of `torch.optim.Adam`, and the fp32 master if there is one.

    Args:
        module: as in `localized`.
        options: those of `localized_adam_` from `lr` to `seed`, which are the entries of `param_groups[0]`.
        accumulate, allow_tf32, backend: as in `localized`.
    """

    def __init__(
        self, module: nn.Module, options: Mapping[str, Any], *, accumulate: bool, allow_tf32: bool, backend: Backend
    ) -> None:
        self._transposed = _check(module, options)
        self._module, self._kind = module, cast(Any, type(module))
        weight = self._weight = module.get_parameter("weight")
        super().__init__([weight], dict(options))
        self._options = tuple(options)  # a group may have more entries: from schedules, or from torch when it is loaded
        self._accumulate, self._allow_tf32, self._backend = accumulate, allow_tf32, backend
        state = self.state[weight]
        state["step"] = torch.zeros((), device=weight.device)
        state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(weight, dtype=torch.float32) for _ in range(2))
        if weight.dtype == torch.float16 or (weight.dtype == torch.bfloat16 and options["seed"] is None):
            state["master"] = weight.detach().float()
        self._version = weight._version
        self._noted: list[tuple[int, Tensor, Tensor]] = []  # with the number of the backward pass
        self._rows: Rows = []  # of the backward passes since the last step
        # autograd completes its gradient after every call of the module in the graph has given its rows
        anchor = torch.zeros(1, device=weight.device, requires_grad=True)
        anchor.register_post_accumulate_grad_hook(self._after_backward)
        key = next(_KEYS)
        _OWNERS[key] = self
        self._flag = weight.requires_grad
        weight.requires_grad_(False)
        weight.grad = None
        module.__class__ = _tapped(self._kind)
        module.__dict__["_tap"] = anchor, key, self._transposed, weight.dtype, weight

    def remove(self) -> None:
        """Undo `localized`, except for the weight's values; the weight is no longer updated."""
        if "_tap" in self._module.__dict__:
            del self._module.__dict__["_tap"]
            self._module.__class__ = self._kind
            self._weight.requires_grad_(self._flag)
        self._noted, self._rows = [], []

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse other parameters. Raises ConfigError."""
        if self.param_groups:
            raise ConfigError("this optimizer trains one weight; give others to an optimizer of their own")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """With ``accumulate``, update the weight by all rows since the last step; otherwise it is updated already."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        rows, self._rows = self._rows, []
        self._update(rows)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the rows that `step` has not used."""
        self._rows = []

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict()` of such an optimizer returned.

        Raises:
            TensorError: it has other tensors than this weight, or tensors of other shapes.
        """
        mine, loaded = self.state[self._weight], state_dict["state"].get(0, {})
        sizes = [{name: list(x.shape) for name, x in tensors.items()} for tensors in (mine, loaded)]
        if sizes[0] != sizes[1]:
            raise TensorError(f"the state holds {sizes[1]}, expected {sizes[0]}: it is of another weight or dtype")
        super().load_state_dict(state_dict)  # this rounds moments to the dtype of the weight
        self.state[self._weight] = {name: torch.empty_like(x).copy_(loaded[name]) for name, x in mine.items()}
        self._version = self._weight._version

    def note(self, grad: Tensor, input: Tensor) -> None:
        """Keep what one call of the module adds to the gradient, until the backward pass has seen all calls."""
        task = torch._C._current_graph_task_id()
        self._noted.append((task, grad.reshape(-1, grad.shape[-1]), input.reshape(-1, input.shape[-1])))

    def _after_backward(self, anchor: Tensor) -> None:
        anchor.grad = None
        now = torch._C._current_graph_task_id()
        rows = [(grad, input) for task, grad, input in self._noted if task == now]
        self._noted = []  # others are of a pass that failed, or that was for other gradients
        if self._accumulate:
            self._rows += rows
        else:
            self._update(rows)

    @torch.no_grad()
    def _update(self, rows: Rows) -> None:
        if not rows:
            return
        _refuse_ranks()
        grads, inputs = rows[0] if len(rows) == 1 else (torch.cat(x) for x in zip(*rows, strict=True))
        state, group, weight = self.state[self._weight], self.param_groups[0], self._weight.detach()
        master = state.get("master")
        if master is not None and self._weight._version != self._version:  # something else wrote to the weight
            master.copy_(weight)
        state["step"] += 1
        stored = [weight if master is None else master, state["exp_avg"], state["exp_avg_sq"]]
        stored += [] if master is None else [weight]
        target, first, second, *copy = (x.T for x in stored) if self._transposed else stored
        localized_adam_(
            target, grads, inputs, first, second, state["step"], **{name: group[name] for name in self._options},
            copy=copy[0] if copy else None, allow_tf32=self._allow_tf32, backend=self._backend,
        )  # fmt: skip
        torch.autograd.graph.increment_version(self._weight)  # kernels do not, and autograd must notice
        self._version = self._weight._version


def localized(
    module: nn.Module,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    max_norm: float | None = None,
    seed: int | None = None,
    accumulate: bool = False,
    allow_tf32: bool = False,
    backend: Backend = "auto",
) -> LocalizedAdam:
    """Train the weight of one linear map with Adam in the backward pass of your own loop.

    A backward pass that reaches the module updates the weight once, after the last call of the module in its graph:
    `loss.backward()` is the whole step. `weight.grad` stays None, and the weight no longer requires a gradient; the
    gradient is formed from its two factors inside `localized_adam_`. A bias gets its gradient as usual.

    Works under autocast, activation checkpointing (`use_reentrant=False`) and `torch.compile`, in any order. It is for
    one process, one thread and one device, without a `GradScaler` and second derivatives; move and cast the model
    first. Uses of the weight that do not call the module, such as a tied head, add nothing to its gradient. A copy of
    the model (`copy.deepcopy`, `torch.save`) has the plain module; to load the file of a whole model, fastedit must be
    installed.

    Args:
        module: nn.Linear, or Conv1D of transformers; fp32, bf16 or fp16.
        lr, betas, eps, weight_decay, decoupled, max_norm: as in `localized_adam_`; they are in
            `optimizer.param_groups[0]`, so that learning-rate schedules work.
        seed: round a bf16 weight stochastically. Without a seed, a weight that is not fp32 has an fp32 master, which
            is updated and then rounded into it; what others write to the weight replaces it, except through `.data`.
        accumulate: collect the rows of several backward passes until `step()`, which makes one update from them.
            `zero_grad()` drops them.
        allow_tf32, backend: as in `localized_adam_`.

    Returns:
        An optimizer of this weight. Its `step()` does nothing without `accumulate`; its `remove()` restores the plain
        module.

    Raises:
        ConfigError: options have values that they cannot take (names all); the module is not a plain linear map; it or
            its weight is localized already; there are several processes.
        TensorError: the weight has another dtype, or (in a forward pass) the module was moved or cast, or given another
            weight, afterwards.
    """
    options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "decoupled": decoupled}
    options |= {"max_norm": max_norm, "seed": seed}
    return LocalizedAdam(module, options, accumulate=accumulate, allow_tf32=allow_tf32, backend=backend)


class _Tapped(nn.Module):
    """The first base class of a module that is trained in the backward pass, before `nn.Linear` or `Conv1D`."""

    _tap: tuple[Tensor, int, bool, torch.dtype, nn.Parameter]

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return super().forward(x)  # type: ignore[no-any-return]
        anchor, key, transposed, dtype, weight = self._tap
        if (self.weight.dtype, self.weight.device) != (dtype, anchor.device):
            raise TensorError(
                f"this {type(self).__name__} is {self.weight.dtype} on {self.weight.device} now, and was {dtype} on "
                f"{anchor.device} when localized made its moments; move and cast the model first"
            )
        if self.weight is not weight:
            raise TensorError(
                f"the weight of this {type(self).__name__} is not the one that localized trains: something has put "
                "another in its place (load_state_dict(assign=True), a parametrization, functional_call); call "
                "remove() of the optimizer, and localized anew"
            )
        output: Tensor = _Linear.apply(  # type: ignore[no-untyped-call]
            x, self.weight, self.bias, anchor, key, transposed
        )
        return output

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Make copies and pickles plain modules: rows of a copy do not belong to this weight."""
        attributes = {name: value for name, value in self.__dict__.items() if name != "_tap"}
        return _plain, (type(self).__mro__[2], self.weight, _OWNERS[self._tap[1]]._flag), attributes


def _plain(kind: type[nn.Module], weight: nn.Parameter, flag: bool) -> nn.Module:
    """A bare module for `pickle` and `copy`; a copied weight requires gradients as before `localized`."""
    if all(owner._weight is not weight for owner in _OWNERS.values()):
        weight.requires_grad_(flag)
    return kind.__new__(kind)


@cache
def _tapped(kind: type[nn.Module]) -> type[nn.Module]:
    return type(kind.__name__, (_Tapped, kind), {"__module__": kind.__module__})


class _Linear(torch.autograd.Function):
    """The linear map; backward keeps the rows instead of forming a gradient of the weight."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, anchor: Tensor, key: int, transposed: bool
    ) -> Tensor:
        y = nn.functional.linear(x, weight.T if transposed else weight, bias)
        ctx.save_for_backward(x.to(y.dtype), weight)  # in the dtype of autocast
        ctx.key, ctx.transposed, ctx.dtype = key, transposed, x.dtype
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        note = _note if torch.compiler.is_compiling() else _serve
        noted = note(grad, x, ctx.key)
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            matrix = (weight.T if ctx.transposed else weight).to(grad.dtype)
            grad_x = (grad @ matrix).to(ctx.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
        return grad_x, None, grad_bias, noted, None, None


def _serve(grad: Tensor, input: Tensor, key: int) -> Tensor:
    if (owner := _OWNERS.get(key)) is not None:
        owner.note(grad, input)
    return torch.zeros(1, device=grad.device)


def _serve_graph(grad: Tensor, input: Tensor, key: int) -> Tensor:
    return _serve(grad.clone(), input.clone(), key)  # a compiled graph reuses its memory


def _fake(grad: Tensor, input: Tensor, key: int) -> Tensor:
    return torch.zeros(1, device=grad.device)


_note = define("note_rows(Tensor grad, Tensor input, int key) -> Tensor", _serve_graph, _fake)


def _check(module: nn.Module, options: Mapping[str, Any]) -> bool:
    """Whether the weight is stored [in, out]; raises the errors of `localized`."""
    kind = type(module)
    name = f"{kind.__module__}.{kind.__name__}"
    conv = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", nn.Linear)  # not imported: there is none
    if isinstance(module, _Tapped):
        raise ConfigError(f"this {name} is localized already; call remove() of the optimizer that it has")
    plain = getattr(kind, "forward", None) in (nn.Linear.forward, conv.forward) and "forward" not in module.__dict__
    if not plain or type(module.weight) is not nn.Parameter:
        raise ConfigError(
            f"{name} is not a plain nn.Linear or Conv1D of transformers: its forward or its weight is its own (an "
            "adapter, quantized, sharded, or wrapped by another library). Give the linear map inside it, before others "
            "wrap it"
        )
    if module.weight.dtype not in _DTYPES:
        raise TensorError(f"the weight of this {name} is {module.weight.dtype}, expected {_NAMES}")
    if any(owner._weight is module.weight and "_tap" in owner._module.__dict__ for owner in _OWNERS.values()):
        raise ConfigError(f"the weight of this {name} is localized already, in another module that shares it")
    wrong = {option: what for option, (takes, what) in _OPTIONS.items() if not _holds(takes, options[option])}
    if wrong:
        raise ConfigError("; ".join(f"{name} is {options[name]}, expected {what}" for name, what in wrong.items()))
    _refuse_ranks()
    return kind.forward is not nn.Linear.forward


def _holds(takes: Callable[[Any], Any], value: Any) -> bool:
    try:
        return bool(takes(value))
    except (TypeError, ValueError, OverflowError):
        return False


def _refuse_ranks() -> None:
    """Raise ConfigError for several processes: each would use only its own rows, with no gradient to average."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise ConfigError(
            f"localized trains in one process, and this is one of {distributed.get_world_size()} (DDP or FSDP): their "
            "weights would drift apart. Run it in one process"
        )
