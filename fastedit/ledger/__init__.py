"""The ledger: all facts that were ever edited into a model, and the model's delta after each change."""

from fastedit.ledger.blame import Likeness
from fastedit.ledger.ledger import Ledger
from fastedit.ledger.records import Entry, Fact, Records

__all__ = ["Entry", "Fact", "Ledger", "Likeness", "Records"]
