"""The published procedure of ROME, MEMIT, EMMET and AlphaEdit: one edit at a time, all of the model, d×d."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from helpers import CONTEXTS, at_subject, moments, tiny_model, values, wanted_keys
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fastedit import Editor, EditRequest
from fastedit.models import topology
from fastedit.statistics.moment import StreamingCovariance
from fastedit.statistics.store import statistics_path


@dataclass(frozen=True)
class Settings:
    """Of the reference, and of the Editor that should equal it."""

    objective: str
    layers: tuple[int, ...]
    average: str = "half"
    site: str = "block"
    cov_weight: float = 3.0
    alpha: float = 0.1
    l2: float = 0.5
    null_threshold: float = 0.07
    batch: int = 10**6
    contexts: Sequence[str] = tuple(CONTEXTS)

    @property
    def config(self) -> dict[str, Any]:
        names = ("layers", "site", "cov_weight", "alpha", "l2", "null_threshold", "contexts")
        return {name: getattr(self, name) for name in names}


METHODS = {
    "rome": Settings("equality", (1,), "direction", "mlp", alpha=0.0, batch=1),
    "memit": Settings("least-squares", (0, 2)),
    "emmet": Settings("equality", (1,)),
    "alphaedit": Settings("null-space", (0, 2)),
}
TOLERANCE = 3e-5  # keys and residuals in fp32, of the tiny models
SOUGHT: dict[str, Any] = {"steps": 4, "lr": 0.3, "stop_loss": 0.0}


def target_of(edit: EditRequest, width: int = 32) -> Tensor:
    """A target that depends on the edit alone."""
    rng = torch.Generator().manual_seed(zlib.crc32(f"{edit.prompt}|{edit.target}|{edit.subject}".encode()))
    return 2 * torch.randn(width, generator=rng)


def least_squares(C: Tensor, K: Tensor, R: Tensor, previous: Tensor, about: Settings) -> Tensor:
    """R Kᵀ (λC + Cp + K Kᵀ)⁻¹ with K [d, N], R [h, N], Cp the sum of k kᵀ over earlier batches."""
    return R @ K.T @ torch.linalg.inv(about.cov_weight * C + previous + K @ K.T)


def equality(C: Tensor, K: Tensor, R: Tensor, _: Tensor, about: Settings) -> Tensor:
    """R (Kᵀ(λC)⁻¹K + αI)⁻¹ Kᵀ(λC)⁻¹."""
    inverse = torch.linalg.inv(about.cov_weight * C)
    return R @ torch.linalg.inv(K.T @ inverse @ K + about.alpha * torch.eye(K.shape[1]).double()) @ K.T @ inverse


def null_space(C: Tensor, K: Tensor, R: Tensor, previous: Tensor, about: Settings) -> Tensor:
    """R Kᵀ P ((K Kᵀ + Cp) P + L2·I)⁻¹ (AlphaEdit, equation 12)."""
    values, vectors = torch.linalg.eigh(C)
    U = vectors[:, values < about.null_threshold]
    assert 0 < U.shape[1] < len(C)
    P = U @ U.T
    return R @ K.T @ P @ torch.linalg.inv((K @ K.T + previous) @ P + about.l2 * torch.eye(len(C)).double())


FORMULAS: dict[str, Callable[..., Tensor]] = {
    "least-squares": least_squares,
    "equality": equality,
    "null-space": null_space,
}


def weight_at(model: nn.Module, layer: int) -> nn.Parameter:
    module: Any = topology(model).resolve(layer, "down_proj")[1]
    return module.weight


@torch.no_grad()
def published(
    model: nn.Module,
    tokenizer: Any,
    edits: Sequence[EditRequest],
    folder: Path,
    about: Settings,
    wanted: Callable[[EditRequest], Tensor] = target_of,
) -> dict[int, Tensor]:
    """Write edits layer by layer, each key and state from a pass of the whole model; returns the layers' weights."""
    parts = topology(model)
    exact = {layer: weight_at(model, layer).detach().double() for layer in about.layers}
    previous = {layer: torch.zeros(()).double() for layer in about.layers}
    last = about.layers[-1]
    site = parts.blocks[last] if about.site == "block" else parts.resolve(last, "down_proj")[1]
    for first in range(0, len(edits), about.batch):
        batch = edits[first : first + about.batch]
        for i, layer in enumerate(about.layers):
            module = parts.resolve(layer, "down_proj")[1]
            K = wanted_keys(model, module, tokenizer, batch, about.average).double().T
            now = torch.stack([at_subject(model, site, tokenizer, e, "{}", output=True) for e in batch])
            R = (torch.stack([wanted(e) for e in batch]).double() - now.double()).T / (len(about.layers) - i)
            C = StreamingCovariance.load(statistics_path(parts, folder, layer)).finalize()
            update = FORMULAS[about.objective](C, K, R, previous[layer], about)
            if about.average == "direction":  # one edit, whose target is met at the bare prompt's key
                given = update @ at_subject(model, module, tokenizer, batch[0], "{}").double()
                update = update * (R[:, 0] @ R[:, 0]) / (R[:, 0] @ given)
            previous[layer] = previous[layer] + K @ K.T
            exact[layer] = exact[layer] + (update.T if isinstance(module, Conv1D) else update)
            weight_at(model, layer).copy_(exact[layer])
    return exact


class Case:
    """A model of a family in fp64, what keys and states are rounded to fp32 in, and statistics for it."""

    def __init__(self, tokenizer: Any, folder: Path, seed: int, family: str = "llama", **options: Any) -> None:
        self.family, self.options = family, {"dtype": torch.float64} | options
        self.model, self.tokenizer, self.folder = tiny_model(family, **self.options), tokenizer, folder
        self.before = values(self.model)
        moments(self.model, folder, seed)

    def editor(self, method: str, about: Settings, **config: Any) -> Editor:
        given = {"statistics": self.folder, "through_norm": False} | about.config | config
        return Editor(self.model, self.tokenizer, method, **given)

    def published(self, edits: Sequence[EditRequest], about: Settings, *more: Any) -> dict[int, Tensor]:
        """On a fresh model."""
        return published(tiny_model(self.family, **self.options), self.tokenizer, edits, self.folder, about, *more)


def assert_written(model: nn.Module, wanted: dict[int, Tensor], before: dict[str, Tensor], tolerance: float) -> None:
    """These layers hold these weights, up to an error relative to the change; no other weight has changed."""
    names = {f"{topology(model).resolve(layer, 'down_proj')[0]}.weight": layer for layer in wanted}
    after = values(model)
    assert {name for name in before if not torch.equal(before[name], after[name])} == names.keys()
    for name, layer in names.items():
        error = (after[name].double() - wanted[layer]).norm() / (wanted[layer] - before[name].double()).norm()
        assert error < tolerance, (name, float(error))


def assert_close(found: Tensor, wanted: Tensor, before: Tensor, tolerance: float) -> None:
    """Relative to the change."""
    assert float((found - wanted).norm() / (wanted - before).norm()) < tolerance
