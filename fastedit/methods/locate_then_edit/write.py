"""Write updates into projections, layer by layer and batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial

import torch
from torch import Tensor, nn

from fastedit.errors import EditError
from fastedit.methods.base import History
from fastedit.methods.batch import Batch
from fastedit.methods.locate_then_edit.objectives import Objective, moved
from fastedit.methods.locate_then_edit.recipes import Recipe
from fastedit.models import Factors, Model
from fastedit.ops import DependentKeysError
from fastedit.statistics.names import with_names
from fastedit.statistics.store import StatisticsStore
from fastedit.weights import LowRank, Snapshot, Update, add_, oriented

Write = Callable[[int, Tensor, Callable[[], Tensor], Tensor | None], Factors | None]
"""A function of a layer, keys [N, d], a function that measures the residuals [N, h], and the keys at which an equality
holds if they differ from the others. It writes an update, or returns factors of one update per edit
(`per_sample_updates`), which then apply to that edit only."""


@dataclass
class WrittenLayer:
    """A projection that is written, and its objective."""

    path: str  # of its weight
    module: nn.Module
    objective: Objective
    updates: list[LowRank] = field(default_factory=list)  # of the batches so far, in the weight's orientation
    keys: list[Tensor] = field(default_factory=list)  # [N, d] of the batches so far

    @property
    def weight(self) -> nn.Parameter:
        weight: nn.Parameter = self.module.weight  # type: ignore[assignment]
        return weight


def written_layers(
    model: Model, statistics: StatisticsStore, recipe: Recipe, history: History
) -> dict[int, WrittenLayer]:
    """The layers to write, ascending; their objectives preserve the keys of the edits that are in place.

    Raises:
        ModelError: a layer without usable statistics.
    """
    config, kind, layers = recipe.config, recipe.objective, {}
    weight_of_names = config.name_weight or 0.0

    @cache
    def statistics_with_names() -> StatisticsStore:  # not needed if an earlier edit has left all factorizations
        return with_names(statistics, model, recipe.layers, recipe.names, weight_of_names)

    def factorization(layer: int) -> Tensor:
        return kind.factorization(statistics_with_names(), layer, config)

    for layer in recipe.layers:
        path, module = statistics.topology.resolve(layer, config.module)
        C = statistics.in_memory(layer)
        # _version changes with a tensor's values, a digest with the file
        source = (C, C._version) if C is not None else (statistics.digests([layer])[str(layer)],)
        name, *settings = kind.memo(config)
        source = (statistics.fingerprint, *source, recipe.names, weight_of_names, *settings)
        factors = history.memo.get((path, name), source, partial(factorization, layer))
        objective = kind.make(factors, config)
        weight = f"{path}.weight"
        if weight in history.keys:
            objective.preserve(history.keys[weight])
        layers[layer] = WrittenLayer(weight, module, objective)
    return layers


class Writer:
    """Adds updates to the model's weights, in fp32 (fp64 for fp64); other dtypes get the rounded sums.

    `originals` are the weights before.
    """

    def __init__(self, layers: dict[int, WrittenLayer], on_duplicates: str) -> None:
        self._layers, self._on_duplicates = layers, on_duplicates
        self.originals = Snapshot({layer.path: layer.weight for layer in layers.values()})
        self._masters = {
            number: layer.weight.detach().to(torch.promote_types(layer.weight.dtype, torch.float32))
            for number, layer in layers.items()
        }
        self._done = dict.fromkeys(layers, (0, 0))  # updates and keys of the batches that are done
        self.edits = 0
        """Edits in the batches that are done."""

    def write(self, batch: Batch) -> Write:
        """The `Write` for these edits; errors name them."""

        def write(number: int, keys: Tensor, residuals: Callable[[], Tensor], at: Tensor | None) -> None:
            try:
                self._add(number, keys, residuals(), at)
            except DependentKeysError as error:
                try:
                    if self._on_duplicates == "error":
                        raise
                    self._resolve(number, keys, residuals, at, error.groups)
                except DependentKeysError:  # the groups of the first error are places among these edits
                    groups = "; ".join(batch.names(group) for group in error.groups[:5])
                    raise EditError(
                        f"the keys of some edits depend on one another at layer {number}, so that no weights can meet "
                        f"all of them: {groups}. Are they about one subject? Take on_duplicates merge or sequential, "
                        "or an alpha above 0",
                        edits=batch.name_list(sorted({place for group in error.groups for place in group})),
                    ) from error
            self._layers[number].keys.append(keys)

        return write

    def _resolve(
        self,
        number: int,
        keys: Tensor,
        residuals: Callable[[], Tensor],
        at: Tensor | None,
        groups: Sequence[Sequence[int]],
    ) -> None:
        others = sorted({*range(len(keys))}.difference(*groups))
        if self._on_duplicates == "merge":

            def merged(x: Tensor) -> Tensor:
                return torch.cat([x[others], torch.stack([x[[*group]].mean(0) for group in groups])])

            self._add(number, merged(keys), merged(residuals()), None if at is None else merged(at))
            return
        for turn in range(max(map(len, groups))):
            rows = [group[turn] for group in groups if turn < len(group)] + (others if turn == 0 else [])
            self._add(number, keys[rows], residuals()[rows], None if at is None else at[rows])

    def _add(self, number: int, keys: Tensor, residuals: Tensor, at: Tensor | None) -> None:
        layer = self._layers[number]
        update = layer.objective.update(keys, residuals)
        self._write(number, oriented(layer.module, *(update if at is None else moved(update, keys, at))))

    @torch.no_grad()
    def _write(self, number: int, update: LowRank) -> None:
        layer, master = self._layers[number], self._masters[number]
        master.addmm_(update.left.to(master.dtype), update.right.to(master.dtype))
        if layer.weight.dtype != master.dtype:
            layer.weight.copy_(master)
        layer.updates.append(update)

    def state(self) -> dict[str, Tensor]:
        """Updates and keys since the last `commit`, by name."""
        tensors: dict[str, Tensor] = {}
        for number, layer in self._layers.items():
            n_updates, n_keys = self._done[number]
            for i, update in enumerate(layer.updates[n_updates:]):
                tensors |= {f"{number} left {i}": update.left, f"{number} right {i}": update.right}
            tensors |= {f"{number} keys": torch.cat(layer.keys[n_keys:])} if layer.keys[n_keys:] else {}
        return tensors

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Write again what `state` returned, to the same bits."""
        for number, layer in self._layers.items():
            device = layer.weight.device
            for i in range(sum(name.startswith(f"{number} left ") for name in state)):
                left, right = (state[f"{number} {side} {i}"].to(device) for side in ("left", "right"))
                self._write(number, LowRank(left, right))
            if f"{number} keys" in state:
                layer.keys.append(state[f"{number} keys"].to(device))
                layer.objective.preserve(layer.keys[-1])

    def commit(self, edits: int) -> None:
        """Count a batch as done; `edits` is how many edits are done in all."""
        self.edits = edits
        self._done = {number: (len(layer.updates), len(layer.keys)) for number, layer in self._layers.items()}

    @torch.no_grad()
    def finish(self) -> tuple[dict[str, Update], dict[str, Tensor]]:
        """The updates and keys of the batches that are done; the model then holds exactly these updates, added once."""
        self.originals.restore()
        updates: dict[str, Update] = {}
        keys: dict[str, Tensor] = {}
        for number, layer in self._layers.items():
            n_updates, n_keys = self._done[number]
            keys[layer.path] = torch.cat(layer.keys[:n_keys])
            parts = layer.updates[:n_updates]
            whole = LowRank(torch.cat([p.left for p in parts], 1), torch.cat([p.right for p in parts]))
            small = whole.left.numel() + whole.right.numel() < layer.weight.numel()
            update: Update = whole if small else whole.dense()
            add_(layer.weight, update)
            if not layer.weight.isfinite().all():
                raise EditError(f"the weights of {layer.path} are not finite after the edit; the model is restored")
            updates[layer.path] = update
        return updates, keys
