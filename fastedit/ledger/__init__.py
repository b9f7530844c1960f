"""The ledger: all facts that were ever edited into a model, and the model after each change of them."""

from fastedit.ledger.blame import Likeness
from fastedit.ledger.ledger import Ledger
from fastedit.ledger.records import Entry, Fact, Records

__all__ = ["Entry", "Fact", "Ledger", "Likeness", "Records"]
