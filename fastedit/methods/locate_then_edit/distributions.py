"""How an edit is distributed over layers, whatever its objective (arXiv 2403.14236, section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence

from fastedit.errors import ConfigError
from fastedit.methods.locate_then_edit.config import DistributionName


def shares_of(distribution: DistributionName, layers: Sequence[int]) -> list[tuple[int, float]]:
    """The layers to write, ascending, each with the share that it takes of the residual that is left by then.

    single: one layer takes it all (ROME, EMMET). spread: layer i of L takes 1/(L − i) (MEMIT, arXiv 2210.07229,
    algorithm 1). endpoints: a spread over the first and the last layer only.

    Raises:
        ConfigError: no layers, layers that are not ascending, or more than one for "single".
    """
    if not layers or list(layers) != sorted(set(layers)):
        raise ConfigError(f"layers is {tuple(layers)}; give different layers from the lowest to the highest")
    if distribution == "single" and len(layers) > 1:
        raise ConfigError(
            f"layers is {tuple(layers)}, but a single layer is written; give one, or another distribution"
        )
    chosen = layers if distribution != "endpoints" else sorted({layers[0], layers[-1]})
    return [(layer, 1 / (len(chosen) - i)) for i, layer in enumerate(chosen)]
