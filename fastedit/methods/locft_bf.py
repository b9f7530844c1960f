"""LocFT-BF: localized fine-tuning, breadth-first (Fine-tuning Done Right in Model Editing, arXiv 2509.22072).

One module of the model is fine-tuned on all edits at once, epoch by epoch in mini-batches, with Adam on the
target tokens and EOS. What is frozen below it runs once for the whole edit (`PrefixCache`, `FrozenPart`), the head
runs at target tokens only, and samples are packed into rows without padding between them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch

from fastedit.errors import ConfigError, EditError, ModelError
from fastedit.methods.base import Edit, MethodResult, Progress, check_fields, no_progress
from fastedit.methods.contexts import sample_contexts
from fastedit.methods.presets import locft_bf_preset, scaled_learning_rate
from fastedit.methods.subjects import behind, name_of
from fastedit.methods.trainer import Trainer, only_trainable
from fastedit.models import Budget, PairError, PrefixCache, Samples, Topology, no_autocast, tokenize

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LocFTBFConfig:
    """Configuration of LocFT-BF; the defaults are the published values (arXiv 2509.22072).

    Attributes:
        layer: block of the edited module; None is the preset of a published model, else 22/32 of the depth.
        module: down_proj, up_proj, gate_proj, mlp, attn, block, or a module path; None is the preset's.
        lr: Adam's learning rate, constant; None is the preset's, else 0.025 of the weights' RMS.
        batch_size: edits a step; "auto" is 100 from 3,000 edits on, and at least 30 steps an epoch below that.
        epochs: at most this many passes over the edits.
        stop_loss: stop after an epoch whose mean loss is below.
        skip_loss: a batch whose loss is below does no backward pass and no step.
        loss_average: mean over a sample's target tokens, then over samples; or over all target tokens.
        schedule: breadth-first, or the baseline that the paper refutes: depth-first trains each batch to
            `stop_loss` (at most `epochs` steps) with a fresh optimizer before it turns to the next.
        shuffle: a new order every epoch.
        augment: extra copies of each edit behind random contexts (the paper's LocFT-BF-Aug has 5).
        seed: of the order and of the contexts.
        weight_decay: Adam's L2 term.
        cache_bytes: budget of the prefix cache and of the edited block's frozen part on the model's device, and
            again in host memory; a cache that fits in neither goes to a memory-mapped file. None is half of what is
            free.
        keep_partial: on Ctrl-C keep the last whole epoch, or the last batch that depth-first was done with,
            instead of restoring the model. Takes another fp32 copy of the edited weights.
    """

    layer: int | None = None
    module: str | None = None
    lr: float | None = None
    batch_size: int | Literal["auto"] = "auto"
    epochs: int = 25
    stop_loss: float = 0.01
    skip_loss: float = 0.01
    loss_average: Literal["sample", "token"] = "sample"
    schedule: Literal["breadth-first", "depth-first"] = "breadth-first"
    shuffle: bool = True
    augment: int = 0
    seed: int = 0
    weight_decay: float = 0.0
    cache_bytes: int | None = None
    keep_partial: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        if self.batch_size != "auto" and self.batch_size < 1:
            raise ConfigError(f'batch_size is {self.batch_size!r}; give "auto" or a number of edits, at least 1')
        if self.epochs < 1:
            raise ConfigError(f"epochs is {self.epochs}; give at least 1")
        if self.lr is not None and not (math.isfinite(self.lr) and self.lr > 0):
            raise ConfigError(f"lr is {self.lr}; give a positive learning rate, or leave it out")
        for name in ("stop_loss", "skip_loss", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; give 0 or more")
        if self.augment < 0:
            raise ConfigError(f"augment is {self.augment}; give a number of contexts an edit, 0 for none")


def batch_size_for(n_edits: int) -> int:
    """The published 100 at the published 3,000 edits; fewer edits keep at least 30 steps an epoch."""
    return max(1, min(100, n_edits // 30))


@no_autocast
def locft_bf(
    topology: Topology,
    tokenizer: Any,
    edits: Sequence[Edit],
    config: LocFTBFConfig,
    progress: Progress = no_progress,
    prepared: tuple[Samples, PrefixCache] | None = None,
) -> MethodResult:
    """Edit the model in place.

    Frozen weights stay in the model's dtype; the edited weights, their moments and their update are fp32.

    Args:
        prepared: what `prepare` gave for these edits and this `augment` and `seed`, for runs that share it.
            Its cache is advanced to `config.layer` and stays open.

    Raises:
        ConfigError, ModelError, RequestError: before the model is touched.
        EditError: a loss that is not finite; names the edits that have it with the original weights or, where
            none has, when and in which batch training diverged. The model is restored, as on every exception.
    """
    config, notes = _resolved(topology, config, len(edits))
    assert config.layer is not None  # chosen by now
    assert config.module is not None
    _, module = topology.resolve(config.layer, config.module)
    samples, cache = prepared or prepare(topology, tokenizer, edits, config, progress)
    owner = [*range(len(edits)), *(i for i in range(len(edits)) for _ in range(config.augment))]
    trainer, interrupted = Trainer(topology, samples, owner, edits, module, config, progress), None
    try:
        cache.advance(config.layer)
        try:
            with only_trainable(topology.model, trainer.parameters.values()), torch.enable_grad():
                trainer.run(cache)
        except KeyboardInterrupt:
            if trainer.kept is None:
                raise
            interrupted = f"kept the weights {trainer.go_back()}"
            notes.append(f"interrupted; {interrupted}")
        updates = trainer.updates()
        if not all(update.isfinite().all() for update in updates.values()):  # broken after the last loss was seen
            raise EditError(
                "the edited weights are not finite after the last step; the model is restored. Try a learning rate "
                f"below {config.lr:.3g}"
            )
    except BaseException:
        trainer.restore()
        raise
    finally:
        if prepared is None:
            cache.close()
    return MethodResult(updates, trainer.originals, asdict(config), trainer.losses, notes, interrupted=interrupted)


def prepare(
    topology: Topology, tokenizer: Any, edits: Sequence[Edit], config: LocFTBFConfig, progress: Progress
) -> tuple[Samples, PrefixCache]:
    """The samples to train on, and their prefix cache at `config.layer`, which must be given.

    Raises:
        ModelError, RequestError: no such block; an edit that does not fit the context.
    """
    pairs = _augmented(topology, tokenizer, edits, config)
    try:
        samples = tokenize(tokenizer, pairs, append_eos=True, max_length=topology.context_length)
    except PairError as error:
        i, context = error.pair, ""
        if i >= len(edits):
            i, context = (i - len(edits)) // config.augment, pairs[i][0]
        raise behind(name_of(edits[i], i), context, error) from None
    budget = Budget(device_bytes=config.cache_bytes, host_bytes=config.cache_bytes)
    done = 0

    def prefix_progress(n: int) -> None:
        nonlocal done
        done += n
        progress("prefix", done, len(samples))

    assert config.layer is not None
    return samples, PrefixCache(topology, samples, config.layer, budget=budget, progress=prefix_progress)


def _resolved(topology: Topology, config: LocFTBFConfig, n_edits: int) -> tuple[LocFTBFConfig, list[str]]:
    """The configuration with every automatic choice made, and a note of what was chosen and why."""
    preset, published = locft_bf_preset(topology)
    where = "published preset" if published else "no preset for this model"
    notes = []
    layer, module, lr, batch_size = config.layer, config.module, config.lr, config.batch_size
    if layer is None:
        layer = preset.layer
        rule = "" if published else f": 22/32 of {topology.n_blocks} blocks"
        notes.append(f"layer {layer} ({where}{rule})")
    if module is None:
        module = preset.module
        notes.append(f"module {module} ({where})")
    path, found = topology.resolve(layer, module)
    weights = list(found.parameters())
    if not weights:
        raise ModelError(f"module {module!r} of block {layer} has no weights to train; choose another")
    if lr is None:
        lr, why = preset.lr, where
        if lr is None:
            lr, why = scaled_learning_rate(weights), f"{where}: 0.025 of the weights' RMS"
            if lr == 0:
                raise ModelError(f"the weights of {path} are all zero, and no rate follows from their size; give lr")
            if not math.isfinite(lr):
                broken = (f"{path}.{name}" for name, w in found.named_parameters() if not w.isfinite().all())
                raise ModelError(f"{next(broken, path)} is not finite; load a model whose weights are whole")
        notes.append(f"lr {lr:.3g} ({why})")
    if batch_size == "auto":
        batch_size = batch_size_for(n_edits * (1 + config.augment))
        notes.append(f"batch_size {batch_size} (auto for {n_edits} edits)")
    for note in notes:
        log.info("locft-bf: %s", note)
    return replace(config, layer=layer, module=module, lr=lr, batch_size=batch_size), notes


def _augmented(
    topology: Topology, tokenizer: Any, edits: Sequence[Edit], config: LocFTBFConfig
) -> list[tuple[str, str]]:
    """The (prompt, target) pairs to train on: every edit, then the augmented copies of each."""
    pairs = [(e.prompt, e.target) for e in edits]
    if config.augment:
        contexts = sample_contexts(topology, tokenizer, max(20, config.augment), seed=config.seed)
        generator = torch.Generator().manual_seed(config.seed)
        for edit in edits:
            drawn = torch.randperm(len(contexts), generator=generator)[: config.augment].tolist()
            pairs += [(f"{contexts[c]} {edit.prompt}", edit.target) for c in drawn]
    return pairs
