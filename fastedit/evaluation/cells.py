"""The measures of `fastedit locate` at one place."""

from __future__ import annotations

from dataclasses import dataclass

# measures of a cell; ratios are after the edit / before it
SHARES = ("reliability", "generalization", "locality")
RATIOS = ("perplexity_ratio", "accuracy_ratio")


@dataclass(frozen=True)
class LocateCell:
    """The results of LocFT-BF at one place.

    Shares are in 0 … 1, None if not measured. `perplexity_ratio` and `accuracy_ratio` show general capability:
    perplexity on text and accuracy on questions after the edit, divided by those before it (None: not asked, or an
    accuracy of 0 before). `losses` holds the mean loss of each epoch, `seconds` the time of training, without the
    measurements.
    """

    block: int
    module: str
    reliability: float | None
    generalization: float | None
    locality: float | None
    perplexity_ratio: float | None
    accuracy_ratio: float | None
    lr: float
    losses: list[float]
    seconds: float

    @property
    def epochs(self) -> int:
        """Number of epochs that were run."""
        return len(self.losses)
