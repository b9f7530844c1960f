"""Find directions of behaviours in the residual stream, and remove them from what the model writes there.

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
from fastedit.models import MLPTail, Model, Topology, encode, fingerprint, hooked, plain_state, topology
from fastedit.models.block_parts import holds_experts
from fastedit.statistics.store import StatisticsStore
from fastedit.weights import LowRank, Update, oriented


@dataclass(frozen=True, eq=False)
class Direction:
    """The direction in which the hidden states after a block differ between two sets of prompts.

    ``vector`` [h] has length 1, in fp32. ``separation`` is the distance of the two means along such a direction, in
    standard deviations: half of the prompts give the direction, the other half are measured.
    """

    layer: int
    vector: Tensor
    separation: float


@plain_state
@torch.no_grad()
def find(network: nn.Module, tokenizer: Any, having: Sequence[str], lacking: Sequence[str]) -> list[Direction]:
    """Find the difference of the mean hidden states at the last token of the prompts, after each block.

    Args:
        having: prompts that show the behaviour, at least four.
        lacking: prompts that do not, at least four; in everything else as similar to the others as possible.

    Raises:
        ConfigError: too few prompts, or one without tokens or too long for the model.
        ModelError: as for `Model.of`; the two sets have the same mean after a block, or one that is not finite.
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
    """Remove directions from what blocks write to the residual stream: W ← W − Q Qᵀ W.

    Args:
        direction: one [h] or several [k, h], of any length; Q is an orthonormal basis of their span.
        layers: blocks whose attention and MLP are changed; None is all blocks.
        embeddings: also change the token embedding and learned position embeddings. A tied head changes with them.

    Returns:
        The delta, not yet applied: low-rank updates of the matrices, and updates of their biases.

    Raises:
        ModelError: unsupported weights; a norm or experts between these matrices and the residual stream.
        ConfigError: directions of a wrong width or dtype, not finite, or linearly dependent; layers that are not
            numbers of blocks, or are given twice.
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
    """Remove directions from what MLPs write at the last token of some prompts; preserve what they write elsewhere.

    This is MEMIT's update with keys K of the prompts and residuals −Q Qᵀ W K: −Q Qᵀ W K Kᵀ (λC + K Kᵀ)⁻¹, with λ =
    ``weight`` × the number of prompts. All keys are those of the unedited model.

    Args:
        direction: as for `ablate`.
        prompts: prompts that show the behaviour.
        layers: blocks whose MLPs are changed; None is all blocks.
        weight: weight of the statistics' text against the prompts; more than 0.
        statistics: folder of second moments of the ``down_proj``; None looks where MEMIT does.

    Returns:
        The delta, not yet applied.

    Raises:
        ConfigError, ModelError: as for `ablate` and `find`; a block has no statistics.
    """
    if isinstance(weight, bool) or not isinstance(weight, Real) or not 0 < weight < math.inf:
        raise ConfigError(f"weight is {weight!r}; give more than 0, or take `ablate`")
    _check_prompts("prompts", prompts)
    model = Model.of(network, tokenizer)
    parts, now = model.topology, fingerprint(network)
    Q, chosen = _basis(parts, direction), _writing(parts, layers)
    store = StatisticsStore(parts, now, directory=statistics)
    store.require(chosen)
    projections = [parts.resolve(layer, "down_proj") for layer in chosen]
    keys = _last_tokens(model, prompts, [module for _, module in projections], inputs=True)  # of each layer [N, d]
    updates: dict[str, Update] = {}
    for layer, (path, module), K in zip(chosen, projections, keys, strict=True):
        residuals = -(K @ _matrix(module).T @ Q) @ Q.T
        left, right = ops.rank_k_update(K, residuals, store.cholesky(layer), ridge=weight * len(K))
        updates[f"{path}.weight"] = oriented(module, Q, (Q.T @ left) @ right)  # its columns lie in the span of Q
    return _delta(parts, updates, {"layers": chosen, "weight": weight, "rank": Q.shape[1], "prompts": len(prompts)})


def _delta(parts: Topology, updates: dict[str, Update], config: dict[str, Any]) -> WeightDelta:
    metadata = {
        "method": "direction",
        "config": config,
        "fingerprint": fingerprint(parts.model),
        "versions": versions(),
    }
    return WeightDelta(updates, metadata)


def _between(layer: int, a: Tensor, b: Tensor) -> Direction:
    """The direction from states b [M, h] to a [N, h]; its separation is measured on every second one of them."""
    vector = a.mean(0) - b.mean(0)
    if not vector.norm() > 0:
        raise ModelError(f"the two sets of prompts have the same mean after block {layer}, or one that is not finite")
    half = a[::2].mean(0) - b[::2].mean(0)
    projected_a, projected_b = a[1::2] @ half, b[1::2] @ half
    deviation = ((projected_a.var(unbiased=False) + projected_b.var(unbiased=False)) / 2).sqrt().clamp_min(1e-12)
    return Direction(
        layer, (vector / vector.norm()).cpu(), float((projected_a.mean() - projected_b.mean()) / deviation)
    )


def _last_tokens(model: Model, prompts: Sequence[str], modules: Sequence[nn.Module], *, inputs: bool) -> list[Tensor]:
    """Inputs or outputs of each module at the last token of each prompt, [N, width] fp32; one pass per prompt."""
    parts, encoded = model.topology, encode(model.tokenizer, list(prompts))
    bad = [i for i, ids in enumerate(encoded) if not 0 < len(ids) <= parts.context_length]
    if bad:
        raise ConfigError(
            f"{len(bad)} prompts have no tokens, or more than the {parts.context_length} of the model: {bad}"
        )
    captured: dict[int, list[Tensor]] = {place: [] for place in range(len(modules))}

    def keep(place: int) -> Any:
        def hook(_: nn.Module, args: Any, output: Any) -> None:
            x = args[0] if inputs else output[0] if isinstance(output, tuple) else output
            captured[place].append(x.reshape(-1, x.shape[-1])[-1].float())

        return hook

    with hooked(module.register_forward_hook(keep(place)) for place, module in enumerate(modules)):
        for ids in encoded:
            parts.backbone(input_ids=torch.tensor([ids], device=parts.device), use_cache=False)
    return [torch.stack(states) for states in captured.values()]


def _basis(parts: Topology, direction: Tensor) -> Tensor:
    """An orthonormal basis [h, k] fp32 of directions [h] or [k, h]."""
    expected = f"expected a dense tensor of floating-point numbers, [{parts.hidden_size}] or [k, {parts.hidden_size}]"
    if not isinstance(direction, Tensor):
        raise ConfigError(
            f"direction is a {type(direction).__name__}: {expected}, such as the `vector` of a `Direction`"
        )
    if not direction.is_floating_point() or direction.layout is not torch.strided or direction.is_meta:
        raise ConfigError(f"direction is {direction.dtype}, {direction.layout}, on {direction.device}: {expected}")
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
    """The chosen layers; raises ModelError if their matrices do not write straight to the residual stream."""
    chosen = list(range(parts.n_blocks)) if layers is None else _numbers(layers)
    tail = MLPTail.of(parts, 0)
    if tail is None or not tail.adds:
        raise ModelError(
            f"{parts.name} has a norm or a factor after its MLPs, so that no direction of theirs is its own"
        )
    if experts := [layer for layer in chosen if holds_experts(parts.block(layer))]:
        raise ModelError(f"blocks {experts} of {parts.name} have experts, which would still write it; leave them out")
    return chosen


def _numbers(layers: Any) -> list[int]:
    """The given numbers of blocks. Raises ConfigError if they are not numbers, or repeated."""
    numbers = list(layers) if isinstance(layers, Iterable) and not isinstance(layers, str) else []
    if not numbers or any(isinstance(layer, bool) or not isinstance(layer, Integral) for layer in numbers):
        raise ConfigError(f"layers is {layers!r:.100}; give a list of whole numbers, or leave it out for all blocks")
    if len({*numbers}) < len(numbers):
        raise ConfigError(f"layers is {layers!r:.100}; give each block once")
    return [int(layer) for layer in numbers]


def _check_prompts(name: str, prompts: Any) -> None:
    """Raise ConfigError unless the prompts are a list of texts, at least one; a single text is not a list."""
    if isinstance(prompts, str) or not isinstance(prompts, Sequence) or not prompts:
        raise ConfigError(f"{name} is {prompts!r:.100}; give a list of texts")
    if wrong := [i for i, prompt in enumerate(prompts) if not isinstance(prompt, str)]:
        raise ConfigError(f"{len(wrong)} of {name} are not texts: {listed([str(i) for i in wrong])} (counted from 0)")


def _matrix(module: nn.Module) -> Tensor:
    """W [h, d] fp32 of the linear map y = W x."""
    weight: Any = module.weight
    matrix: Tensor = weight.float()
    return matrix.T if isinstance(module, Conv1D) else matrix
