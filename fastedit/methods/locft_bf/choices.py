"""The automatic choices of LocFT-BF: where it trains, at which tokens, how fast, and what it spares."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from fastedit.errors import ModelError
from fastedit.methods.base import Edit
from fastedit.methods.locft_bf.config import LocFTBFConfig
from fastedit.methods.naming import edit_names
from fastedit.methods.presets import locate_then_edit_preset, locft_bf_preset, scaled_learning_rate
from fastedit.methods.subjects import subject_ends
from fastedit.models import Topology
from fastedit.statistics.own_text import own_text_directory
from fastedit.statistics.store import MissingStatisticsError, StatisticsStore

log = logging.getLogger(__name__)

# measured on SmolLM2-135M and Gemma 3 270M (benchmarks/README.md)
_SUBJECT_RATE = 0.64  # of the rate for all tokens
_SUBJECT_STEPS = 10  # an epoch, at least
_SHARE = {"all": 0.2, "subject": 0.4}  # null_space


def resolve(
    topology: Topology, config: LocFTBFConfig, edits: Sequence[Edit], unedited: str
) -> tuple[LocFTBFConfig, list[str]]:
    """The configuration with every automatic choice made, and a note of what was chosen and why.

    Args:
        unedited: fingerprint of the model that statistics belong to.

    Raises:
        ModelError: no such module, or one without weights to train; no statistics in the folder that is given.
    """
    preset, known = locft_bf_preset(topology)
    where = "published preset" if known else "no preset for this model"
    config, notes = _spared(topology, config, edits, unedited)
    layer, module, lr, batch_size, share = config.layer, config.module, config.lr, config.batch_size, config.null_space
    subject = config.tokens == "subject"
    if layer is None and subject:
        layer = locate_then_edit_preset(topology)[0].layers
        notes.append(f"layers {layer[0]} to {layer[-1]} (MEMIT's, an eighth to a quarter of the depth)")
    elif layer is None:
        layer = preset.layer
        rule = "" if known else f": 22/32 of {topology.n_blocks} blocks"
        notes.append(f"layer {layer} ({where}{rule})")
    if module is None:
        module = "down_proj" if subject else preset.module
        notes.append(f"module {module} ({'where facts are read' if subject else where})")
    layers = layer if isinstance(layer, tuple) else (layer,)
    places = dict(topology.resolve(block, module) for block in layers)
    for block, found in zip(layers, places.values(), strict=True):
        if not list(found.parameters()):
            raise ModelError(f"module {module!r} of block {block} has no weights to train; choose another")
    if lr is None:
        lr, why = preset.lr, where
        if lr is None or subject:
            lr, why = _rate(places, subject)
            why = f"{where}: {why}"
        notes.append(f"lr {lr:.3g} ({why})")
    if batch_size == "auto":
        copies = len(edits) * (1 + config.augment)
        batch_size = max(1, min(100, copies // _SUBJECT_STEPS)) if subject else batch_size_for(copies)
        notes.append(f"batch_size {batch_size} (auto for {len(edits)} edits)")
    if share is None:
        share = _SHARE[config.tokens]
    for note in notes:
        log.info("locft-bf: %s", note)
    return replace(config, layer=layer, module=module, lr=lr, batch_size=batch_size, null_space=share), notes


def batch_size_for(n_edits: int) -> int:
    """The published 100 at the published 3,000 edits; fewer edits keep at least 30 steps an epoch."""
    return max(1, min(100, n_edits // 30))


def _spared(
    topology: Topology, config: LocFTBFConfig, edits: Sequence[Edit], unedited: str
) -> tuple[LocFTBFConfig, list[str]]:
    """`tokens` and `preserve` chosen.

    Without a published preset, and where nothing says where or what to train, training spares the rest: at the
    subjects' last tokens, in the null space of other text. For want of subjects it is the papers' recipe; for want of
    statistics the model writes the text.
    """
    tokens, preserve, statistics, notes = config.tokens, config.preserve, config.statistics, []
    free = (config.layer, config.module, tokens, preserve) == (None, None, "auto", "auto")
    if tokens == "auto":
        tokens = "all"
        if free and not (config.published or locft_bf_preset(topology)[1]) and _reads_facts(topology):
            bare = [place for place, edit in enumerate(edits) if not subject_ends(edit)]
            if bare:
                lacking = f"no subject in the prompt of {edit_names(edits, bare)}"
                notes.append(f"the papers' recipe, which does not spare other facts and other text: {lacking}")
            else:
                tokens = "subject"
                notes.append(
                    "tokens subject, preserve null-space (no preset for this model: other facts and other text are "
                    "spared; published takes the papers' recipe)"
                )
                statistics, found = _statistics(topology, config, unedited)
                notes += found
    if preserve == "auto":
        preserve = "null-space" if tokens == "subject" else "none"
    return replace(config, tokens=tokens, preserve=preserve, statistics=statistics), notes


def _reads_facts(topology: Topology) -> bool:
    """Whether blocks that read a subject have a linear map to edit, and blocks above them to read it."""
    layers = locate_then_edit_preset(topology)[0].layers
    maps = [topology.resolve(layer, "down_proj")[1] for layer in layers]
    return layers[-1] < topology.n_blocks - 1 and all(isinstance(found, nn.Linear | Conv1D) for found in maps)


def _statistics(topology: Topology, config: LocFTBFConfig, unedited: str) -> tuple[str | None, list[str]]:
    """The folder of statistics for the default layers, and a note if it is that of the model's own text.

    Raises:
        ModelError: no statistics in the folder that is given for them.
    """
    layers = locate_then_edit_preset(topology)[0].layers
    store = StatisticsStore(topology, unedited, "down_proj", config.statistics, config.unchecked_statistics)
    try:
        store.require(layers)
    except MissingStatisticsError as error:
        if config.statistics is not None:  # they were asked for
            raise
        folder = str(own_text_directory(unedited))
        return folder, [
            f"statistics of text that the model writes, in {folder}; those of real text spare more: {error}"
        ]
    return config.statistics, []


def _rate(places: dict[str, nn.Module], subject: bool) -> tuple[float, str]:
    """Adam's rate in proportion to the weights, and the rule.

    Raises:
        ModelError: weights that are all zero or not finite.
    """
    weights: dict[str, Any] = {
        f"{path}.{name}": w for path, found in places.items() for name, w in found.named_parameters()
    }
    lr, named = scaled_learning_rate([*weights.values()]), ", ".join(places)
    if lr == 0:
        raise ModelError(f"the weights of {named} are all zero, and no rate follows from their size; give lr")
    if not math.isfinite(lr):
        broken = (path for path, w in weights.items() if not w.isfinite().all())
        raise ModelError(f"{next(broken, named)} is not finite; load a model whose weights are whole")
    return (_SUBJECT_RATE * lr, "0.016 of the weights' RMS") if subject else (lr, "0.025 of the weights' RMS")
