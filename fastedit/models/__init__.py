"""What fastedit knows of a transformer: its parts, the packing of its samples, its prefix cache."""

from fastedit.models.partial import BlockCalls, HeldTokens, observe
from fastedit.models.prefix import Budget, PrefixCache, free_bytes, full, resume
from fastedit.models.tokens import Rows, Samples, pack, tokenize
from fastedit.models.topology import Topology, topology

__all__ = [
    "BlockCalls",
    "Budget",
    "HeldTokens",
    "PrefixCache",
    "Rows",
    "Samples",
    "Topology",
    "free_bytes",
    "full",
    "observe",
    "pack",
    "resume",
    "tokenize",
    "topology",
]
