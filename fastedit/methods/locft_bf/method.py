"""LocFT-BF: localized fine-tuning, breadth-first (Fine-tuning Done Right in Model Editing, arXiv 2509.22072).

One module, in one or several blocks, is fine-tuned on all edits together, epoch by epoch in mini-batches, with Adam on
the target tokens and EOS. The frozen part below it runs once for the whole edit (`PrefixCache`, `FrozenPart`), the head
runs only at target tokens, and samples are packed into rows without padding between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fastedit import parallel
from fastedit.errors import ConfigError, EditError
from fastedit.methods.base import Edit, History, MethodResult
from fastedit.methods.batch import Batch
from fastedit.methods.contexts import context_templates
from fastedit.methods.locft_bf.choices import find_statistics, resolve
from fastedit.methods.locft_bf.config import LocFTBFConfig
from fastedit.methods.locft_bf.refit import refit
from fastedit.methods.locft_bf.trainer import Trainer
from fastedit.methods.locft_bf.training_set import TrainingSet
from fastedit.methods.naming import check_rows
from fastedit.methods.saved_run import SavedRun
from fastedit.models import (
    Budget,
    Model,
    PrefixCache,
    Topology,
    fingerprint,
    forwards,
    fuse,
    only_trainable,
    plain_state,
)
from fastedit.progress import Progress, no_progress
from fastedit.statistics.names import known_names, with_names
from fastedit.statistics.own_text import OwnText
from fastedit.statistics.store import StatisticsStore

_CONTEXTS = 4  # that an edit's keys are averaged over for `refit`


@dataclass(frozen=True)
class LocFTBFPlan:
    """A LocFT-BF run that is ready; `config` is `given` with every choice made that it leaves open.

    `statistics` are of the inputs that training avoids, None without a null space, and `names` those whose inputs count
    with them; `saved` keeps the state of the run on disk, None if it is not kept.
    """

    config: LocFTBFConfig
    notes: list[str]
    data: TrainingSet
    given: LocFTBFConfig
    statistics: StatisticsStore | OwnText | None
    names: tuple[str, ...]
    saved: SavedRun | None = None

    def reporting(self, progress: Progress) -> LocFTBFPlan:
        """The same plan with another progress callback."""
        return replace(self, data=self.data.reporting(progress))

    def digests(self) -> dict[str, str]:
        """Digest of the file of second moments of each layer that has one; empty if training reads none."""
        return self.statistics.digests(self.config.layers) if isinstance(self.statistics, StatisticsStore) else {}

    def placed(self, layer: int, module: str, progress: Progress) -> LocFTBFPlan:
        """Plan the same edits for another module of the model, with its own learning rate.

        Raises:
            ConfigError, ModelError: the module does not exist, or has no weights to train or no statistics.
        """
        given = replace(self.given, layer=layer, module=module)
        batch, old = self.data.batch, self.statistics
        history = History(old.fingerprint if old else "")
        resolved, notes = resolve(batch, given, history)
        _check_maps(batch.model.topology, resolved)
        statistics, more = find_statistics(batch.model, resolved, history)
        return LocFTBFPlan(resolved, notes + more, self.data.reporting(progress), given, statistics, self.names)

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
        config, notes, data = self.config, [*self.notes], self.data
        assert config.module is not None  # chosen by now
        batch, topology, lowest = data.batch, data.batch.model.topology, config.layers[0]
        source = self.statistics
        statistics = source.statistics(config.layers, batch.progress) if isinstance(source, OwnText) else source
        if statistics is not None:
            statistics = with_names(statistics, batch.model, config.layers, self.names, config.name_weight or 0.0)
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
                notes += self.saved.notes if self.saved else []
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
    resolved, notes = resolve(batch, config, history)
    _check_maps(model.topology, resolved)
    if resolved.refit and (bare := batch.without_subject):
        raise ConfigError(
            f"refit is about the edits' subjects, and there is none in the prompt of {batch.names(bare)}; give "
            "their subjects, or leave out refit"
        )
    statistics, more = find_statistics(model, resolved, history)
    notes += more
    data = TrainingSet.of(batch, resolved)
    subjects = (edit.subject for edit in edits if edit.subject)
    names = known_names(model, resolved.names, subjects) if resolved.name_weight else ()
    made = LocFTBFPlan(resolved, notes + _notes_on(data, resolved), data, config, statistics, names)
    return replace(made, saved=SavedRun.of(model, edits, resolved, history, made.digests))


def _notes_on(data: TrainingSet, config: LocFTBFConfig) -> list[str]:
    """Notes on these edits for the user."""
    batch, notes = data.batch, []
    bare = [place for place, anchors in enumerate(data.anchors.of) if not anchors] if config.keeps_anchors else []
    if bare:
        notes.append(f"without anchors, for want of a subject or of others: {batch.names(bare)}")
    if data.trained is None:
        return notes
    everywhere = (data.trained[: len(batch)] < 0).nonzero().flatten().tolist()
    if everywhere:
        notes.append(f"trained at all tokens, for want of a subject in the prompt: {batch.names(everywhere)}")
    return notes + batch.notes


def _check_maps(topology: Topology, config: LocFTBFConfig) -> None:
    """Check that the modules can be edited as the configuration asks.

    Raises:
        ConfigError: a module has to be a linear map and is not one; with tokens subject, the last block, because
            nothing after it reads the subject's state.
    """
    assert config.module is not None
    if not config.linear_only:
        return
    for layer in config.layers:
        path, module = topology.resolve(layer, config.module)
        if not isinstance(module, nn.Linear | Conv1D):
            what = f"preserve {config.preserve}" if config.keeps_null_space else "tokens subject"
            raise ConfigError(
                f"{what} is about a linear map's inputs, and {path} is a {type(module).__name__}; choose a module such "
                f"as down_proj, or go without {what}"
            )
    if config.tokens == "subject" and config.layers[-1] == topology.n_blocks - 1:
        raise ConfigError(
            f"layer {config.layers[-1]} is the last block and nothing reads a subject there; choose lower ones, or "
            "tokens all"
        )
