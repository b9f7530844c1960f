"""Preserve old keys, memorize new pairs (A Unified Framework for Model Editing, arXiv 2403.14236, section 3).

An update preserves the outputs for old keys, whose second moment is C, and memorizes N new pairs: keys K, residuals
R = wanted − current outputs. The pairs are memorized by least squares against the preservation (MEMIT), as an equality
(EMMET; ROME for one pair), or by least squares in the null space of C (AlphaEdit, arXiv 2410.02355).
How an edit is distributed over layers is a separate choice, `distributions`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fastedit import ops
from fastedit.errors import ModelError
from fastedit.methods.locate_then_edit.config import LocateThenEditConfig, ObjectiveName
from fastedit.models import Factors
from fastedit.statistics.store import StatisticsStore


class Objective(Protocol):
    """The updates of one layer."""

    def update(self, keys: Tensor, residuals: Tensor) -> Factors:
        """ΔW = left [h, k] @ right [k, d] that writes residuals [N, h] at keys [N, d].

        The two least-squares objectives preserve the keys of earlier calls as well as C.
        """

    def update_each(self, keys: Tensor, residuals: Tensor) -> Factors:
        """Left [N, h, 1] and right [N, 1, d] of N problems with one pair each; earlier calls do not count."""

    def preserve(self, keys: Tensor) -> None:
        """Let the next updates preserve these keys [n, d], too, if the objective can."""


class LeastSquares:
    """ΔW = R Kᵀ (λC + K Kᵀ)⁻¹ (MEMIT, arXiv 2210.07229, equation 14)."""

    def __init__(self, cov_factor: Tensor, cov_weight: float) -> None:
        self._factor, self._ridge = cov_factor, cov_weight
        self._stream = ops.SequentialSolver(cov_factor, cov_weight)

    def update(self, keys: Tensor, residuals: Tensor) -> Factors:
        return self._stream.update(keys, residuals)

    def update_each(self, keys: Tensor, residuals: Tensor) -> Factors:
        return ops.rank_k_update(keys[:, None], residuals[:, None], self._factor, ridge=self._ridge)

    def preserve(self, keys: Tensor) -> None:
        self._stream.update(keys, keys.new_zeros(len(keys), 1))


class Equality:
    """ΔW = R (Kᵀ (λC)⁻¹ K + αI)⁻¹ Kᵀ (λC)⁻¹ (EMMET, arXiv 2403.14236, equation 9); ROME for N = 1, α = 0."""

    def __init__(self, cov_factor: Tensor, cov_weight: float, alpha: float) -> None:
        self._factor, self._ridge = cov_factor, alpha * cov_weight

    def update(self, keys: Tensor, residuals: Tensor) -> Factors:
        # keys of one subject may differ in the last digits, and an equality would separate them at any cost
        if self._ridge == 0 and (groups := ops.find_dependent(keys, self._factor)):
            raise ops.DependentKeysError(groups, None)
        return self._solve(keys, residuals)

    def update_each(self, keys: Tensor, residuals: Tensor) -> Factors:
        return self._solve(keys[:, None], residuals[:, None])

    def _solve(self, keys: Tensor, residuals: Tensor) -> Factors:
        return ops.rank_k_update(keys, residuals, self._factor, ridge=self._ridge, constraint="equality")

    def preserve(self, keys: Tensor) -> None:
        """Do nothing: the equality holds for the pairs of one batch."""


class NullSpace:
    """ΔW = R Kᵀ P ((K Kᵀ + Cp) P + l2·I)⁻¹; P projects on the null space of C (AlphaEdit, equation 12)."""

    def __init__(self, basis: Tensor, l2: float) -> None:
        self._basis, self._l2 = basis, l2
        self._stream = ops.SequentialSolver(torch.eye(basis.shape[1], dtype=basis.dtype, device=basis.device), l2)

    def update(self, keys: Tensor, residuals: Tensor) -> Factors:
        left, right = self._stream.update(keys.double() @ self._basis, residuals)
        return left, (right.double() @ self._basis.T).to(residuals.dtype)

    def update_each(self, keys: Tensor, residuals: Tensor) -> Factors:
        return ops.null_space_update(keys[:, None], residuals[:, None], self._basis, l2=self._l2)

    def preserve(self, keys: Tensor) -> None:
        self._stream.update(keys.double() @ self._basis, keys.new_zeros(len(keys), 1))


def moved(factors: Factors, keys: Tensor, to: Tensor) -> Factors:
    """Scale an update so that it gives at keys `to` [N, d] what it gave at `keys`; also for N updates of one pair."""
    left, right = factors
    wide = right.double()
    at_keys, at_to = wide @ keys.double().mT, wide @ to.double().mT
    return (left.double() @ torch.linalg.solve(at_to, at_keys, left=False)).to(left.dtype), right


@dataclass(frozen=True)
class ObjectiveType:
    """How an objective is made for a layer, from a factorization of its second moment and from a configuration.

    Attributes:
        factorization: factorizes the second moment of a layer; the result serves all edits of an Editor.
        memo: returns the factorization's name, and what it depends on beside the statistics.
        make: makes the objective, with nothing written yet.
        meets: whether updates meet each new pair, up to α, and are not only drawn to it.
        name_weight: weight of the inputs at names for a model without a published preset, as measured on SmolLM2-135M
            and Gemma 3 270M (benchmarks/README.md).
    """

    factorization: Callable[[StatisticsStore, int, LocateThenEditConfig], Tensor]
    memo: Callable[[LocateThenEditConfig], tuple[Any, ...]]
    make: Callable[[Tensor, LocateThenEditConfig], Objective]
    meets: bool = False
    name_weight: float = 0.0


def _given(value: float | None) -> float:
    assert value is not None  # a recipe has filled it
    return value


OBJECTIVES: dict[ObjectiveName, ObjectiveType] = {
    "least-squares": ObjectiveType(
        lambda statistics, layer, _: statistics.cholesky(layer),
        lambda _: ("Cholesky",),
        lambda factor, config: LeastSquares(factor, _given(config.cov_weight)),
        name_weight=1.0,
    ),
    "equality": ObjectiveType(
        lambda statistics, layer, _: statistics.cholesky(layer),
        lambda _: ("Cholesky",),
        lambda factor, config: Equality(factor, _given(config.cov_weight), _given(config.alpha)),
        meets=True,
    ),
    "null-space": ObjectiveType(
        lambda statistics, layer, config: null_space(*statistics.eigen(layer), config.null_threshold),
        lambda config: ("null space", config.null_threshold),
        lambda basis, config: NullSpace(basis, _given(config.l2)),
    ),
}


def null_space(values: Tensor, vectors: Tensor, threshold: float | None) -> Tensor:
    """The eigenvectors [d, r] of C, out of `vectors` [d, d], whose eigenvalues [d] are below a threshold.

    A threshold has the unit of the keys' squares, so it belongs to one model; None takes the lowest quarter.

    Raises:
        ModelError: no eigenvalue is below the threshold.
    """
    limit = float(values[len(values) // 4]) if threshold is None else threshold
    basis: Tensor = vectors[:, values < limit]
    if not basis.shape[1]:
        raise ModelError(
            f"no eigenvalue of C is below {limit:.3g}, the least is {float(values[0]):.3g}: C has no null space "
            "to write in; raise null_threshold"
        )
    return basis
