"""A method resolved for a model: every choice that a configuration leaves open, made once."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from fastedit.errors import ConfigError
from fastedit.methods.locate_then_edit.config import LocateThenEditConfig, TargetConfig
from fastedit.methods.locate_then_edit.distributions import shares_of
from fastedit.methods.locate_then_edit.objectives import OBJECTIVES, ObjectiveType
from fastedit.methods.presets import locate_then_edit_preset
from fastedit.models import MLPTail, Topology, check_own, check_plain


@dataclass(frozen=True)
class Recipe:
    """The settings of a run.

    Attributes:
        config: every field has a value; without a preset, `lr` gets one after the states of the edits are known.
        shares: the layers to write, ascending, and the share of the remaining residual that each takes.
        notes: what was chosen, and why.
        names: names whose inputs count with the second moments of text.
    """

    config: LocateThenEditConfig
    shares: list[tuple[int, float]]
    notes: list[str]
    names: tuple[str, ...] = ()

    @property
    def layers(self) -> list[int]:
        return [layer for layer, _ in self.shares]

    @property
    def z_layer(self) -> int:
        """The block whose output, or whose MLP's output, is the site of the targets."""
        return self.shares[-1][0]

    @property
    def objective(self) -> ObjectiveType:
        assert self.config.objective is not None
        return OBJECTIVES[self.config.objective]

    @property
    def target(self) -> TargetConfig:
        """How targets are optimized."""
        assert self.config.site is not None
        return self.config.target_config(self.config.site)

    def with_lr(self, lr: float) -> Recipe:
        """The same recipe with a rate from the edits' states; unchanged if that rate is not finite."""
        if not math.isfinite(lr):
            return self
        note = f"lr {lr:.3g} (no preset for this model: half the root mean square of a typical state)"
        return replace(self, config=replace(self.config, lr=lr), notes=[*self.notes, note])


def resolve(topology: Topology, given: LocateThenEditConfig, method: LocateThenEditConfig) -> Recipe:
    """Fill what is not given: from the method, else from the model's preset, else by a rule.

    Raises:
        ConfigError, ModelError: choices that do not go together; layers or a module that the model lacks.
    """
    preset, published = locate_then_edit_preset(topology)
    origin = "published preset" if published else "no preset for this model"
    notes: list[str] = []

    def choose(name: str, otherwise: Any) -> Any:
        values = (getattr(source, name) for source in (given, method))
        return next((value for value in values if value not in (None, "auto")), otherwise)

    objective, distribution = choose("objective", "least-squares"), choose("distribution", "spread")
    last_layer = (given.layers or (preset.single,))[-1]
    down = topology.is_down_proj(last_layer, topology.resolve(last_layer, given.module)[1])
    tail = MLPTail.of(topology, last_layer) if down else MLPTail(1.0)
    bounded = tail is None or tail.gain is not None
    transformed = bounded or (tail is not None and not tail.adds)  # then one layer's targets are MLP outputs
    if bounded and distribution != "single" and (given.distribution, given.layers) == (None, None):
        distribution = "single"
        notes.append("distribution single (a norm follows down_proj in this model, and bounds every layer's share)")
    single = distribution == "single"
    layers = choose("layers", (preset.single,) if single else preset.layers)
    if given.layers is None:
        notes.append(f"layers {', '.join(map(str, layers))} ({origin})")
    shares = shares_of(distribution, layers)
    by_rule = "mlp" if transformed and len(layers) == 1 else "block"
    site = choose("site", by_rule)
    if bounded and site == "block":
        unmapped = "" if given.through_norm else "; without through_norm, updates may be far too large before the norm"
        notes.append(
            "a norm follows down_proj in this model, and bounds what an update adds to a block's output: targets "
            f"are reached in part; distribution single with site mlp reaches them{unmapped}"
        )
    elif transformed and site == "mlp" and choose("site", None) is None:
        notes.append(f"site mlp (a {'norm' if bounded else 'factor'} follows down_proj in this model)")
    width = _checked_width(topology, [layer for layer, _ in shares], given.module, site)
    cov_weight, alpha = given.cov_weight, choose("alpha", 0.1)
    if cov_weight is None:
        times = max(2, len(shares))
        meets = OBJECTIVES[objective].meets
        divisor = alpha if meets and alpha else 1.0  # equality with α is least squares with λα
        cov_weight = preset.cov_weight(meets) if published else times * width / divisor
        rule = f": {times} times the key width{', divided by alpha' if divisor != 1 else ''}"
        notes.append(f"cov_weight {cov_weight:g} ({origin}{'' if published else rule})")
    name_weight = given.name_weight
    if name_weight is None:
        name_weight = 0.0 if published else OBJECTIVES[objective].name_weight
    filled = replace(
        given,
        objective=objective,
        distribution=distribution,
        layers=tuple(layers),
        batch_size=choose("batch_size", "auto"),
        cov_weight=cov_weight,
        alpha=alpha,
        average=choose("average", "half"),
        site=site,
        n_contexts=choose("n_contexts", 5),
        name_weight=name_weight,
        **{
            name: choose(name, getattr(preset, name))
            for name in ("l2", "null_threshold", "steps", "lr", "weight_decay", "clamp")
        },
    )
    return Recipe(filled, shares, notes)


def _checked_width(topology: Topology, layers: list[int], module: str, site: str) -> int:
    """The key width of the last layer; raises the errors of `resolve` about layers that cannot be written."""
    if site == "mlp" and len(layers) > 1:
        raise ConfigError("site mlp is one layer's MLP, but the edit is distributed over several; take site block")
    check_plain(topology.model, (topology.resolve(layer, module)[0] for layer in layers))
    check_own(topology, layers, module)
    for layer in layers:
        path, projection = topology.resolve(layer, module)
        width = topology.input_width(layer, module)
        if projection not in topology.writers(layer):
            raise ConfigError(f"{path} does not write to the residual stream; choose a module that does: down_proj")
        if site == "mlp" and not topology.is_down_proj(layer, projection):
            raise ConfigError(f"site mlp is the output of down_proj, but {path} is written; take site block")
    if layers[-1] == topology.n_blocks - 1:
        raise ConfigError(
            f"layers ends with {layers[-1]}, the last block, and nothing reads the subject after it; choose among "
            f"0 to {topology.n_blocks - 2}"
        )
    return width
