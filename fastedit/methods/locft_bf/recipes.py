"""LocFT-BF resolved for a model and its edits: where, at which tokens and how fast it trains, and what it preserves."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from fastedit.errors import ConfigError, ModelError
from fastedit.methods.base import History
from fastedit.methods.batch import Batch
from fastedit.methods.locft_bf.config import LocFTBFConfig
from fastedit.methods.presets import locate_then_edit_preset, locft_bf_preset, scaled_learning_rate
from fastedit.models import Model, Topology, check_own, check_plain, fingerprint, load_suffix
from fastedit.statistics.names import known_names
from fastedit.statistics.own_text import OwnText
from fastedit.statistics.store import StatisticsStore

log = logging.getLogger(__name__)

# measured on SmolLM2-135M and Gemma 3 270M (benchmarks/README.md)
_SUBJECT_RATE = 0.64  # of the rate for all tokens
_MANY = 200  # edits from which on the rate falls, over more epochs, with tokens subject
_SHARE = {"all": 0.2, "subject": 0.5}  # null_space
_FOCUS = {"all": 0.0, "subject": 0.1}
_EPOCHS = {"all": 25, "subject": 80}  # with subjects, learned edits sit out, so that more epochs cost little
_EPOCHS_OF_MANY = 60
_NAME_WEIGHT = {"all": 0.0, "subject": 10.0}


@dataclass(frozen=True)
class Recipe:
    """The settings of a run: whatever a configuration leaves open is chosen once.

    Attributes:
        config: no field is left open.
        notes: what was chosen, and why.
        statistics: second moments of the inputs whose directions training avoids; None without a null space.
        names: names whose inputs count with these.
    """

    config: LocFTBFConfig
    notes: list[str]
    statistics: StatisticsStore | OwnText | None
    names: tuple[str, ...]


def resolve(batch: Batch, given: LocFTBFConfig, history: History) -> Recipe:
    """Fill what is not given.

    Args:
        history: the statistics must belong to its unedited model.

    Raises:
        ConfigError: modules that cannot be edited in this way; names that the tokenizer does not know; refit without
            a subject.
        ModelError: no such module, or one that cannot be trained; a layer has no statistics and needs them.
    """
    config, notes = _chosen(batch, given, history)
    _check_maps(batch.model.topology, config)
    if config.refit and (bare := batch.without_subject):
        raise ConfigError(
            f"refit is about the edits' subjects, and there is none in the prompt of {batch.names(bare)}; give "
            "their subjects, or leave out refit"
        )
    statistics, more = _find_statistics(batch.model, config, history)
    subjects = (edit.subject for edit in batch.edits if edit.subject)
    names = known_names(batch.model, config.names, subjects) if config.name_weight else ()
    return Recipe(config, notes + more, statistics, names)


def _chosen(batch: Batch, config: LocFTBFConfig, history: History) -> tuple[LocFTBFConfig, list[str]]:
    """Make every automatic choice; returns the configuration, and notes on what was chosen and why."""
    topology = batch.model.topology
    preset, known = locft_bf_preset(topology)
    where = "published preset" if known else "no preset for this model"
    config, notes = _preserved(batch, config, history)
    layer, module, lr, batch_size, share = config.layer, config.module, config.lr, config.batch_size, config.null_space
    subject = config.tokens == "subject"
    if layer is None and subject:
        spread, of_memit = locate_then_edit_preset(topology)
        layer = spread.layers
        rule = "MEMIT's published preset" if of_memit else f"{where}: an eighth to a quarter of the depth"
        notes.append(f"layers {', '.join(map(str, layer))} ({rule})")
    elif layer is None:
        layer = preset.layer
        rule = "" if known else f": 22/32 of {topology.n_blocks} blocks"
        notes.append(f"layer {layer} ({where}{rule})")
    if module is None:
        module = "down_proj" if subject else preset.module
        notes.append(f"module {module} ({'MEMIT edits it' if subject else where})")
    layers = layer if isinstance(layer, tuple) else (layer,)
    places = dict(topology.resolve(block, module) for block in layers)
    check_plain(topology.model, places)
    for block in layers:
        topology.check_trainable(block, module)
    check_own(topology, layers, module)
    load_suffix(topology, min(layers))
    copies = len(batch) * (1 + config.augment)
    many = subject and copies >= _MANY
    if lr is None:
        lr, why = preset.lr, where
        if lr is None or subject:
            lr, why = _rate(places, _SUBJECT_RATE if subject else 1.0, where)
        notes.append(f"lr {lr:.3g} ({why})")
    schedule = config.lr_schedule or ("linear" if many else "constant")
    epochs = config.epochs or (_EPOCHS_OF_MANY if many else _EPOCHS[config.tokens])
    of_many = [f"lr_schedule {schedule}"] * (config.lr_schedule is None) + [f"epochs {epochs}"] * (
        config.epochs is None
    )
    if many and of_many:
        notes.append(f"{', '.join(of_many)} (auto from {_MANY} edits and copies on)")
    if batch_size == "auto":
        batch_size = subject_batch_size_for(copies) if subject else batch_size_for(copies)
        notes.append(f"batch_size {batch_size} (auto for {len(batch)} edits)")
    if share is None:
        share = _SHARE[config.tokens]
    focus = config.focus
    if focus is None:
        focus = _FOCUS[config.tokens]
    name_weight = config.name_weight
    if name_weight is None:
        name_weight = _NAME_WEIGHT[config.tokens] if config.keeps_null_space else 0.0
    refit = config.refit
    if refit is None:
        refit = subject and config.keeps_null_space and not batch.without_subject
    for note in notes:
        log.info("locft-bf: %s", note)
    chosen: dict[str, Any] = {"layer": layer, "module": module, "lr": lr, "lr_schedule": schedule}
    chosen |= {"batch_size": batch_size, "epochs": epochs, "null_space": share, "focus": focus, "refit": refit}
    return replace(config, **chosen, name_weight=name_weight), notes


def batch_size_for(n_edits: int) -> int:
    """The published 100 from the published 3,000 edits on; with fewer edits, at least 30 steps per epoch."""
    return max(1, min(100, n_edits // 30))


def subject_batch_size_for(n_edits: int) -> int:
    """A tenth of the edits, so that an epoch has 10 steps, and at most 100."""
    return max(1, min(100, n_edits // 10))


def _find_statistics(
    model: Model, config: LocFTBFConfig, history: History
) -> tuple[StatisticsStore | OwnText | None, list[str]]:
    """The second moments of the inputs that training avoids, and a note if they are of text that the model writes.

    They belong to the unedited model.

    Raises:
        ModelError: no statistics in the given folder; or none at all, and the model is already edited.
    """
    if not config.keeps_null_space:
        return None, []
    assert config.module is not None  # chosen by now
    store = StatisticsStore(
        model.topology, history.fingerprint, config.module, config.statistics, config.unchecked_statistics
    )
    try:
        store.require(config.layers)
    except ModelError as error:
        own = OwnText(model, history.fingerprint, config.module)
        if config.statistics is not None:
            raise
        if own.missing(config.layers) and (history.now or fingerprint(model.network)) != history.fingerprint:
            raise
        return own, [f"{error}; until then they are of text that the model writes"]
    return store, []


def _preserved(batch: Batch, config: LocFTBFConfig, history: History) -> tuple[LocFTBFConfig, list[str]]:
    """Choose `tokens` and `preserve`.

    If the model has no published preset, and the configuration leaves open where and what to train, training preserves
    everything else: at the subjects' last tokens, in the null space of other text. Without subjects it is the papers'
    recipe.
    """
    tokens, preserve, notes, topology = config.tokens, config.preserve, [], batch.model.topology
    free = (config.layer, config.module, tokens, preserve) == (None, None, "auto", "auto")
    if tokens == "auto":
        tokens = "all"
        if free and not (config.published or locft_bf_preset(topology)[1]) and reads_facts(topology):
            lacking = _lacking(batch, config, history)
            if lacking:
                notes.append(f"the papers' recipe, which does not preserve other facts and other text: {lacking}")
            else:
                tokens = "subject"
                notes.append(
                    "tokens subject, preserve null-space (no preset for this model: other facts and other text are "
                    "preserved; published takes the papers' recipe)"
                )
    if preserve == "auto":
        preserve = "null-space" if tokens == "subject" else "none"
    return replace(config, tokens=tokens, preserve=preserve), notes


def _lacking(batch: Batch, config: LocFTBFConfig, history: History) -> str | None:
    """The thing that is missing for training that preserves everything else; None if nothing is.

    Raises:
        ModelError: no statistics in the given folder.
    """
    if bare := batch.without_subject:
        return f"no subject in the prompt of {batch.names(bare)}"
    model = batch.model
    layers = locate_then_edit_preset(model.topology)[0].layers
    try:
        _find_statistics(model, replace(config, layer=layers, module="down_proj", preserve="null-space"), history)
    except ModelError as error:
        if config.statistics is not None:  # the user asked for these
            raise
        return f"the model is edited already, and of the unedited one there are {error}"
    return None


def reads_facts(topology: Topology) -> bool:
    """Whether the blocks of MEMIT's rule have a linear `down_proj` to edit, and blocks above that read the result."""
    layers = locate_then_edit_preset(topology)[0].layers
    maps = [topology.resolve(layer, "down_proj")[1] for layer in layers]
    return layers[-1] < topology.n_blocks - 1 and all(isinstance(module, nn.Linear | Conv1D) for module in maps)


def _rate(places: dict[str, nn.Module], share: float, where: str) -> tuple[float, str]:
    """Adam's rate in proportion to the RMS of the weights, and the rule in words.

    Args:
        share: of the rate for all tokens.

    Raises:
        ModelError: weights that are all zero or not finite.
    """
    weights: dict[str, Any] = {
        f"{path}.{name}": w for path, module in places.items() for name, w in module.named_parameters()
    }
    lr, paths = scaled_learning_rate([*weights.values()]), ", ".join(places)
    if lr == 0:
        raise ModelError(f"the weights of {paths} are all zero, and no rate follows from their size; give lr")
    if not math.isfinite(lr):
        broken = (path for path, w in weights.items() if not w.isfinite().all())
        raise ModelError(f"{next(broken, paths)} is not finite; load a model whose weights are whole")
    source = where if share == 1 else "tokens subject"
    return share * lr, f"{source}: {0.025 * share:.2g} of the weights' RMS"


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
