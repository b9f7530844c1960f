"""One call of other editing code: it takes that code's arguments, runs our method, and returns that code's values."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastedit import methods
from fastedit.compat.hparams import Hparams, locate_then_edit_fields, module_inside
from fastedit.compat.known import Known, copied, known_of
from fastedit.compat.moments import Cache, Moments
from fastedit.compat.requests import upstream_edits
from fastedit.compat.stored_targets import check_names, stored_targets
from fastedit.errors import ConfigError
from fastedit.methods.base import History, MethodResult
from fastedit.methods.locate_then_edit.method import LocateThenEditPlan
from fastedit.methods.naming import edit_name
from fastedit.models import Model, encode
from fastedit.statistics.store import MissingStatisticsError

Request = Mapping[str, Any]
_LENGTHS = ((10, 5),)  # tokens and number of the contexts of all methods but ROME
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Variables:
    """The values that other code keeps in variables of its modules.

    Attributes:
        contexts: templates, flat or nested, including the bare "{}"; None lets the model write its own.
        second_moments: C by name of the model and path of the projection.
        stats_dir: folder of the statistics if the hparams do not give one.
    """

    contexts: Any
    second_moments: Cache
    stats_dir: str


@dataclass(frozen=True)
class Edited:
    """The outcome: the model, which holds the edit, and the method's result.

    `paths` are the paths of the edited projections, in the order of the layers.
    """

    model: nn.Module
    parts: Model
    known: Known
    result: MethodResult
    paths: Sequence[str]

    def weights_copy(self, wanted: bool) -> dict[str, Tensor]:
        """The parameters before the edit, by their names in the given model; {} if they are not wanted."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        own = dict(self.parts.network.named_parameters())
        return {names[id(own[path])]: before for path, before in self.result.originals.items()} if wanted else {}


class EditCall:
    """A call after all checks that do not need a plan.

    Raises:
        RequestError: requests that cannot be used. ModelError: a model that cannot be edited.
    """

    def __init__(self, method: str, model: nn.Module, tok: Any, requests: Sequence[Request], hparams: Any) -> None:
        self.hparams = Hparams(hparams, method)
        self.edits = upstream_edits(requests)
        self.model, self.tok = model, tok
        self.parts = Model.of(model, tok)
        self.known = known_of(model, self.parts)

    def copy(self) -> None:
        """Edit a copy of the model from now on."""
        source = self.parts.network
        self.model = deepcopy(self.model)
        self.parts = Model.of(self.model, self.tok)
        self.known = copied(self.known, source, self.model, self.parts.network)

    def written(self) -> Moments:
        """The layers and projections that the hparams name. Raises ConfigError if they name none."""
        topology = self.parts.topology
        self.hparams.require(["layers", "rewrite_module_tmp"])
        return Moments(self.hparams, topology, module_inside(self.hparams, topology), self.hparams.layers)

    def longer_targets(self) -> list[str]:
        """Names of edits for which FT's prompt_last is not our loss: those with targets of more than one token."""
        if self.hparams.get("objective_optimization", "prompt_last") != "prompt_last":
            return []
        texts = encode(self.tok, [f" {edit.target.removeprefix(' ')}" for edit in self.edits])
        return [edit_name(edit, i) for i, (edit, ids) in enumerate(zip(self.edits, texts, strict=True)) if len(ids) > 1]

    def run(self, name: str, fields: Mapping[str, Any], history: History, template: Any = None) -> MethodResult:
        """Plan and run one of our methods; raises its errors."""
        method = methods.method_of(name, fields)
        made = method.plan(self.parts, self.edits, method.config(**fields), history=history)
        if template is not None and isinstance(made, LocateThenEditPlan):
            clamp = self.hparams.get("clamp_norm_factor")
            made = replace(made, find=stored_targets(template, clamp, made.find))
        for note in made.notes:
            _log.info("%s: %s", self.hparams.method, note)
        return made.run()


def locate_then_edit(
    call: EditCall,
    variables: Variables,
    *,
    copy: bool = False,
    cache_template: str | Path | None = None,
    projections: Tensor | None = None,
    previous: Mapping[str, Tensor] | None = None,
    alpha: float | None = None,
) -> Edited:
    """Run ROME, MEMIT, EMMET or AlphaEdit.

    Args:
        projections: P [L, d, d] of AlphaEdit, instead of statistics.
        previous: path of a parameter -> keys [n, d] that AlphaEdit preserves.
        alpha: instead of emmet_lambda.

    Raises:
        ConfigError: hparams lack fields, or ask for something that is not supported.
        RequestError, ModelError, EditError: as for `Editor.edit`. The model is then as it was before.
    """
    hparams, topology = call.hparams, call.parts.topology
    overrides = {} if alpha is None else {"alpha": alpha}
    if projections is not None:
        overrides["null_threshold"] = 0.5  # between 0 and 1, the eigenvalues of I − P
    fields = locate_then_edit_fields(hparams, call.model, topology, **overrides)
    if cache_template is not None:
        if hparams.method == "ROME":
            raise ConfigError("cache_template of ROME names files of updates, which depend on the model; leave it out")
        check_names(cache_template, hparams.get("clamp_norm_factor"), call.edits)
    moments = Moments(hparams, topology, fields["module"], fields["layers"])
    _find_moments(moments, call, variables, projections)
    lengths: tuple[tuple[int, int], ...] = _LENGTHS
    if hparams.method == "ROME" and variables.contexts is None:
        hparams.require(["context_template_length_params"])
        lengths = _lengths(hparams.get("context_template_length_params"))
    if copy:
        call.copy()
    own = variables.contexts is None
    contexts = call.known.own_contexts(call.parts, lengths) if own else _templates(variables.contexts)
    fields |= {"contexts": contexts, "statistics": moments.directory}
    history = History(call.known.fingerprint, dict(previous or {}), call.known.memo, moments.given)
    try:
        result = call.run(hparams.method.lower(), fields, history, cache_template)
    except MissingStatisticsError as error:
        files = ", ".join(map(str, moments.sought))
        raise error.at(f"COV_CACHE holds no such second moment, and there is no file {files}") from None
    return Edited(call.model, call.parts, call.known, result, moments.paths)


def _find_moments(moments: Moments, call: EditCall, variables: Variables, projections: Tensor | None) -> None:
    hparams, known = call.hparams, call.known
    if hparams.method == "ROME" and not hparams.get("mom2_adjustment"):
        return moments.take_identity(known)
    if projections is not None:
        return moments.take_projections(known, projections)
    moments.load(variables.second_moments, variables.stats_dir)
    share = hparams.get("update_norm_lambda", 0.0) if hparams.method == "EMMET" else 0.0
    if share and moments.sought:
        hparams.refuse([("update_norm_lambda", "it is added to second moments of COV_CACHE or of .npz files")])
    if share and (weight := hparams.get("mom2_update_weight")):  # our configuration refuses 0
        moments.add_identity(known, share / weight)
    return None


def _lengths(given: Any) -> tuple[tuple[int, int], ...]:
    """Tokens and number of ROME's own contexts."""
    try:
        return tuple((int(tokens), int(n)) for tokens, n in given)
    except (TypeError, ValueError, OverflowError):
        text = f"context_template_length_params is {given!r:.80}, expected pairs: tokens, and how many contexts"
        raise ConfigError(text) from None


def _templates(contexts: Any) -> tuple[str, ...]:
    """Contexts from a flat or nested list, without the bare template, which is always used."""
    try:
        flat = [text for part in contexts for text in ([part] if isinstance(part, str) else part)]
    except TypeError:
        flat = []
    if flat.count("{}") != 1 or not all(isinstance(text, str) for text in flat):
        raise ConfigError(f'CONTEXT_TEMPLATES_CACHE is {contexts!r:.200}; give templates, "{{}}" among them once')
    return tuple(text for text in flat if text != "{}")


def fine_tune(call: EditCall, name: str, fields: Mapping[str, Any], *, copy: bool = False) -> Edited:
    """Run LocFT-BF with these fields; raises the errors of `Editor.edit`."""
    if copy:
        call.copy()
    result = call.run(name, fields, History(call.known.fingerprint))
    return Edited(call.model, call.parts, call.known, result, [])
