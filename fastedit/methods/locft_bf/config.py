"""The configuration of LocFT-BF; does not import torch."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Literal

from fastedit.configs import check_fields, check_names, described, option
from fastedit.errors import ConfigError


@described
@dataclass(frozen=True)
class LocFTBFConfig:
    """Configuration of LocFT-BF (arXiv 2509.22072)."""

    layer: int | tuple[int, ...] | None = option(
        None,
        "layer of the edited module; or several layers, and the module is edited in each.",
        unset="the preset of a published model, else 22/32 of the depth, or MEMIT's layers with tokens subject",
    )
    module: str | None = option(
        None, "down_proj, up_proj, gate_proj, mlp, attn, block, or a module path.", unset="the preset's"
    )
    lr: float | None = option(
        None,
        "Adam's learning rate.",
        unset="the preset's, else 0.025 of the weights' RMS; 0.016 with tokens subject",
    )
    lr_schedule: Literal["constant", "linear"] | None = option(
        None,
        "constant, as published, or linear: the rate falls to 0 over `epochs`, so that the last steps do not undo "
        "other edits. For many edits that fill the module.",
        unset="constant, or linear from 200 edits and copies on with tokens subject",
    )
    batch_size: int | Literal["auto"] = option(
        "auto",
        'edits a step; "auto" is 100 from 3,000 edits on, and at least 30 steps an epoch below that; a tenth '
        "of the edits, at most 100, with tokens subject.",
    )
    epochs: int | None = option(
        None,
        "at most this many passes over the edits.",
        unset="25, as published; with tokens subject 40, or 60 from 200 edits and copies on",
    )
    stop_loss: float = option(0.01, "stop after an epoch whose mean loss is below.")
    skip_loss: float = option(0.01, "a batch whose loss is below does no backward pass and no step.")
    focus: float | None = option(
        None,
        "an edit whose loss is below gets no gradient and is left out for some epochs; 0 for never, as published.",
        unset="0.1 with tokens subject, else 0",
    )
    loss_average: Literal["sample", "token"] = option(
        "sample", "mean over a sample's target tokens, then over samples; or over all target tokens."
    )
    schedule: Literal["breadth-first", "depth-first"] = option(
        "breadth-first",
        "breadth-first, or the baseline that the paper refutes: depth-first trains each batch to `stop_loss` (at most "
        "`epochs` steps) with a fresh optimizer before it turns to the next.",
    )
    eos: bool = option(True, "train EOS after the target, so that a generated answer ends there.")
    shuffle: bool = option(True, "a new order every epoch.")
    augment: int = option(
        0, "extra copies of each edit after random contexts (the paper's LocFT-BF-Aug has 5); 0 for none."
    )
    seed: int = option(0, "seed of the order and of the contexts.")
    weight_decay: float = option(0.0, "Adam's L2 term.")
    published: bool = option(
        False, "the papers' recipe, whatever the model and the edits: tokens all, preserve none, and the layer's rule."
    )
    tokens: Literal["auto", "all", "subject"] = option(
        "auto",
        "tokens at which the update is learned. subject: the last token of each edit's subject, where ROME and MEMIT "
        "edit (all tokens of an edit without a subject). auto: subject for a model without a preset if layer, module "
        "and preserve are left open and all edits have subjects; else all.",
    )
    preserve: Literal["auto", "none", "null-space", "anchors", "both"] = option(
        "auto",
        "what training must preserve. null-space: it avoids the directions that the module's inputs take in other "
        "text, as the statistics show; anchors: predictions for the edits' prompts with other subjects stay; both: the "
        "two together; auto: null-space with tokens subject, else none.",
    )
    null_space: float | None = option(
        None,
        "share of the input directions that training avoids, with preserve null-space.",
        unset="0.2, or 0.5 with tokens subject",
    )
    refit: bool | None = option(
        None,
        "after training, replace the update by the one that does the same at the edits' subjects and changes "
        "outputs on other text least (MEMIT's solve).",
        unset="True for tokens subject with preserve null-space",
    )
    anchors: int = option(8, "prompts with other subjects for each edit; a step uses one of them.")
    anchor_weight: float = option(1.0, "weight of the divergence at anchors from the unedited model, in nats.")
    anchor_subjects: tuple[str, ...] | None = option(
        None, "subjects to put into the prompts.", unset="those of the other edits"
    )
    names: tuple[str, ...] | None = option(
        None,
        "names that no edit is about; with preserve null-space, inputs at their last tokens count with those of text.",
        unset="573 names of people, places and things that come with the package",
    )
    name_weight: float | None = option(
        None, "weight of the names' inputs against those of text; 0 for none.", unset="10 with tokens subject, else 0"
    )
    statistics: str | None = option(
        None,
        "folder of the second moments for preserve null-space; if it has none, they are collected from text that the "
        "model writes.",
        unset="the one beside the checkpoint, else the one in the user's cache",
    )
    unchecked_statistics: bool = option(
        False, "use statistics of another model, or of fewer tokens than the inputs are wide."
    )
    cache_bytes: int | None = option(
        None,
        "budget of the prefix cache, of the edited block's frozen part and of the tokens before the subjects on the "
        "model's device, and again in host memory. A prefix cache that fits in neither goes to a file; the others are "
        "not kept then.",
        unset="half of what is free",
    )
    state: str | None = option(
        None,
        "folder for the state of this run alone. After a crash the same edit continues from it, and ends with "
        "the same bits.",
        unset="OUTPUT.run on the command line; from Python, the state is not kept",
    )
    save_every: float = option(300.0, "seconds between two states of the run.")
    keep_partial: bool = option(
        False,
        "on Ctrl-C keep the last whole epoch (depth-first: the last finished batch) instead of restoring the model. "
        "Takes another fp32 copy of the edited weights.",
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if isinstance(self.layer, tuple):
            if not self.layer:
                raise ConfigError("layer is (); give at least one layer")
            blocks = tuple(sorted(set(self.layer)))
            object.__setattr__(self, "layer", blocks if len(blocks) > 1 else blocks[0])
        if self.epochs is not None and self.epochs < 1:
            raise ConfigError(f"epochs is {self.epochs}; give at least 1")
        if self.lr is not None and not (math.isfinite(self.lr) and self.lr > 0):
            raise ConfigError(f"lr is {self.lr}; give a positive learning rate, or leave it out")
        for name, most in (("stop_loss", math.inf), ("skip_loss", math.inf), ("weight_decay", sys.float_info.max)):
            if not 0 <= getattr(self, name) <= most:
                raise ConfigError(f"{name} is {getattr(self, name)}; give 0 or more")
        if self.focus is not None and not 0 <= self.focus < math.inf:
            raise ConfigError(f"focus is {self.focus}; give 0 or more, or leave it out")
        if self.augment < 0:
            raise ConfigError(f"augment is {self.augment}; give a number of contexts an edit, 0 for none")
        if self.published and (self.tokens == "subject" or self.preserve not in ("auto", "none")):
            raise ConfigError("published is the papers' recipe; leave out tokens and preserve, or leave out published")
        if self.refit and (self.published or self.tokens == "all" or self.preserve in ("none", "anchors")):
            raise ConfigError("refit needs tokens subject and preserve null-space, or both; leave out refit")
        if (self.names or self.name_weight) and (self.published or self.preserve in ("none", "anchors")):
            raise ConfigError("names count with preserve null-space, or both; leave out names and name_weight")
        if self.null_space is not None and not 0 < self.null_space < 1:
            raise ConfigError(f"null_space is {self.null_space}; give a share of the directions between 0 and 1")
        if self.anchors < 1:
            raise ConfigError(f"anchors is {self.anchors}; give at least 1, or take preserve null-space or none")
        if self.anchor_subjects is not None and not all(map(str.strip, self.anchor_subjects)):
            raise ConfigError("anchor_subjects holds an empty text; give subjects such as names")
        check_names(self.names, self.name_weight)
        if not 0 < self.anchor_weight < math.inf:
            raise ConfigError(f"anchor_weight is {self.anchor_weight}; give a positive number")

    @property
    def layers(self) -> tuple[int, ...]:
        """The edited blocks, ascending; empty while `layer` is None."""
        return self.layer if isinstance(self.layer, tuple) else () if self.layer is None else (self.layer,)

    @property
    def linear_only(self) -> bool:
        """Whether the edited module has to be a linear map; its bias is then not trained."""
        return self.keeps_null_space or self.tokens == "subject"

    @property
    def keeps_anchors(self) -> bool:
        """Whether the predictions at anchors are preserved."""
        return self.preserve in ("anchors", "both")

    @property
    def keeps_null_space(self) -> bool:
        """Whether training avoids the directions of other text."""
        return self.preserve in ("null-space", "both")
