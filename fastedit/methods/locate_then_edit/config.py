"""The configuration of the locate-then-edit methods, and the methods as data; does not import torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from fastedit.configs import check_fields, check_names, described, option
from fastedit.errors import ConfigError

ObjectiveName = Literal["least-squares", "equality", "null-space"]
DistributionName = Literal["single", "spread", "endpoints"]
Site = Literal["block", "mlp"]
Average = Literal["half", "uniform", "direction"]


@dataclass(frozen=True)
class TargetConfig:
    """How targets are optimized. The defaults, except for `lr`, are MEMIT's with the clamp for Llama-2.

    Attributes:
        site: δ is added to the output of the block (MEMIT) or of its MLP (ROME).
        steps: evaluations of the loss; there is at most one update fewer.
        lr: Adam's learning rate; None is half the median root mean square of the edits' h₀.
        weight_decay: weight of ‖δ‖/‖h₀‖² in the loss.
        clamp: after each step, ‖δ‖ ≤ clamp·‖h₀‖.
        kl_factor: weight of KL(now ‖ before) at the subject's last token in "{subject} is a".
        stop_loss: an edit is done when its loss is below this.
    """

    site: Site = "block"
    steps: int = 25
    lr: float | None = None
    weight_decay: float = 0.5
    clamp: float = 4.0
    kl_factor: float = 0.0625
    stop_loss: float = 0.05

    def __post_init__(self) -> None:
        check_fields(self)
        if self.steps < 1:
            raise ConfigError(f"steps is {self.steps}; give at least 1")
        for name in ("lr", "clamp"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name} is {value}; give a positive number")
        for name in ("weight_decay", "kl_factor", "stop_loss"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} is {getattr(self, name)}; give 0 or more")


@described
@dataclass(frozen=True)
class LocateThenEditConfig:
    """Configuration of rome, memit, emmet and alphaedit; None takes the method's value, the preset's, or a rule's."""

    objective: ObjectiveName | None = option(
        None, "how new pairs are memorized: least-squares, equality or null-space.", unset="the method's"
    )
    distribution: DistributionName | None = option(
        None, "how layers share an edit: single, spread or endpoints.", unset="the method's"
    )
    layers: tuple[int, ...] | None = option(
        None, "layers to write, ascending.", unset="the preset's, else from an eighth to a quarter of the depth"
    )
    module: str = option("down_proj", "the projection to write, by its short name or its path in the block.")
    batch_size: int | Literal["auto"] = option(
        "auto",
        'edits that are solved together; "auto" is one for rome and all for the others. A later batch is '
        "measured on the model that the earlier ones left.",
    )
    cov_weight: float | None = option(
        None,
        "λ, the weight of the second moment C against one edit.",
        unset="the preset's, else the key width times the number of layers (at least 2), divided by alpha "
        "for an equality",
    )
    alpha: float | None = option(None, "α that stabilizes equality.", unset="0 for rome and 0.1 for the others")
    l2: float | None = option(None, "AlphaEdit's weight of ‖ΔW‖².", unset="the preset's")
    null_threshold: float | None = option(
        None,
        "eigenvalues of C below it span AlphaEdit's null space.",
        unset="the preset's, else the lowest quarter of them",
    )
    average: Average | None = option(
        None,
        "how a key is averaged. half: half the bare prompt, half the mean of the contexts. uniform: the mean "
        "over all of them. direction: as uniform, but an equality holds at the bare prompt's key, and the "
        "mean only gives the update's direction.",
        unset="direction for rome, else half",
    )
    site: Site | None = option(
        None,
        "where a target is sought: the output of the last written block, or of its MLP.",
        unset="mlp for rome, and for a single layer of a model with a norm after its MLPs",
    )
    through_norm: bool = option(
        True,
        "make updates for what a norm or a factor after down_proj lets through; with False its outputs get the "
        "residuals of the block, as in the published code.",
    )
    steps: int | None = option(None, "loss evaluations of a target.", unset="the preset's")
    lr: float | None = option(
        None, "Adam's rate for a target.", unset="the preset's, else half the root mean square of a typical state"
    )
    weight_decay: float | None = option(None, "weight of ‖δ‖/‖h₀‖² in a target's loss.", unset="the preset's")
    clamp: float | None = option(None, "bound of ‖δ‖/‖h₀‖.", unset="4 for rome, else the preset's")
    kl_factor: float = option(0.0625, "weight of a target's KL term.")
    stop_loss: float = option(0.05, "a target whose loss is below is done.")
    n_contexts: int | None = option(
        None, "texts that the model writes, to be put in front of prompts.", unset="20 for rome, else 5"
    )
    contexts: tuple[str, ...] | None = option(None, 'use these instead, each with one "{}" where the prompt goes.')
    seed: int = option(0, "seed of the contexts.")
    names: tuple[str, ...] | None = option(
        None,
        "names that no edit is about; inputs at their last tokens count with the second moment of text.",
        unset="573 names of people, places and things that come with the package",
    )
    name_weight: float | None = option(
        None,
        "weight of the names' inputs against those of text; 0 for none.",
        unset="1 for memit (least-squares) if the model has no published preset, else 0",
    )
    statistics: str | None = option(
        None, "folder of the second moments.", unset="the one beside the checkpoint, else the one in the user's cache"
    )
    unchecked_statistics: bool = option(
        False, "use statistics of another model, or of fewer tokens than the keys are wide."
    )
    targets: str | None = option(None, "folder that keeps targets, to reuse them if all that they depend on is equal.")
    on_duplicates: Literal["error", "merge", "sequential"] = option(
        "error",
        "edits with one key that make an equality singular: error, merge (one pair, the mean), or sequential "
        "(one after the other).",
    )
    cache_bytes: int | None = option(
        None, "budget of the prefix cache on the model's device, and again in host memory."
    )
    state: str | None = option(
        None,
        "folder for the state of this run alone. After a crash the same edit continues from it, and ends with "
        "the same bits.",
        unset="OUTPUT.run on the command line; from Python, the state is not kept",
    )
    save_every: float = option(300.0, "seconds between two states of the run.")
    keep_partial: bool = option(False, "on Ctrl-C keep the batches that are done instead of restoring the model.")

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("cov_weight", "l2", "null_threshold"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{name} is {value}; give a positive number, or leave it out")
        if self.alpha is not None and not 0 <= self.alpha < math.inf:
            raise ConfigError(f"alpha is {self.alpha}; give 0 or more, or leave it out")
        check_names(self.names, self.name_weight)
        if self.n_contexts is not None and self.n_contexts < 0:
            raise ConfigError(f"n_contexts is {self.n_contexts}; give 0 or more")
        self.target_config(self.site or "block")  # raises ConfigError for values that a target cannot take

    def target_config(self, site: Site) -> TargetConfig:
        """How targets are optimized at a site."""
        settings = {"steps": self.steps, "weight_decay": self.weight_decay, "clamp": self.clamp}
        chosen: dict[str, Any] = {name: value for name, value in settings.items() if value is not None}
        return TargetConfig(site, lr=self.lr, kl_factor=self.kl_factor, stop_loss=self.stop_loss, **chosen)


RECIPES: dict[str, LocateThenEditConfig] = {
    "rome": LocateThenEditConfig(
        objective="equality",
        distribution="single",
        batch_size=1,
        alpha=0.0,
        average="direction",
        site="mlp",
        clamp=4.0,
        n_contexts=20,
    ),
    "memit": LocateThenEditConfig(objective="least-squares", distribution="spread"),
    "emmet": LocateThenEditConfig(objective="equality", distribution="single"),
    "alphaedit": LocateThenEditConfig(objective="null-space", distribution="spread"),
}
"""The methods as data: the fields that each of them sets. The rest comes from the model's preset, or from a rule."""
