"""Directions of behaviours in the residual stream: find them, and take them out of what the model writes there.

A behaviour that shows in the hidden states as a direction r (a tone, a refusal; arXiv 2406.11717) is ablated by
W ← W − r rᵀ W in every matrix that writes to the residual stream. The result is a delta like that of any edit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fastedit import ops
from fastedit.delta import WeightDelta, versions
from fastedit.errors import ConfigError, ModelError, listed
from fastedit.models import Model, Topology, encode, fingerprint, hooked, plain_state, topology
from fastedit.models.block_parts import holds_experts
from fastedit.statistics.store import StatisticsStore
from fastedit.weights import LowRank, Update, oriented


@dataclass(frozen=True, eq=False)
class Direction:
    """Where the hidden states behind a block differ between two sets of prompts.

    ``vector`` [h] is of length 1 and in fp32. ``separation`` is the gap between the two means along it in standard
    deviations, of prompts that it was not made of.
    """

    layer: int
    vector: Tensor
    separation: float


@plain_state
@torch.no_grad()
def find(network: nn.Module, tokenizer: Any, having: Sequence[str], lacking: Sequence[str]) -> list[Direction]:
    """The difference of the means of the hidden states at the last token of prompts, behind each block.

    Args:
        having: prompts that show the behaviour, at least four.
        lacking: prompts that do not, at least four; as like the others as can be in everything else.

    Raises:
        ConfigError: too few prompts, or one without tokens or too long for the model.
        ModelError: as `Model.of`; the two sets have equal hidden states behind a block.
    """
    model = Model.of(network, tokenizer)
    _check_prompts("having", having)
    _check_prompts("lacking", lacking)
    if min(len(having), len(lacking)) < 4:
        raise ConfigError(f"{len(having)} prompts having it and {len(lacking)} lacking it; give at least four of each")
    blocks = list(model.topology.blocks)
    a, b = (_last_tokens(model, prompts, blocks, inputs=False) for prompts in (having, lacking))  # [L, N, h]
    return [_between(layer, *pair) for layer, pair in enumerate(zip(a, b, strict=True))]


@plain_state
@torch.no_grad()
def ablate(
    network: nn.Module, direction: Tensor, *, layers: Sequence[int] | None = None, embeddings: bool = False
) -> WeightDelta:
    """Take directions out of whatever some blocks write to the residual stream: W ← W − Q Qᵀ W.

    Args:
        direction: [h], or several [k, h], of any length; Q is an orthonormal basis of them.
        layers: whose attention and MLP write without them; None is all blocks.
        embeddings: the token embedding, too, and positions that are learned. A head that is tied to it changes with it.

    Returns:
        The delta, which is not applied: low-rank updates of the matrices, and updates of their biases.

    Raises:
        ModelError: unsupported weights; a norm or experts between these matrices and the residual stream.
        ConfigError: directions of another width or dtype, that are not finite or depend on one another; layers that
            are no numbers of blocks, or are given twice.
    """
    parts = topology(network)
    Q = _basis(parts, direction)
    chosen = _writing(parts, layers)
    updates: dict[str, Update] = {}
    names = {id(parameter): name for name, parameter in parts.model.named_parameters()}
    for module in (module for layer in chosen for module in parts.writers(layer)):
        W = _matrix(module)
        updates[names[id(module.weight)]] = oriented(module, -Q, Q.T @ W)
        bias: Any = module.bias
        if bias is not None:
            updates[names[id(bias)]] = -(Q @ (Q.T @ bias.float()))
    if embeddings:
        for module in parts.backbone.modules():
            if isinstance(module, nn.Embedding) and module.embedding_dim == parts.hidden_size:
                updates[names[id(module.weight)]] = LowRank(-(module.weight.float() @ Q), Q.T.contiguous())
    return _delta(parts, updates, {"layers": chosen, "embeddings": embeddings, "rank": Q.shape[1]})


@plain_state
@torch.no_grad()
def ablate_preserving(
    network: nn.Module,
    tokenizer: Any,
    direction: Tensor,
    prompts: Sequence[str],
    *,
    layers: Sequence[int] | None = None,
    weight: float = 1.0,
    statistics: str | Path | None = None,
) -> WeightDelta:
    """Take directions out of what the MLPs write at the last token of some prompts, and keep what they write elsewhere.

    This is MEMIT's update with keys K of the prompts and residuals −Q Qᵀ W K: −Q Qᵀ W K Kᵀ (λC + K Kᵀ)⁻¹, with λ =
    ``weight`` × the number of prompts. All keys are those of the unedited model.

    Args:
        direction: as for `ablate`.
        prompts: that show the behaviour.
        layers: whose MLPs; None is all blocks.
        weight: of the text that the statistics are of, against the prompts; 0 or less is refused.
        statistics: folder of second moments of the ``down_proj``; None looks where MEMIT does.

    Returns:
        The delta, which is not applied.

    Raises:
        ConfigError, ModelError: as `ablate` and `find`; there are no statistics of a block.
    """
    if isinstance(weight, bool) or not isinstance(weight, Real) or not 0 < weight < math.inf:
        raise ConfigError(f"weight is {weight!r}; give more than 0, or take `ablate`")
    _check_prompts("prompts", prompts)
    model = Model.of(network, tokenizer)
    parts, now = model.topology, fingerprint(network)
    Q, chosen = _basis(parts, direction), _writing(parts, layers)
    store = StatisticsStore(parts, now, directory=statistics)
    store.require(chosen)
    places = [parts.resolve(layer, "down_proj") for layer in chosen]
    keys = _last_tokens(model, prompts, [module for _, module in places], inputs=True)  # of each layer [N, d]
    updates: dict[str, Update] = {}
    for layer, (path, module), K in zip(chosen, places, keys, strict=True):
        residuals = -(K @ _matrix(module).T @ Q) @ Q.T
        left, right = ops.rank_k_update(K, residuals, store.cholesky(layer), ridge=weight * len(K))
        updates[f"{path}.weight"] = oriented(module, Q, (Q.T @ left) @ right)  # its columns lie in the span of Q
    return _delta(parts, updates, {"layers": chosen, "weight": weight, "rank": Q.shape[1], "prompts": len(prompts)})


def _delta(parts: Topology, updates: dict[str, Update], config: dict[str, Any]) -> WeightDelta:
    about = {"method": "direction", "config": config, "fingerprint": fingerprint(parts.model), "versions": versions()}
    return WeightDelta(updates, about)


def _between(layer: int, a: Tensor, b: Tensor) -> Direction:
    """The direction of states a [N, h] against b [M, h]; its separation is of every second one, made of the others."""
    vector = a.mean(0) - b.mean(0)
    if not vector.norm() > 0:
        raise ModelError(f"the two sets of prompts have the same mean behind block {layer}, or one that is not finite")
    half = a[::2].mean(0) - b[::2].mean(0)
    one, other = a[1::2] @ half, b[1::2] @ half
    spread = ((one.var(unbiased=False) + other.var(unbiased=False)) / 2).sqrt().clamp_min(1e-12)
    return Direction(layer, (vector / vector.norm()).cpu(), float((one.mean() - other.mean()) / spread))


def _last_tokens(model: Model, prompts: Sequence[str], modules: Sequence[nn.Module], *, inputs: bool) -> list[Tensor]:
    """What enters or leaves each module at the last token of each prompt, [N, width] fp32; a prompt is a pass."""
    parts, encoded = model.topology, encode(model.tokenizer, list(prompts))
    bad = [i for i, ids in enumerate(encoded) if not 0 < len(ids) <= parts.context_length]
    if bad:
        raise ConfigError(
            f"{len(bad)} prompts have no tokens, or more than the {parts.context_length} of the model: {bad}"
        )
    seen: dict[int, list[Tensor]] = {place: [] for place in range(len(modules))}

    def keep(place: int) -> Any:
        def hook(_: nn.Module, args: Any, output: Any) -> None:
            x = args[0] if inputs else output[0] if isinstance(output, tuple) else output
            seen[place].append(x.reshape(-1, x.shape[-1])[-1].float())

        return hook

    with hooked(module.register_forward_hook(keep(place)) for place, module in enumerate(modules)):
        for ids in encoded:
            parts.backbone(input_ids=torch.tensor([ids], device=parts.device), use_cache=False)
    return [torch.stack(states) for states in seen.values()]


def _basis(parts: Topology, direction: Tensor) -> Tensor:
    """An orthonormal basis [h, k] fp32 of directions [h] or [k, h]."""
    wanted = f"expected a dense tensor of floating-point numbers, [{parts.hidden_size}] or [k, {parts.hidden_size}]"
    if not isinstance(direction, Tensor):
        raise ConfigError(f"direction is a {type(direction).__name__}: {wanted}, such as the `vector` of a `Direction`")
    if not direction.is_floating_point() or direction.layout is not torch.strided or direction.is_meta:
        raise ConfigError(f"direction is {direction.dtype}, {direction.layout}, on {direction.device}: {wanted}")
    rows = torch.atleast_2d(direction.detach()).double().cpu()
    if rows.ndim != 2 or rows.shape[1] != parts.hidden_size or not rows.isfinite().all():
        raise ConfigError(
            f"directions of shape {list(direction.shape)}: expected finite ones of width {parts.hidden_size}"
        )
    if not len(rows) or int(torch.linalg.matrix_rank(rows)) < len(rows):
        raise ConfigError(f"{len(rows)} directions depend on one another, or one is 0; give independent ones")
    Q: Tensor = torch.linalg.qr(rows.T).Q
    return Q.float().to(parts.device)


def _writing(parts: Topology, layers: Sequence[int] | None) -> list[int]:
    """Layers whose matrices write to the residual stream as they are."""
    chosen = list(range(parts.n_blocks)) if layers is None else _numbers(layers)
    if not parts.mlp_adds:
        raise ModelError(
            f"{parts.name} has a norm or a factor behind its MLPs, so that no direction of theirs is its own"
        )
    if experts := [layer for layer in chosen if holds_experts(parts.block(layer))]:
        raise ModelError(f"blocks {experts} of {parts.name} have experts, which would go on writing; leave them out")
    return chosen


def _numbers(layers: Any) -> list[int]:
    """Numbers of blocks, as they are given."""
    found = list(layers) if isinstance(layers, Iterable) and not isinstance(layers, str) else []
    if not found or any(isinstance(layer, bool) or not isinstance(layer, Integral) for layer in found):
        raise ConfigError(f"layers is {layers!r:.100}; give a list of whole numbers, or leave it out for all blocks")
    if len({*found}) < len(found):
        raise ConfigError(f"layers is {layers!r:.100}; give each block once")
    return [int(layer) for layer in found]


def _check_prompts(name: str, prompts: Any) -> None:
    """Raise ConfigError unless there are some prompts, all of them texts; a lone text is none of its letters."""
    if isinstance(prompts, str) or not isinstance(prompts, Sequence) or not prompts:
        raise ConfigError(f"{name} is {prompts!r:.100}; give a list of texts")
    if wrong := [i for i, prompt in enumerate(prompts) if not isinstance(prompt, str)]:
        raise ConfigError(f"{len(wrong)} of {name} are no texts: {listed([str(i) for i in wrong])} (counted from 0)")


def _matrix(module: nn.Module) -> Tensor:
    """W [h, d] fp32 of the linear map y = W x."""
    weight: Any = module.weight
    found: Tensor = weight.float()
    return found.T if isinstance(module, Conv1D) else found
