"""ROME, MEMIT, EMMET and AlphaEdit against the published procedure: one edit at a time, the whole model, d×d in fp64."""

from __future__ import annotations

import importlib
import json
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from test_keys import CONTEXTS, at_subject, random_edits, wanted_keys
from tiny_models import FAMILIES, tiny_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fastedit import ConfigError, EditError, Editor, EditRequest, ModelError, RequestError
from fastedit.collect import collect
from fastedit.covariance import StreamingCovariance
from fastedit.delta import WeightDelta
from fastedit.editor import EditResult
from fastedit.methods.base import MethodResult
from fastedit.methods.objectives import LeastSquares
from fastedit.methods.targets import Targets
from fastedit.models import LowRank, fingerprint, topology
from fastedit.statistics import statistics_path

lte = importlib.import_module("fastedit.methods.locate_then_edit")  # the package has a function of that name
LAYERS = (0, 1, 2, 3)


def moments(model: nn.Module, folder: Path, seed: int, *, tokens: int = 400, layers: Sequence[int] = LAYERS) -> str:
    """Statistics of random keys for a model, in the folder of the store."""
    parts = topology(model)
    for layer in layers:
        d = parts.input_width(layer, "down_proj")
        rng = torch.Generator().manual_seed(seed + layer)
        found = StreamingCovariance(d, metadata={"fingerprint": fingerprint(model), "layer": layer})
        found.update(torch.randn(tokens, d, generator=rng) @ torch.randn(d, d, generator=rng) / d)
        found.save(statistics_path(parts, folder, layer))
    return str(folder)


def moment(model: nn.Module, folder: str, layer: int) -> Tensor:
    return StreamingCovariance.load(statistics_path(topology(model), folder, layer)).finalize()


def target_of(edit: EditRequest, width: int = 32) -> Tensor:
    """A target that depends on the edit alone."""
    rng = torch.Generator().manual_seed(zlib.crc32(f"{edit.prompt}|{edit.target}|{edit.subject}".encode()))
    return 2 * torch.randn(width, generator=rng)


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Targets are `target_of` the edits instead of sought."""

    def find(_: Any, __: Any, edits: Sequence[EditRequest], *___: Any, **____: Any) -> Targets:
        z = torch.stack([target_of(edit) for edit in edits])
        zeros = torch.zeros(len(edits))
        return Targets(z, z, zeros, zeros, zeros.long(), (), 1.0, ())

    monkeypatch.setattr(lte, "find_targets", find)


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
    null_threshold: float = 0.3
    batch: int = 10**6
    contexts: Sequence[str] = tuple(CONTEXTS)

    @property
    def config(self) -> dict[str, Any]:
        names = ("layers", "site", "cov_weight", "alpha", "l2", "null_threshold", "contexts")
        return {name: getattr(self, name) for name in names}


METHODS = {
    "rome": Settings("equality", (1,), "uniform", "mlp", alpha=0.0, batch=1),
    "memit": Settings("least-squares", (0, 2)),
    "emmet": Settings("equality", (1,)),
    "alphaedit": Settings("null-space", (0, 2)),
}


def least_squares(C: Tensor, K: Tensor, R: Tensor, previous: Tensor, about: Settings) -> Tensor:
    """R Kᵀ (λC + Cp + K Kᵀ)⁻¹ with K [d, N], R [h, N], Cp the sum of k kᵀ over earlier batches."""
    return R @ K.T @ torch.linalg.inv(about.cov_weight * C + previous + K @ K.T)


def equality(C: Tensor, K: Tensor, R: Tensor, _: Tensor, about: Settings) -> Tensor:
    """R (Kᵀ(λC)⁻¹K + αI)⁻¹ Kᵀ(λC)⁻¹."""
    inverse = torch.linalg.inv(about.cov_weight * C)
    return R @ torch.linalg.inv(K.T @ inverse @ K + about.alpha * torch.eye(K.shape[1])) @ K.T @ inverse


def null_space(C: Tensor, K: Tensor, R: Tensor, previous: Tensor, about: Settings) -> Tensor:
    """R Kᵀ P ((K Kᵀ + Cp) P + L2·I)⁻¹ (AlphaEdit, equation 12)."""
    values, vectors = torch.linalg.eigh(C)
    U = vectors[:, values < about.null_threshold]
    assert 0 < U.shape[1] < len(C)
    P = U @ U.T
    return R @ K.T @ P @ torch.linalg.inv((K @ K.T + previous) @ P + about.l2 * torch.eye(len(C)))


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
            previous[layer] = previous[layer] + K @ K.T
            exact[layer] = exact[layer] + (update.T if isinstance(module, Conv1D) else update)
            weight_at(model, layer).copy_(exact[layer])
    return exact


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(model: nn.Module, wanted: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return all(torch.equal(p, wanted[name]) for name, p in model.named_parameters())


def assert_written(model: nn.Module, wanted: dict[int, Tensor], before: dict[str, Tensor], tolerance: float) -> None:
    """These layers hold these weights, up to an error relative to the change; no other weight has changed."""
    names = {f"{topology(model).resolve(layer, 'down_proj')[0]}.weight": layer for layer in wanted}
    after = values(model)
    assert {name for name in before if not torch.equal(before[name], after[name])} == names.keys()
    for name, layer in names.items():
        error = (after[name].double() - wanted[layer]).norm() / (wanted[layer] - before[name].double()).norm()
        assert error < tolerance, (name, float(error))


class Case:
    """A model of a family in fp64, what keys and states are rounded to fp32 in, and statistics for it."""

    def __init__(self, tokenizer: Any, folder: Path, seed: int, family: str = "llama", **options: Any) -> None:
        self.family, self.options = family, {"dtype": torch.float64} | options
        self.model, self.tokenizer, self.folder = tiny_model(family, **self.options), tokenizer, folder
        self.before = values(self.model)
        moments(self.model, folder, seed)

    def editor(self, method: str, about: Settings, **config: Any) -> Editor:
        return Editor(self.model, self.tokenizer, method, **{"statistics": str(self.folder)} | about.config | config)

    def published(self, edits: Sequence[EditRequest], about: Settings, *more: Any) -> dict[int, Tensor]:
        """On a fresh model."""
        return published(tiny_model(self.family, **self.options), self.tokenizer, edits, self.folder, about, *more)


@pytest.fixture
def case(tokenizer: Any, tmp_path: Path, seed: int) -> Case:
    return Case(tokenizer, tmp_path / "statistics", seed)


TOLERANCE = 3e-5  # keys and residuals in fp32, of the tiny models


@pytest.mark.usefixtures("given")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_those_of_the_published_procedure(
    family: str, method: str, tokenizer: Any, tmp_path: Path, seed: int
) -> None:
    case, edits, about = Case(tokenizer, tmp_path, seed, family), random_edits(3, seed), METHODS[method]
    model, before = case.model, case.before
    result = case.editor(method, about).edit(edits)
    assert_written(model, case.published(edits, about), before, TOLERANCE)
    after = values(model)
    result.delta.save(tmp_path / "edit.safetensors")
    result.revert()
    assert same(model, before)
    WeightDelta.load(tmp_path / "edit.safetensors").apply(model)
    assert same(model, after)


@pytest.mark.usefixtures("given")
@pytest.mark.parametrize("method", ["memit", "rome"])
@pytest.mark.parametrize(
    ("objective", "distribution"), product(FORMULAS, ("single", "spread", "endpoints")), ids="-".join
)
def test_any_objective_goes_with_any_distribution(
    objective: str, distribution: str, method: str, case: Case, seed: int
) -> None:
    edits, rome = random_edits(4, seed), method == "rome"
    layers = (2,) if distribution == "single" else (0, 1, 2)
    about = Settings(objective, layers, "uniform" if rome else "half", alpha=0.0 if rome else 0.1, batch=2)
    pair = {"objective": objective, "distribution": distribution, "batch_size": 2}
    case.editor(method, about, **pair).edit(edits)
    written = (0, 2) if distribution == "endpoints" else layers
    assert_written(case.model, case.published(edits, replace(about, layers=written)), case.before, TOLERANCE)


def edited(case: Case, edits: Sequence[EditRequest], method: str, about: Settings, **config: Any) -> Tensor:
    """The edited weights of the last layer; the model is put back."""
    result = case.editor(method, about, **config).edit(edits)
    weight = weight_at(case.model, about.layers[-1]).detach().clone()
    result.revert()
    return weight


def assert_close(found: Tensor, wanted: Tensor, before: Tensor, tolerance: float) -> None:
    """Relative to the change."""
    assert float((found - wanted).norm() / (wanted - before).norm()) < tolerance


@pytest.mark.usefixtures("given")
def test_identities(case: Case, seed: int) -> None:
    edits, before = random_edits(5, seed), weight_at(case.model, 1).detach().clone()
    one = Settings("", (1,), cov_weight=7.0)
    memit = edited(case, edits, "memit", one, distribution="single")
    emmet = edited(case, edits, "emmet", replace(one, cov_weight=2.0, alpha=3.5))
    assert_close(emmet, memit, before, 1e-6)

    bare = replace(one, contexts=(), alpha=0.0)  # with contexts ROME takes another average
    rome = edited(case, edits[:1], "rome", bare)
    assert_close(edited(case, edits[:1], "emmet", bare), rome, before, 1e-6)
    assert_close(edited(case, edits[:1], "emmet", replace(bare, cov_weight=0.1)), rome, before, 1e-6)

    emmet = edited(case, edits, "emmet", replace(one, alpha=0.0))
    parts = topology(case.model)
    module = parts.resolve(1, "down_proj")[1]
    keys = wanted_keys(case.model, module, case.tokenizer, edits, "half").double()
    now = [at_subject(case.model, parts.blocks[1], case.tokenizer, e, "{}", output=True) for e in edits]
    asked = torch.stack([target_of(e) for e in edits]) - torch.stack(now)
    assert float((keys @ (emmet - before).T - asked).norm() / asked.norm()) < 1e-5


@pytest.mark.usefixtures("given")
@pytest.mark.parametrize("method", ["memit", "alphaedit", "emmet"])
def test_later_batches_preserve_the_keys_of_edits_that_stand(method: str, case: Case, seed: int) -> None:
    edits, about = random_edits(6, seed), replace(METHODS[method], batch=2)
    wanted = case.published(edits[:5], about)
    in_one = case.editor(method, about, batch_size=2)
    result = in_one.edit(edits[:5])
    assert_written(case.model, wanted, case.before, TOLERANCE)
    assert [result.losses, result.delta.metadata["config"]["batch_size"]] == [[0.0] * 3, 2]
    result.revert()

    editor = case.editor(method, about)
    results = [editor.edit(edits[:2]), editor.edit(edits[2:4]), editor.edit(edits[4:5])]
    assert_written(case.model, wanted, case.before, TOLERANCE)
    results[2].revert()
    results[1].revert()
    later = editor.edit(edits[4:5])  # the batch that was taken back is forgotten
    assert_written(case.model, case.published([*edits[:2], edits[4]], about), case.before, TOLERANCE)
    later.revert()
    results[0].revert()
    assert same(case.model, case.before)
    editor.edit(edits[4:5])
    assert_written(case.model, case.published(edits[4:5], about), case.before, TOLERANCE)
