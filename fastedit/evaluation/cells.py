"""The measures of `fastedit locate` at one place."""

from __future__ import annotations

from dataclasses import dataclass

# measures of a cell; of these the ratios are after the edit / before it
SHARES = ("reliability", "generalization", "locality")
RATIOS = ("perplexity_ratio", "accuracy_ratio")


@dataclass(frozen=True)
class LocateCell:
    """LocFT-BF at one place.

    Shares are in 0 … 1, None where nothing was measured. `perplexity_ratio` and `accuracy_ratio` are the
    capability: perplexity on text and accuracy on questions after the edit, divided by those before it (None:
    not asked, or an accuracy of 0 before). `losses` holds the mean loss of each epoch, `seconds` the time of
    training, without the measuring.
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
        """Epochs run."""
        return len(self.losses)
