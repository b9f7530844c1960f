"""The configuration of locate-then-edit, and every choice that it leaves open made."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from fastedit.errors import ConfigError
from fastedit.methods.base import check_fields
from fastedit.methods.distributions import DistributionName, shares
from fastedit.methods.objectives import ObjectiveName
from fastedit.methods.presets import locate_then_edit_preset
from fastedit.methods.targets import TargetConfig
from fastedit.models import Topology

PAIRS: dict[str, tuple[ObjectiveName, DistributionName]] = {
    "rome": ("equality", "single"),
    "memit": ("least-squares", "spread"),
    "emmet": ("equality", "single"),
    "alphaedit": ("null-space", "spread"),
}
"""Objective and distribution of the named methods."""


@dataclass(frozen=True)
class LocateThenEditConfig:
    """Configuration of rome, memit, emmet and alphaedit; None is the model's published preset, or a rule.

    Attributes:
        objective: how new pairs are memorized: least-squares, equality or null-space; None is the method's.
        distribution: layers that share an edit: single, spread or endpoints; None is the method's.
        layers: blocks to write, upwards; None is the preset's, else from an eighth to a quarter of the depth.
        module: the projection to write, by its short name or its path in the block.
        batch_size: edits that are solved together; "auto" is one for rome and all for the others. A later batch is
            measured on the model that the earlier ones left.
        cov_weight: λ, the weight of the second moment C against one edit; None is the preset's, else the key width.
        alpha: α that stabilizes equality; None is 0 for rome and 0.1 for the others.
        l2: AlphaEdit's weight of ‖ΔW‖²; None is the preset's.
        null_threshold: eigenvalues of C below it span AlphaEdit's null space; None is the preset's, else the lowest
            quarter of them.
        site: where a target is sought: the output of the last written block, or of its MLP; None is mlp for rome, and
            for a single layer of a model with a norm behind its MLPs.
        steps: loss evaluations of a target; None is the preset's.
        lr: Adam's rate for a target; None is the preset's, else half the root mean square of a typical state.
        weight_decay: weight of ‖δ‖/‖h₀‖² in a target's loss; None is the preset's.
        clamp: bound of ‖δ‖/‖h₀‖; None is 4 for rome, else the preset's.
        kl_factor: weight of a target's KL term.
        stop_loss: a target whose loss is below is done.
        n_contexts: texts written by the model that prompts are put behind; None is 20 for rome, else 5.
        contexts: use these instead, each with one "{}" where the prompt goes.
        seed: of the contexts.
        statistics: folder of the second moments; by default beside the checkpoint, else the user's cache.
        unchecked_statistics: use statistics of another model, or of fewer tokens than the keys are wide.
        targets: folder where targets are kept and found again, by all that they depend on.
        on_duplicates: edits with one key that make an equality singular: error, merge (one pair, the mean), or
            sequential (one after the other).
        cache_bytes: budget of the prefix cache on the model's device, and again in host memory.
        keep_partial: on Ctrl-C keep the batches that are done instead of restoring the model.
    """

    objective: ObjectiveName | None = None
    distribution: DistributionName | None = None
    layers: tuple[int, ...] | None = None
    module: str = "down_proj"
    batch_size: int | Literal["auto"] = "auto"
    cov_weight: float | None = None
    alpha: float | None = None
    l2: float | None = None
    null_threshold: float | None = None
    site: Literal["block", "mlp"] | None = None
    steps: int | None = None
    lr: float | None = None
    weight_decay: float | None = None
    clamp: float | None = None
    kl_factor: float = 0.0625
    stop_loss: float = 0.05
    n_contexts: int | None = None
    contexts: tuple[str, ...] | None = None
    seed: int = 0
    statistics: str | None = None
    unchecked_statistics: bool = False
    targets: str | None = None
    on_duplicates: Literal["error", "merge", "sequential"] = "error"
    cache_bytes: int | None = None
    keep_partial: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        if self.batch_size != "auto" and self.batch_size < 1:
            raise ConfigError(f'batch_size is {self.batch_size!r}; give "auto" or a number of edits, at least 1')
        for name in ("cov_weight", "l2", "null_threshold"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{name} is {value}; give a positive number, or leave it out")
        if self.alpha is not None and not 0 <= self.alpha < math.inf:
            raise ConfigError(f"alpha is {self.alpha}; give 0 or more, or leave it out")
        if self.n_contexts is not None and self.n_contexts < 0:
            raise ConfigError(f"n_contexts is {self.n_contexts}; give 0 or more")
        self.target_config(self.site or "block")  # refuses what a target cannot take

    def target_config(self, site: Literal["block", "mlp"]) -> TargetConfig:
        """How targets are optimized at a site."""
        given = {"steps": self.steps, "weight_decay": self.weight_decay, "clamp": self.clamp}
        known = {name: value for name, value in given.items() if value is not None}
        return TargetConfig(site, lr=self.lr, kl_factor=self.kl_factor, stop_loss=self.stop_loss, **known)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Plan:
    """A configuration with every choice made."""

    config: LocateThenEditConfig
    places: list[tuple[int, float]]  # layers, upwards, and their shares of what is left of the residual
    target: TargetConfig
    average: Literal["half", "uniform"]
    notes: list[str]

    @property
    def z_layer(self) -> int:
        return self.places[-1][0]

    def with_lr(self, lr: float) -> Plan:
        """The same with a rate by the edits' states, for the record too; as it is where they are not finite."""
        if not math.isfinite(lr):
            return self
        note = f"lr {lr:.3g} (no preset for this model: half the root mean square of a typical state)"
        config, target = replace(self.config, lr=lr), replace(self.target, lr=lr)
        return replace(self, config=config, target=target, notes=[*self.notes, note])


def resolve(topology: Topology, config: LocateThenEditConfig, method: str) -> Plan:
    """Every choice that the configuration leaves open, by the method, the model's preset, or a rule.

    Raises:
        ConfigError, ModelError: choices that do not go together; layers or a module that the model lacks.
    """
    preset, published = locate_then_edit_preset(topology)
    where = "published preset" if published else "no preset for this model"
    notes: list[str] = []
    rome = method == "rome"
    objective = config.objective or PAIRS[method][0]
    distribution = config.distribution or PAIRS[method][1]
    single = distribution == "single"
    layers = config.layers
    if layers is None:
        layers = (preset.single,) if single else preset.layers
        notes.append(f"layers {', '.join(map(str, layers))} ({where})")
    places = shares(distribution, layers)
    behind_norm = config.module == "down_proj" and not topology.mlp_adds
    site = config.site or ("mlp" if rome or (behind_norm and single) else "block")
    if behind_norm and site == "block":
        notes.append(
            "a norm stands behind down_proj in this model, so that no update moves a block's output by its whole "
            "residual: targets are reached in part; distribution single with site mlp reaches them"
        )
    elif behind_norm and not rome and config.site is None:
        notes.append("site mlp (a norm stands behind down_proj in this model)")
    if site == "mlp" and len(places) > 1:
        raise ConfigError("site mlp is one layer's MLP, but the edit is distributed over several; take site block")
    for layer, _ in places:
        path, projection = topology.resolve(layer, config.module)
        width = topology.input_width(layer, config.module)
        if projection not in topology.writers(layer):
            raise ConfigError(f"{path} does not write to the residual stream; choose a module that does: down_proj")
        if site == "mlp" and projection is not topology.resolve(layer, "down_proj")[1]:
            raise ConfigError(f"site mlp is the output of down_proj, but {path} is written; take site block")
    if places[-1][0] == topology.n_blocks - 1:
        raise ConfigError(
            f"layers ends with {places[-1][0]}, the last block, and nothing reads the subject behind it; choose among "
            f"0 to {topology.n_blocks - 2}"
        )
    cov_weight = config.cov_weight
    if cov_weight is None:
        cov_weight = preset.equality_cov_weight if objective == "equality" else preset.cov_weight
        if not published:
            cov_weight = float(width)
        notes.append(f"cov_weight {cov_weight:g} ({where}{'' if published else ': the key width'})")
    filled = replace(
        config,
        objective=objective,
        distribution=distribution,
        layers=tuple(layers),
        batch_size=1 if rome and config.batch_size == "auto" else config.batch_size,
        cov_weight=cov_weight,
        alpha=(0.0 if rome else 0.1) if config.alpha is None else config.alpha,
        l2=preset.l2 if config.l2 is None else config.l2,
        null_threshold=preset.null_threshold if config.null_threshold is None else config.null_threshold,
        site=site,
        steps=config.steps or preset.steps,
        lr=preset.lr if config.lr is None else config.lr,
        weight_decay=preset.weight_decay if config.weight_decay is None else config.weight_decay,
        clamp=(4.0 if rome else preset.clamp) if config.clamp is None else config.clamp,
        n_contexts=(20 if rome else 5) if config.n_contexts is None else config.n_contexts,
    )
    return Plan(filled, places, filled.target_config(site), "uniform" if rome else "half", notes)
