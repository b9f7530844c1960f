"""Locate-then-edit: ROME, MEMIT, EMMET and AlphaEdit as one objective × one distribution (arXiv 2403.14236).

An edit finds the targets z of all edits of a batch (`targets`) and their keys layer by layer (`keys`). At each layer of
the distribution it writes the objective's update of one projection (`write`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fastedit import parallel
from fastedit.errors import EditError
from fastedit.files import check_writable
from fastedit.methods.base import LIKELY, EachResult, Edit, History, MethodResult
from fastedit.methods.batch import Batch
from fastedit.methods.contexts import context_templates
from fastedit.methods.keys import KeyWalk
from fastedit.methods.locate_then_edit.config import LocateThenEditConfig
from fastedit.methods.locate_then_edit.objectives import moved
from fastedit.methods.locate_then_edit.recipes import Recipe, resolve
from fastedit.methods.locate_then_edit.target_loop import relative_lr
from fastedit.methods.locate_then_edit.target_store import TargetStore
from fastedit.methods.locate_then_edit.targets import Targets, find_targets
from fastedit.methods.locate_then_edit.write import Write, Writer, WrittenLayer, written_layers
from fastedit.methods.naming import check_rows
from fastedit.methods.saved_run import SavedRun, State
from fastedit.models import Budget, Factors, MLPTail, Model, fingerprint, load_suffix, plain_state
from fastedit.progress import LEARNED, Progress, no_progress
from fastedit.statistics.names import known_names
from fastedit.statistics.store import StatisticsStore

Find = Callable[[Batch, Recipe], Targets]
"""A function that finds the targets of some edits with the model's current weights."""
_SAVED_TARGETS = 256  # targets that are optimized together if the state of the run is kept


@plain_state
def plan(
    model: Model,
    edits: Sequence[Edit],
    config: LocateThenEditConfig,
    *,
    method: LocateThenEditConfig,
    history: History | None = None,
    progress: Progress = no_progress,
) -> LocateThenEditPlan:
    """Make every choice and check, without changing the model.

    Args:
        method: one of `RECIPES`; it fills what the configuration leaves open.

    Raises:
        ConfigError, ModelError: choices that do not go together, or layers or modules that the model lacks; layers
            without statistics, all of them named; a folder of targets that cannot be written.
            A name that the tokenizer does not know.
        RequestError: edits whose subject is not in their prompt, or that do not fit the context; all of them named.
    """
    check_rows(model, edits)
    history = history or History(now := fingerprint(model.network), now=now)
    recipe = resolve(model.topology, config, method)
    config = recipe.config
    if config.name_weight:
        names = known_names(model, config.names, (edit.subject for edit in edits if edit.subject))
        notes = [f"name_weight {config.name_weight:g}: {len(names)} names count with the text"] if names else []
        recipe = replace(recipe, names=names, notes=recipe.notes + notes)
    where = (config.module, config.statistics, config.unchecked_statistics)
    statistics = StatisticsStore(model.topology, history.fingerprint, *where, given=history.second_moments)
    budget = Budget(device_bytes=config.cache_bytes, host_bytes=config.cache_bytes)
    base = Batch(model, edits, config.contexts or (), budget=budget, progress=progress)
    base.require_subjects()
    statistics.require(recipe.layers)
    if config.targets is not None and parallel.first():
        check_writable(Path(config.targets))
    if config.contexts is None:
        n = config.n_contexts or 0
        batch = base.within(context_templates(model, n, seed=config.seed) if n else ())
    else:
        batch = base
    batch.make_samples()
    load_suffix(model.topology, recipe.layers[0])
    unsaved_plan = LocateThenEditPlan(batch, recipe, statistics, history)
    return replace(unsaved_plan, saved=SavedRun.of(model, edits, config, history, unsaved_plan.digests))


def _find(batch: Batch, recipe: Recipe) -> Targets:
    """Find the targets of these edits; every process finds its share of them."""
    if parallel.world() == 1:
        return find_targets(batch, recipe.z_layer, recipe.target)
    places = parallel.share(len(batch))
    targets = find_targets(batch.select(places), recipe.z_layer, recipe.target) if places else None
    states = [state for state in parallel.gathered(_on_cpu(targets)) if state is not None]
    return Targets.joined([Targets.of_state(tensors, metadata, batch.model.device) for tensors, metadata in states])


def _on_cpu(targets: Targets | None) -> State | None:
    if targets is None:
        return None
    tensors, metadata = targets.state()
    return {name: x.cpu() for name, x in tensors.items()}, metadata


@dataclass(frozen=True)
class LocateThenEditPlan:
    """A locate-then-edit run that is ready.

    `saved` keeps the state of the run on disk, None if it is not kept; `find` finds the targets.
    """

    batch: Batch
    recipe: Recipe
    statistics: StatisticsStore
    history: History
    saved: SavedRun | None = None
    find: Find = _find

    @property
    def notes(self) -> list[str]:
        return [*dict.fromkeys([*self.recipe.notes, *self.batch.notes])]

    def digests(self) -> dict[str, str]:
        """Digest of the file of second moments of each layer that has one."""
        return self.statistics.digests(self.recipe.layers)

    @plain_state
    def run(self) -> MethodResult:
        """Edit the model in place.

        Raises:
            ModelError: damaged statistics. EditError: keys that are linearly dependent, or values that are not
                finite; names the edits. The model is restored, as on every exception.
        """
        recipe, batch, config = self.recipe, self.batch, self.recipe.config
        layers = written_layers(batch.model, self.statistics, recipe, self.history)
        find = partial(_find_or_load, store=self._target_store(layers), find=self.find)
        size = len(batch) if config.batch_size == "auto" else int(config.batch_size)
        saved = self.saved
        in_parts = size < len(batch) or saved or parallel.world() > 1
        if config.lr is None and in_parts:  # or the first part would decide the rate of all
            recipe = recipe.with_lr(_lr_of_all(batch, recipe))
        losses: list[float] = []
        learned: list[int] = []
        dropped: list[int] = []
        probability = torch.full((len(batch),), torch.nan)
        interrupted: str | None = None
        writer = Writer(layers, config.on_duplicates)
        with writer.originals:
            try:
                for first, part in zip(range(0, len(batch), size), batch.split(size), strict=True):
                    targets = _targets(part, recipe, find, saved)
                    if recipe.config.lr is None:
                        recipe = recipe.with_lr(targets.lr)
                    _write(part, targets, recipe, writer, saved)
                    dropped += [first + i for i in targets.dropped]
                    probability[first : first + len(part)] = targets.probability.cpu()
                    if len(targets.dropped) < len(part):
                        losses.append(float(targets.loss.nanmean()))
                        learned.append(int((probability >= LIKELY).sum()))
                    writer.commit(first + len(part))
                    batch.progress("edits", first + len(part), len(batch), losses[-1] if losses else None)
                    batch.progress(LEARNED, learned[-1] if learned else 0, len(batch))
                if len(dropped) == len(batch):
                    raise EditError("no edit has a target: their losses are not finite. Are the model's weights?")
            except KeyboardInterrupt:
                if saved is not None:
                    saved.flush()
                if not config.keep_partial or len(dropped) == writer.edits or parallel.world() > 1:
                    raise
                interrupted = f"kept the first {writer.edits} edits"
            updates, keys = writer.finish()
        if saved is not None and interrupted is None:
            saved.finish()
        notes = [*recipe.notes, *batch.notes, *(saved.notes if saved else [])]
        notes += [f"interrupted; {interrupted}"] if interrupted else []
        notes += [f"dropped, because the loss is not finite: {batch.names(dropped)}"] if dropped else []
        return MethodResult(
            updates=updates,
            originals=writer.originals.values,
            config=asdict(recipe.config),
            probability=probability,
            losses=losses,
            notes=notes,
            keys=keys,
            dropped=tuple(dropped),
            interrupted=interrupted,
            kept_edits=writer.edits if interrupted else None,
            learned=learned,
            cached=batch.budget.tally.most,
        )

    @plain_state
    def run_each(self) -> EachResult:
        """Solve N independent problems of one edit each, with the model's current weights; nothing is written.

        Raises:
            ModelError, EditError: as for `run`.
        """
        batch, recipe = self.batch, self.recipe
        layers = written_layers(batch.model, self.statistics, recipe, replace(self.history, keys={}))
        if recipe.config.lr is None and parallel.world() > 1:
            recipe = recipe.with_lr(_lr_of_all(batch, recipe))
        targets = _find_or_load(batch, recipe, self._target_store(layers), self.find)
        if recipe.config.lr is None:
            recipe = recipe.with_lr(targets.lr)
        with_target = [i for i in range(len(batch)) if i not in targets.dropped]
        factors: dict[str, Factors] = {}

        def solve(number: int, keys: Tensor, residuals: Callable[[], Tensor], at: Tensor | None) -> Factors:
            update = layers[number].objective.update_each(keys, residuals())
            update = update if at is None else moved(update, keys[:, None], at[:, None])
            index = torch.tensor(with_target, device=keys.device)  # edits without a target get an update of zeros
            left, right = (x.new_zeros(len(batch), *x.shape[1:]).index_copy(0, index, x) for x in update)
            factors[layers[number].path] = left, right
            return update

        if with_target:
            _walk_layers(batch.select(with_target), targets.z[with_target], recipe, solve)
        notes = [*recipe.notes, *targets.notes]
        return EachResult(factors, asdict(recipe.config), targets.loss, targets.probability, notes, targets.dropped)

    def _target_store(self, layers: dict[int, WrittenLayer]) -> TargetStore | None:
        folder, topology = self.recipe.config.targets, self.batch.model.topology
        return None if folder is None else TargetStore(folder, topology, [layer.path for layer in layers.values()])


def _targets(batch: Batch, recipe: Recipe, find: Find, saved: SavedRun | None) -> Targets:
    """The targets of these edits; those that a saved run holds are not optimized again."""
    if saved is None:
        return find(batch, recipe)
    targets = []
    for part in batch.split(_SAVED_TARGETS):
        state = saved.next()
        if state is not None:
            targets.append(Targets.of_state(*state, batch.model.device))
        else:
            targets.append(find(part, recipe))
            saved.append(*targets[-1].state())
    return Targets.joined(targets)


def _write(batch: Batch, targets: Targets, recipe: Recipe, writer: Writer, saved: SavedRun | None) -> None:
    """Write a batch of edits; if a saved run holds its updates, write those again."""
    state = saved.next() if saved else None
    if state is not None:
        writer.load(state[0])
        return
    with_target = [i for i in range(len(batch)) if i not in targets.dropped]
    if with_target:
        chosen = batch.select(with_target)
        _walk_layers(chosen, targets.z[with_target], recipe, writer.write(chosen))
    if saved is not None:
        saved.append(writer.state(), {})


def _find_or_load(batch: Batch, recipe: Recipe, store: TargetStore | None, find: Find) -> Targets:
    """The targets of these edits for the current weights, from the folder of targets if they are there."""
    if store is None:
        return find(batch, recipe)
    key = store.key(batch, recipe.z_layer, recipe.target)
    state = parallel.of_first(lambda: _on_cpu(store.load(key)))
    if state is not None:
        tensors, metadata = state
        return Targets.of_state(tensors, metadata, batch.model.device)
    targets = find(batch, recipe)
    parallel.of_first(lambda: store.save(key, targets))
    return targets


def _walk_layers(batch: Batch, z: Tensor, recipe: Recipe, write: Write) -> None:
    """Call `write` with the keys and residuals of every layer, ascending; its updates count at the layers above."""
    config, last = recipe.config, recipe.z_layer
    site = config.module if config.site == "mlp" else "block"
    at_bare = config.average == "direction" and recipe.objective.meets
    topology = batch.model.topology
    down = topology.is_down_proj(last, topology.resolve(last, config.module)[1])
    tail = MLPTail.of(topology, last) if config.through_norm and site == "block" and down else None
    tailed = tail is not None and not tail.adds  # in one block as in all
    with KeyWalk(batch, recipe.layers[0], half=config.average in (None, "half")) as walk:

        def residuals(layer: int, share: float, tail: MLPTail | None) -> Tensor:
            wanted = (z - walk.outputs(last, site)) * share
            return wanted if tail is None else tail.change(walk.outputs(layer, config.module), wanted)

        for layer, share in recipe.shares:
            walk.advance(layer)
            measure = partial(residuals, layer, share, MLPTail.of(topology, layer) if tailed else None)
            bare_keys = walk.keys(config.module, bare=True) if at_bare else None
            factors = write(layer, walk.keys(config.module), measure, bare_keys)
            if factors is not None:
                walk.updates[topology.resolve(layer, config.module)[1]] = factors


def _lr_of_all(batch: Batch, recipe: Recipe) -> float:
    """The learning rate for targets, from the states of all edits with the current weights."""
    site = "down_proj" if recipe.config.site == "mlp" else "block"
    bare = batch.bare().reporting(no_progress)  # the keys of the edits are reported later, as a stage
    with KeyWalk(bare, recipe.z_layer) as walk:
        return relative_lr(walk.outputs(recipe.z_layer, site, finite=False))
