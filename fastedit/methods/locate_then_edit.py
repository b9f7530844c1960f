"""Locate-then-edit: ROME, MEMIT, EMMET and AlphaEdit as one objective × one distribution (arXiv 2403.14236).

Targets z of all edits of a batch (`targets`), their keys layer by layer (`keys`), and at each layer of the
distribution the objective's update of one projection.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fastedit.errors import EditError
from fastedit.methods.base import EachResult, Edit, History, MethodResult, Progress, no_progress
from fastedit.methods.contexts import sample_contexts
from fastedit.methods.keys import KeyWalk
from fastedit.methods.objectives import Equality, LeastSquares, NullSpace, Objective, null_space
from fastedit.methods.plan import LocateThenEditConfig, Plan, resolve
from fastedit.methods.subjects import BARE, named, subject_ends
from fastedit.methods.target_loop import relative_lr
from fastedit.methods.target_store import TargetStore
from fastedit.methods.targets import Targets, find_targets, target_samples
from fastedit.models import Budget, LowRank, Topology, Update, add_, no_autocast
from fastedit.models.per_sample import Factors
from fastedit.ops import DependentKeysError
from fastedit.statistics import load_covariance, load_factor, require_statistics

Write = Callable[[int, Tensor, Callable[[], Tensor]], Factors | None]
"""Takes a layer, keys [N, d] and what measures the residuals [N, h]. It writes an update of the layer, or returns
factors of one update an edit (`per_sample_updates`), which then count for that edit alone."""


@no_autocast
def locate_then_edit(
    topology: Topology,
    tokenizer: Any,
    edits: Sequence[Edit],
    config: LocateThenEditConfig,
    progress: Progress = no_progress,
    *,
    history: History,
    method: str,
) -> MethodResult:
    """Edit the model in place.

    Args:
        method: whose settings fill what the configuration leaves open.

    Raises:
        ConfigError, ModelError, RequestError: before the model is touched; ModelError where there are no statistics.
        EditError: keys that depend on one another, or values that are not finite; names the edits. The model is
            restored, as on every exception.
    """
    plan = checked_plan(topology, edits, config, method, history.fingerprint)
    layers = written_layers(topology, plan, history)
    contexts = make_contexts(topology, tokenizer, plan.config)
    *_, said = target_samples(topology, tokenizer, edits, contexts)  # refuses edits before hours of work on others
    store = target_store(topology, plan.config, layers)
    weights = _Weights(layers, plan.config.on_duplicates)
    size = len(edits) if plan.config.batch_size == "auto" else int(plan.config.batch_size)
    losses: list[float] = []
    interrupted: str | None = None
    if plan.target.lr is None and size < len(edits):  # or the first batch would decide for all
        plan = plan.with_lr(_lr_of_all(topology, tokenizer, edits, plan))
    notes, dropped = dict.fromkeys([*plan.notes, *said]), list[int]()
    try:
        try:
            for first in range(0, len(edits), size):
                batch = edits[first : first + size]
                targets = find_or_load(topology, tokenizer, batch, plan, contexts, store, progress)
                if plan.target.lr is None:
                    plan = plan.with_lr(targets.lr)
                    notes |= dict.fromkeys(plan.notes)
                kept = [i for i in range(len(batch)) if i not in targets.dropped]
                if kept:
                    chosen, z = [batch[i] for i in kept], targets.z[kept]
                    walk_layers(topology, tokenizer, chosen, z, plan, contexts, weights.of(chosen), progress)
                    losses.append(float(targets.loss.nanmean()))
                dropped += [first + i for i in targets.dropped]
                weights.commit(first + len(batch))
                progress("edits", first + len(batch), len(edits), losses[-1] if losses else None)
            if len(dropped) == len(edits):
                raise EditError("no edit has a target: their losses are not finite. Are the model's weights?")
        except KeyboardInterrupt:
            if not plan.config.keep_partial or len(dropped) == weights.edits:
                raise
            interrupted = f"kept the first {weights.edits} edits"
            notes[f"interrupted; {interrupted}"] = None
        updates, keys = weights.finish()
    except BaseException:
        weights.restore()
        raise
    if dropped:
        notes[f"dropped, because the loss is not finite: {named(edits, dropped)}"] = None
    originals = {layer.path: layer.original for layer in layers.values()}
    return MethodResult(
        updates,
        originals,
        asdict(plan.config),
        losses,
        list(notes),
        keys,
        tuple(dropped),
        interrupted=interrupted,
        kept=weights.edits if interrupted else None,
    )


@no_autocast
def locate_then_edit_each(
    topology: Topology,
    tokenizer: Any,
    edits: Sequence[Edit],
    config: LocateThenEditConfig,
    progress: Progress = no_progress,
    *,
    history: History,
    method: str,
) -> EachResult:
    """Solve N independent problems of one edit each, all against the model as it is; nothing is written.

    Raises:
        ConfigError, ModelError, RequestError: as `locate_then_edit`.
    """
    plan = checked_plan(topology, edits, config, method, history.fingerprint)
    layers = written_layers(topology, plan, replace(history, keys={}))
    contexts = make_contexts(topology, tokenizer, plan.config)
    store = target_store(topology, plan.config, layers)
    targets = find_or_load(topology, tokenizer, edits, plan, contexts, store, progress)
    if plan.target.lr is None:
        plan = plan.with_lr(targets.lr)
    kept = [i for i in range(len(edits)) if i not in targets.dropped]
    factors: dict[str, Factors] = {}

    def solve(number: int, keys: Tensor, residuals: Callable[[], Tensor]) -> Factors:
        found = layers[number].objective.update_each(keys, residuals())
        index = torch.tensor(kept, device=keys.device)  # edits without a target get an update of zeros
        left, right = (x.new_zeros(len(edits), *x.shape[1:]).index_copy(0, index, x) for x in found)
        factors[layers[number].path] = left, right
        return found

    if kept:
        chosen = [edits[i] for i in kept]
        walk_layers(topology, tokenizer, chosen, targets.z[kept], plan, contexts, solve, progress)
    notes = [*dict.fromkeys([*plan.notes, *targets.notes])]
    return EachResult(factors, asdict(plan.config), targets.loss, targets.probability, notes, targets.dropped)


def checked_plan(
    topology: Topology, edits: Sequence[Edit], config: LocateThenEditConfig, method: str, fingerprint: str
) -> Plan:
    """What will be done, if nothing that can be told at once is against it.

    Args:
        fingerprint: of the unedited model.

    Raises:
        ConfigError, ModelError, RequestError: choices that do not go together, or that the model lacks; an edit whose
            subject is not in its prompt; layers without statistics, all of them named.
    """
    plan = resolve(topology, config, method)
    subject_ends(edits)
    layers = [layer for layer, _ in plan.places]
    source: dict[str, Any] = {"directory": config.statistics, "unchecked": config.unchecked_statistics}
    require_statistics(topology, fingerprint, layers, plan.config.module, **source)
    return plan


def make_contexts(topology: Topology, tokenizer: Any, config: LocateThenEditConfig) -> list[str]:
    """Templates with one "{}" each, where the prompt goes behind a text; without the bare one."""
    if config.contexts is not None:
        return list(config.contexts)
    texts = sample_contexts(topology, tokenizer, config.n_contexts or 0, seed=config.seed) if config.n_contexts else []
    return [text.translate({ord(c): None for c in BARE}) + f" {BARE}" for text in texts]


@dataclass
class WrittenLayer:
    """A projection that is written, and its objective."""

    path: str  # of its weight
    module: nn.Module
    objective: Objective
    original: Tensor  # the weight before, in its dtype
    factors: list[LowRank] = field(default_factory=list)  # of the batches so far, oriented as the weight is
    keys: list[Tensor] = field(default_factory=list)  # [N, d] of the batches so far

    @property
    def weight(self) -> nn.Parameter:
        weight: nn.Parameter = self.module.weight  # type: ignore[assignment]
        return weight

    def oriented(self, left: Tensor, right: Tensor) -> LowRank:
        """ΔW = left [h, k] @ right [k, d] as an update of the weight, which Conv1D stores transposed."""
        return LowRank(right.T, left.T) if isinstance(self.module, Conv1D) else LowRank(left, right)


def written_layers(topology: Topology, plan: Plan, history: History) -> dict[int, WrittenLayer]:
    """What the plan writes, upwards; the objectives preserve the keys of the edits that stand.

    Raises:
        ModelError: a layer without usable statistics.
    """
    config, found = plan.config, {}
    source: dict[str, Any] = {"directory": config.statistics, "unchecked": config.unchecked_statistics}
    for layer, _ in plan.places:
        path, module = topology.resolve(layer, config.module)
        where = (topology, history.fingerprint, layer, config.module)
        key = (history.fingerprint, path, config.statistics, config.objective == "null-space" and config.null_threshold)
        if key not in history.kept:  # a factorization of the second moment serves all edits of an Editor
            if config.objective == "null-space":
                basis = null_space(load_covariance(*where, **source), config.null_threshold)
                history.kept[key] = basis
            else:
                history.kept[key] = load_factor(*where, **source)
        objective = _objective(config, history.kept[key])
        weight = f"{path}.weight"
        if weight in history.keys:
            objective.preserve(history.keys[weight])
        original = module.weight.detach().clone()  # type: ignore[operator]
        found[layer] = WrittenLayer(weight, module, objective, original)
    return found


def _objective(config: LocateThenEditConfig, factor: Tensor) -> Objective:
    assert config.cov_weight is not None
    assert config.alpha is not None
    assert config.l2 is not None
    if config.objective == "null-space":
        return NullSpace(factor, config.l2)
    if config.objective == "equality":
        return Equality(factor, config.cov_weight, config.alpha)
    return LeastSquares(factor, config.cov_weight)


def target_store(
    topology: Topology, config: LocateThenEditConfig, layers: Mapping[int, WrittenLayer]
) -> TargetStore | None:
    """The folder of targets, if one is given."""
    if config.targets is None:
        return None
    return TargetStore(config.targets, topology, [layer.path for layer in layers.values()])


def find_or_load(
    topology: Topology,
    tokenizer: Any,
    edits: Sequence[Edit],
    plan: Plan,
    contexts: Sequence[str],
    store: TargetStore | None,
    progress: Progress,
) -> Targets:
    """The targets of these edits on the model as it is, from the folder of targets if they are there."""
    key = "" if store is None else store.key(tokenizer, edits, plan.z_layer, plan.target, contexts)
    found = None if store is None else store.load(key)
    if found is not None:
        return found
    found = find_targets(
        topology,
        tokenizer,
        edits,
        plan.z_layer,
        plan.target,
        contexts=contexts,
        budget=_budget(plan.config),
        progress=progress,
    )
    if store is not None:
        store.save(key, found)
    return found


def walk_layers(
    topology: Topology,
    tokenizer: Any,
    edits: Sequence[Edit],
    z: Tensor,
    plan: Plan,
    contexts: Sequence[str],
    write: Write,
    progress: Progress,
) -> None:
    """Give `write` the keys and residuals of every layer, upwards; what it wrote counts at the layers above."""
    config, last = plan.config, plan.z_layer
    site = config.module if config.site == "mlp" else "block"
    with KeyWalk(
        topology,
        tokenizer,
        edits,
        plan.places[0][0],
        contexts=contexts,
        average=plan.average,
        budget=_budget(config),
        progress=progress,
    ) as walk:
        for layer, share in plan.places:
            walk.advance(layer)

            def residuals(share: float = share) -> Tensor:
                return (z - walk.outputs(last, site)) * share

            factors = write(layer, walk.keys(config.module), residuals)
            if factors is not None:
                walk.updates[topology.resolve(layer, config.module)[1]] = factors


def _lr_of_all(topology: Topology, tokenizer: Any, edits: Sequence[Edit], plan: Plan) -> float:
    """The targets' rate by the states of all edits in the model as it is."""
    site = "down_proj" if plan.config.site == "mlp" else "block"
    with KeyWalk(topology, tokenizer, edits, plan.z_layer, budget=_budget(plan.config)) as walk:
        return relative_lr(walk.outputs(plan.z_layer, site, finite=False))


def _budget(config: LocateThenEditConfig) -> Budget:
    return Budget(device_bytes=config.cache_bytes, host_bytes=config.cache_bytes)


class _Weights:
    """Writes into the model's weights, in fp32; of other weights the model gets the rounded ones."""

    def __init__(self, layers: dict[int, WrittenLayer], on_duplicates: str) -> None:
        self._layers, self._on_duplicates = layers, on_duplicates
        self._masters = {
            number: layer.weight.detach().to(torch.promote_types(layer.weight.dtype, torch.float32))
            for number, layer in layers.items()
        }
        self._done = dict.fromkeys(layers, (0, 0))  # factors and keys of the batches that are done
        self.edits = 0  # in the batches that are done

    def of(self, edits: Sequence[Edit]) -> Write:
        """The writer for these edits, by whose names errors speak of keys."""

        def write(number: int, keys: Tensor, residuals: Callable[[], Tensor]) -> None:
            try:
                self._add(number, keys, residuals())
            except DependentKeysError as error:
                try:
                    if self._on_duplicates == "error":
                        raise
                    self._resolve(number, keys, residuals, error.groups)
                except DependentKeysError:  # the first one's groups are places among these edits
                    groups = "; ".join(named(edits, group) for group in error.groups[:5])
                    raise EditError(
                        f"the keys of some edits depend on one another at layer {number}, so that no weights can meet "
                        f"all of them: {groups}. Are they about one subject? Take on_duplicates merge or sequential, "
                        "or an alpha above 0"
                    ) from error
            self._layers[number].keys.append(keys)

        return write

    def _resolve(
        self, number: int, keys: Tensor, residuals: Callable[[], Tensor], groups: Sequence[Sequence[int]]
    ) -> None:
        rest = sorted({*range(len(keys))}.difference(*groups))
        if self._on_duplicates == "merge":
            wanted = residuals()
            means = [torch.stack([x[[*group]].mean(0) for group in groups]) for x in (keys, wanted)]
            self._add(number, torch.cat([keys[rest], means[0]]), torch.cat([wanted[rest], means[1]]))
            return
        for turn in range(max(map(len, groups))):
            rows = [group[turn] for group in groups if turn < len(group)] + (rest if turn == 0 else [])
            self._add(number, keys[rows], residuals()[rows])

    @torch.no_grad()
    def _add(self, number: int, keys: Tensor, residuals: Tensor) -> None:
        layer, master = self._layers[number], self._masters[number]
        update = layer.oriented(*layer.objective.update(keys, residuals))
        master.addmm_(update.left.to(master.dtype), update.right.to(master.dtype))
        if layer.weight.dtype != master.dtype:
            layer.weight.copy_(master)
        layer.factors.append(update)

    def commit(self, edits: int) -> None:
        """A batch is done, and with it so many edits."""
        self.edits = edits
        self._done = {number: (len(layer.factors), len(layer.keys)) for number, layer in self._layers.items()}

    @torch.no_grad()
    def finish(self) -> tuple[dict[str, Update], dict[str, Tensor]]:
        """Updates and keys of the batches that are done; the model holds exactly these, added once."""
        updates: dict[str, Update] = {}
        keys: dict[str, Tensor] = {}
        for number, layer in self._layers.items():
            factors = layer.factors[: self._done[number][0]]
            keys[layer.path] = torch.cat(layer.keys[: self._done[number][1]])
            whole = LowRank(torch.cat([f.left for f in factors], 1), torch.cat([f.right for f in factors]))
            small = whole.left.numel() + whole.right.numel() < layer.weight.numel()
            update: Update = whole if small else whole.dense()
            layer.weight.copy_(layer.original)
            add_(layer.weight, update)
            if not layer.weight.isfinite().all():
                raise EditError(f"the weights of {layer.path} are not finite after the edit; the model is restored")
            updates[layer.path] = update
        return updates, keys

    @torch.no_grad()
    def restore(self) -> None:
        for layer in self._layers.values():
            layer.weight.copy_(layer.original)
