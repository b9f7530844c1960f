"""Targets in .npz files, as other editing code keeps them with `cache_template`."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastedit.compat.requests import UpstreamEdit
from fastedit.errors import ConfigError, FileError, Problem, RequestError
from fastedit.methods.batch import Batch
from fastedit.methods.locate_then_edit.method import Find
from fastedit.methods.locate_then_edit.recipes import Recipe
from fastedit.methods.locate_then_edit.targets import Targets
from fastedit.methods.naming import edit_name
from fastedit.tensorfile import writing


def check_names(template: str | Path, clamp: Any, edits: Sequence[UpstreamEdit]) -> None:
    """Check that each edit has a file of its own; the arguments are those of `stored_targets`.

    Raises:
        ConfigError: the template cannot be filled. RequestError: edits without a case_id, or with the file of another
            edit; names all of them.
    """
    owners: dict[str, int] = {}
    problems = []
    for place, edit in enumerate(edits):
        name = edit_name(edit, place)
        if edit.id is None:
            problems.append(Problem(name, "it has no case_id, and cache_template needs one"))
            continue
        try:
            file = str(template).format(0, clamp, edit.id)
        except (LookupError, ValueError, AttributeError) as error:
            problem = f"cache_template is {str(template)!r:.200}, which cannot be filled ({error})"
            raise ConfigError(f"{problem}; give three {{}}: for the layer, the clamp and the case_id") from None
        owner = owners.setdefault(file, place)
        if (edit.prompt, edit.target) != (edits[owner].prompt, edits[owner].target):
            cause = f"requests[{place}] has the file of requests[{owner}] by cache_template"
            problems.append(Problem(name, f"{cause}; give it a case_id of its own"))
    if problems:
        raise RequestError.of_edits(problems)


def stored_targets(template: str | Path, clamp: Any, find: Find) -> Find:
    """A function that reads targets from files, and finds missing ones with `find` and writes them.

    Args:
        template: for the files' names, with three "{}": the layer of the targets, `clamp`, and the edit's case_id.
        clamp: the clamp as in the hparams, because it is part of the name.

    Raises:
        FileError: from the function: a file does not hold a target of the model's width, or cannot be written.
    """

    def load_or_find(batch: Batch, recipe: Recipe) -> Targets:
        files = [Path(str(template).format(recipe.z_layer, clamp, edit.id)) for edit in batch.edits]
        new = [i for i, file in enumerate(files) if not file.exists()]
        width, device = batch.model.topology.hidden_size, batch.model.device
        nothing = torch.full((len(files),), torch.nan, device=device)
        z = torch.zeros(len(files), width, device=device)
        for i in sorted({*range(len(files))} - {*new}):
            z[i] = _load(files[i], width)
        targets = Targets(z, z.clone(), nothing, nothing.clone(), torch.zeros_like(nothing).long(), (), 1.0, ())
        if not new:
            return targets
        fresh = find(batch.select(new), recipe)
        for name in ("z", "h0", "loss", "probability", "steps"):
            getattr(targets, name)[new] = getattr(fresh, name).to(getattr(targets, name).dtype)
        for i, values in zip(new, fresh.z, strict=True):
            if values.isfinite().all():
                _save(files[i], values)
        dropped = tuple(new[i] for i in fresh.dropped)
        return Targets(z, targets.h0, targets.loss, targets.probability, targets.steps, dropped, fresh.lr, fresh.notes)

    return load_or_find


def _load(path: Path, width: int) -> Tensor:
    try:
        with np.load(path, allow_pickle=False) as entries:
            z = torch.from_numpy(entries["v_star"]).float()
    except (OSError, EOFError, zipfile.BadZipFile, KeyError, TypeError, ValueError) as error:
        text = f"{{path}} holds no target v_star ({error}); delete it, it is sought again then"
        raise FileError(path, text) from error
    if z.shape != (width,) or not z.isfinite().all():
        text = f"{{path}} holds a target of shape {list(z.shape)}, expected {width} finite numbers: of another model?"
        raise FileError(path, text)
    return z


def _save(path: Path, z: Tensor) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path, "the target could not be saved") as temporary, temporary.open("wb") as file:
        np.savez(file, v_star=z.detach().cpu().numpy())
