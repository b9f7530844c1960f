"""The calls of rome, memit, unified-model-editing and AlphaEdit, served by our methods.

    from fastedit.compat.memit import apply_memit_to_model  # instead of: from memit import apply_memit_to_model

Variables of this module replace those of that code, and may be set:

- `CONTEXT_TEMPLATES_CACHE`: templates for all methods, including "{}", flat or nested. With None, each model writes its
  own when it is first edited, with seed 0, and they are kept.
- `COV_CACHE`: (name of the model with "_" for "/", path of the projection) -> C [d, d]. Statistics from published files
  are put here, and read again if the file has changed.
- `STATS_DIR`: the folder of those files if the hparams have no stats_dir.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastedit.compat.calls import EditCall, Edited, Request, Variables, fine_tune, locate_then_edit
from fastedit.compat.hparams import fine_tuning_fields
from fastedit.compat.moments import check_own, check_stack, check_sum, check_symmetric
from fastedit.errors import RequestError, listed
from fastedit.models import plain_state
from fastedit.tensorfile import checksum
from fastedit.weights import LowRank

CONTEXT_TEMPLATES_CACHE: Any = None
COV_CACHE: dict[tuple[str, str], Tensor] = {}
STATS_DIR = "data/stats"

Weights = dict[str, Tensor]
_KEYS = "_fastedit_keys"  # attribute of a cache_c: its checksum, and the keys that it sums up
_NORMS = (
    *("zs_norm", "cur_zs_norm", "layer_ks_norm", "adj_norm", "residual_norm", "inside_update_norm"),
    *("pseudo_inverse", "C_inv_norm", "D_inv_norm", "D_norm", "cov"),
)


def variables() -> Variables:
    """The current values of this module's variables."""
    return Variables(CONTEXT_TEMPLATES_CACHE, COV_CACHE, STATS_DIR)


@plain_state
def apply_rome_to_model(
    model: Any,
    tok: Any,
    requests: Sequence[Request],
    hparams: Any,
    copy: bool = False,
    return_orig_weights: bool = False,
    cache_template: str | Path | None = None,
) -> tuple[Any, Weights]:
    """Make edits one after the other, each by ROME.

    Args:
        copy: edit a copy of the model.
        return_orig_weights: return the changed weights as they were before.

    Returns:
        The edited model, and name of each changed parameter -> its value before ({} if not wanted).

    Raises:
        ConfigError: hparams lack fields, or ask for something that is not supported; names all of them.
        RequestError, ModelError, EditError: as for `fastedit.Editor.edit`; the model is as it was before.
    """
    call = EditCall("ROME", model, tok, requests, hparams)
    edited = locate_then_edit(call, variables(), copy=copy, cache_template=cache_template)
    return edited.model, edited.weights_copy(return_orig_weights)


@plain_state
def apply_memit_to_model(
    model: Any,
    tok: Any,
    requests: Sequence[Request],
    hparams: Any,
    copy: bool = False,
    return_orig_weights: bool = False,
    cache_template: str | Path | None = None,
) -> tuple[Any, Weights]:
    """Make all edits at once by MEMIT; arguments, results and errors are those of `apply_rome_to_model`.

    Args:
        cache_template: names of files of targets, with "{}" for the layer, the clamp and the case_id. Existing files
            are read, others are written.
    """
    call = EditCall("MEMIT", model, tok, requests, hparams)
    edited = locate_then_edit(call, variables(), copy=copy, cache_template=cache_template)
    return edited.model, edited.weights_copy(return_orig_weights)


@plain_state
def apply_emmet_to_model(
    model: Any,
    tok: Any,
    requests: Sequence[Request],
    hparams: Any,
    copy: bool = False,
    return_orig_weights: bool = False,
    cache_template: str | Path | None = None,
) -> tuple[Any, Weights, dict[str, Any]]:
    """Make all edits at once by EMMET; a single edit without emmet_lambda, as unified-model-editing does.

    Returns:
        As for `apply_memit_to_model`, and number of each layer -> norms of its weights and update; norms that are not
        measured here are None.
    """
    call = EditCall("EMMET", model, tok, requests, hparams)
    alpha = 0.0 if len(call.edits) == 1 else None
    edited = locate_then_edit(call, variables(), copy=copy, cache_template=cache_template, alpha=alpha)
    return edited.model, edited.weights_copy(return_orig_weights), _distances(edited)


def _distances(edited: Edited) -> dict[str, Any]:
    parameters, distances = dict(edited.parts.network.named_parameters()), {}
    for layer, path in zip(edited.result.config["layers"], edited.paths, strict=True):
        weight = f"{path}.weight"
        update = edited.result.updates[weight]
        size = float((update.dense() if isinstance(update, LowRank) else update).norm())
        norms = {"layer_ks_norm": float(edited.result.keys[weight].norm(dim=1).mean()), "inside_update_norm": size}
        distances[str(layer)] = {
            "preservation_distance": None,
            "new_edit_distance": None,
            "old_edit_distance": None,
            "delta_norm": size,
            "new_weights_norm": float(parameters[weight].detach().norm()),
            "original_weights_norm": float(edited.result.originals[weight].norm()),
            "inside_norms": dict.fromkeys(_NORMS) | norms,
        }
    return distances


@plain_state
def apply_AlphaEdit_to_model(  # noqa: N802  # AlphaEdit's name
    model: Any,
    tok: Any,
    requests: Sequence[Request],
    hparams: Any,
    cache_template: str | Path | None = None,
    cache_c: Tensor | None = None,
    P: Tensor | None = None,
) -> tuple[Any, Tensor]:
    """Make all edits at once by AlphaEdit, in place.

    Args:
        cache_template: as for `apply_memit_to_model`.
        cache_c: [L, d, d], the sum of k kᵀ over earlier edits for each layer; it is updated. None is no edits.
        P: [L, d, d], the projections on the null spaces; None makes them from statistics, by nullspace_threshold.

    Returns:
        The edited model, and cache_c with the keys of these edits added.

    Raises:
        ConfigError: a cache_c or a P has a wrong shape; and as for `apply_rome_to_model`.
        RequestError, ModelError, EditError: as for `apply_rome_to_model`.
    """
    call = EditCall("AlphaEdit", model, tok, requests, hparams)
    previous = {} if cache_c is None else _keys_of(cache_c, call)
    edited = locate_then_edit(call, variables(), cache_template=cache_template, projections=P, previous=previous)
    keys = {f"{path}.weight": edited.result.keys[f"{path}.weight"].float() for path in edited.paths}
    if cache_c is None:
        widths = [of_path.shape[1] for of_path in keys.values()]
        cache_c = torch.zeros(len(widths), widths[0], widths[0])
    for i, (path, new) in enumerate(keys.items()):
        cache_c[i] += (new.T @ new).to(cache_c)
        if path in previous:
            keys[path] = torch.cat([previous[path].to(new), new])
    setattr(cache_c, _KEYS, (checksum(cache_c), keys))
    return edited.model, cache_c


def _keys_of(cache_c: Tensor, call: EditCall) -> Mapping[str, Tensor]:
    """Path of each parameter -> rows [n, d] with the sum of k kᵀ in `cache_c`: its own keys, or else a square root."""
    written = call.written()
    check_stack("cache_c", cache_c, call.parts.topology, written.layers, written.module)
    check_own("cache_c", cache_c)
    total_then, keys = getattr(cache_c, _KEYS, (None, {}))
    if keys and total_then == checksum(cache_c):
        return dict(keys)
    roots = {}
    for i, (path, total) in enumerate(zip(written.paths, cache_c, strict=True)):
        name = f"cache_c[{i}], of layer {written.layers[i]},"
        check_symmetric(name, total)
        if total.any():
            values, vectors = torch.linalg.eigh(total.double())
            check_sum(name, values)
            nonzero = values > values[-1] * len(values) * torch.finfo(total.dtype).eps
            roots[f"{path}.weight"] = values[nonzero].sqrt()[:, None] * vectors[:, nonzero].T
    return roots


@plain_state
def apply_ft_to_model(
    model: Any,
    tok: Any,
    requests: Sequence[Request],
    hparams: Any,
    copy: bool = False,
    return_orig_weights: bool = False,
    **kwargs: Any,
) -> tuple[Any, Weights]:
    """Fine-tune a module of some layers on all edits: LocFT-BF's loop, with the order, loss and stop of FT.

    The loss is of each target's tokens after its prompt (objective_optimization target_new). The published
    prompt_last, which trains all tokens of a target at the prompt's last token, is the same for targets of one token.

    Args:
        kwargs: ignored, as in the published code.

    Returns:
        As for `apply_rome_to_model`.

    Raises:
        RequestError: prompt_last with longer targets; and as for `apply_rome_to_model`.
        ConfigError, ModelError, EditError: as for `apply_rome_to_model`.
    """
    call = EditCall("FT", model, tok, requests, hparams)
    fields = fine_tuning_fields(call.hparams, call.parts.topology)
    if longer := call.longer_targets():
        raise RequestError(
            f"objective_optimization prompt_last trains all tokens of a target at the prompt's last one, and that is "
            f"not done here for targets of several tokens: {listed(longer)}; give target_new",
            edits=longer,
        )
    edited = fine_tune(call, "locft-bf", fields, copy=copy)
    return edited.model, edited.weights_copy(return_orig_weights)
