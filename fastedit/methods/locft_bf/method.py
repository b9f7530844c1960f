"""LocFT-BF: localized fine-tuning, breadth-first (Fine-tuning Done Right in Model Editing, arXiv 2509.22072).

One module, in one or several blocks, is fine-tuned on all edits together, epoch by epoch in mini-batches, with Adam on
the target tokens and EOS. The frozen part below it runs once for the whole edit (`PrefixCache`, `FrozenPart`), the head
runs only at target tokens, and samples are packed into rows without padding between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch

from fastedit import parallel
from fastedit.errors import EditError
from fastedit.methods.base import Edit, History, MethodResult
from fastedit.methods.batch import Batch
from fastedit.methods.contexts import context_templates
from fastedit.methods.locft_bf.config import LocFTBFConfig
from fastedit.methods.locft_bf.recipes import Recipe, resolve
from fastedit.methods.locft_bf.refit import refit
from fastedit.methods.locft_bf.trainer import Trainer
from fastedit.methods.locft_bf.training_set import TrainingSet
from fastedit.methods.naming import check_rows
from fastedit.methods.saved_run import SavedRun
from fastedit.models import (
    Budget,
    Model,
    PrefixCache,
    fingerprint,
    forwards,
    fuse,
    only_trainable,
    plain_state,
)
from fastedit.progress import Progress, no_progress
from fastedit.statistics.names import with_names
from fastedit.statistics.own_text import OwnText
from fastedit.statistics.store import StatisticsStore

_CONTEXTS = 4  # that an edit's keys are averaged over for `refit`


@dataclass(frozen=True)
class LocFTBFPlan:
    """A LocFT-BF run that is ready; its recipe is made from the configuration `given`.

    `saved` keeps the state of the run on disk, None if it is not kept.
    """

    recipe: Recipe
    data: TrainingSet
    given: LocFTBFConfig
    saved: SavedRun | None = None

    @property
    def config(self) -> LocFTBFConfig:
        return self.recipe.config

    @property
    def notes(self) -> list[str]:
        return [*self.recipe.notes, *_notes_on(self.data, self.config)]

    def reporting(self, progress: Progress) -> LocFTBFPlan:
        """The same plan with another progress callback."""
        return replace(self, data=self.data.reporting(progress))

    def digests(self) -> dict[str, str]:
        """Digest of the file of second moments of each layer that has one; empty if training reads none."""
        statistics = self.recipe.statistics
        return statistics.digests(self.config.layers) if isinstance(statistics, StatisticsStore) else {}

    def placed(self, layer: int, module: str, progress: Progress) -> LocFTBFPlan:
        """Plan the same edits for another module of the model, with its own learning rate.

        Raises:
            ConfigError, ModelError: the module does not exist, or has no weights to train or no statistics.
        """
        given, old = replace(self.given, layer=layer, module=module), self.recipe.statistics
        recipe = resolve(self.data.batch, given, History(old.fingerprint if old else ""))
        return LocFTBFPlan(recipe, self.data.reporting(progress), given)

    @plain_state
    def run(self, cache: PrefixCache | None = None) -> MethodResult:
        """Edit the model in place.

        Frozen weights stay in the model's dtype; the edited weights, their moments and their update are fp32.

        Args:
            cache: prefix cache of `data`, for runs that share it; it advances to the lowest edited block and stays
                open.

        Raises:
            EditError: a loss is not finite; names the edits for which that is so with the original weights or, if
                there are none, when and in which batch training diverged. The model is restored, as on every exception.
        """
        config, notes, data = self.config, self.notes, self.data
        assert config.module is not None  # chosen by now
        batch, topology, lowest = data.batch, data.batch.model.topology, config.layers[0]
        source, names = self.recipe.statistics, self.recipe.names
        statistics = source.statistics(config.layers, batch.progress) if isinstance(source, OwnText) else source
        if statistics is not None:
            statistics = with_names(statistics, batch.model, config.layers, names, config.name_weight or 0.0)
        # the contexts are those of the unedited model
        rewritten = batch.within(context_templates(batch.model, _CONTEXTS, seed=config.seed)) if config.refit else None
        modules = {layer: topology.resolve(layer, config.module)[1] for layer in config.layers}
        fused = fuse(topology, (p for module in modules.values() for p in module.parameters()))
        with forwards(fused):
            own = data.prefix_cache(lowest) if cache is None else None
        try:
            trainer = Trainer(data, modules, config, statistics, self.saved)
            interrupted = None
            with trainer.originals, forwards(fused):
                shared = own or cache
                assert shared is not None
                shared.advance(lowest)
                try:
                    with only_trainable(topology.model, trainer.parameters.values()), torch.enable_grad():
                        trainer.run(shared)
                except KeyboardInterrupt:
                    if trainer.whole is None or parallel.world() > 1:  # other processes may be in another epoch
                        raise
                    interrupted = f"kept the weights {trainer.go_back()}"
                    notes.append(f"interrupted; {interrupted}")
                notes += trainer.passes.notes + (self.saved.notes if self.saved else [])
                updates = trainer.updates()
                if not all(update.isfinite().all() for update in updates.values()):  # broken after the last loss
                    raise EditError(
                        "the edited weights are not finite after the last step; the model is restored. Try a learning "
                        f"rate below {config.lr:.3g}"
                    )
                if rewritten is not None and statistics is not None:
                    notes += refit(rewritten, modules, config.module, statistics, trainer.originals.values, updates)
                    trainer.look()
                elif own is not None and interrupted is None and trainer.looks_cheap:
                    trainer.look()
        finally:
            if own is not None:
                own.close()
        if self.saved is not None and interrupted is None:
            self.saved.finish()
        return MethodResult(
            updates=updates,
            originals=trainer.originals.values,
            config=asdict(config),
            probability=(-trainer.passes.loss_of[: len(batch)]).exp().cpu(),
            losses=trainer.losses,
            notes=notes,
            interrupted=interrupted,
            learned=trainer.learned,
            cached=batch.budget.tally.most,
        )


@plain_state
def plan(
    model: Model,
    edits: Sequence[Edit],
    config: LocFTBFConfig,
    *,
    history: History | None = None,
    progress: Progress = no_progress,
) -> LocFTBFPlan:
    """Make every choice and check, without changing the model.

    Raises:
        ConfigError, ModelError: the model lacks a layer or a module, or it has no weights to train; a layer has no
            statistics and needs them; there are no anchors although they are asked for.
        RequestError: edits that cannot be tokenized or do not fit the context; names all of them.
    """
    check_rows(model, edits)
    history = history or History(now := fingerprint(model.network), now=now)
    budget = Budget(device_bytes=config.cache_bytes, host_bytes=config.cache_bytes)
    batch = Batch(model, edits, budget=budget, progress=progress)
    recipe = resolve(batch, config, history)
    made = LocFTBFPlan(recipe, TrainingSet.of(batch, recipe.config), config)
    return replace(made, saved=SavedRun.of(model, edits, recipe.config, history, made.digests))


def _notes_on(data: TrainingSet, config: LocFTBFConfig) -> list[str]:
    """Notes on these edits for the user."""
    batch, notes = data.batch, []
    bare = [place for place, anchors in enumerate(data.anchors.by_edit) if not anchors] if config.keeps_anchors else []
    if bare:
        notes.append(f"without anchors, for want of a subject or of others: {batch.names(bare)}")
    if data.trained is None:
        return notes
    everywhere = (data.trained[: len(batch)] < 0).nonzero().flatten().tolist()
    if everywhere:
        notes.append(f"trained at all tokens, for want of a subject in the prompt: {batch.names(everywhere)}")
    return notes + batch.notes
