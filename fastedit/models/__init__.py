"""What fastedit knows of a transformer: its parts, the packing of its samples, its prefix cache."""

from fastedit.models.fingerprint import checksum, fingerprint
from fastedit.models.frozen import FrozenPart
from fastedit.models.low_rank import LowRank, Update, add_
from fastedit.models.partial import BlockCalls, HeldTokens, at_tokens, observe
from fastedit.models.past import Past
from fastedit.models.per_sample import Factors, per_sample_updates
from fastedit.models.prefix import Override, PrefixCache, full, in_passes, pass_tokens, resume
from fastedit.models.token_states import Budget, free_bytes
from fastedit.models.tokens import Rows, Samples, pack, tokenize
from fastedit.models.topology import Topology, topology

__all__ = [
    "BlockCalls",
    "Budget",
    "Factors",
    "FrozenPart",
    "HeldTokens",
    "LowRank",
    "Override",
    "Past",
    "PrefixCache",
    "Rows",
    "Samples",
    "Topology",
    "Update",
    "add_",
    "at_tokens",
    "checksum",
    "fingerprint",
    "free_bytes",
    "full",
    "in_passes",
    "observe",
    "pack",
    "pass_tokens",
    "per_sample_updates",
    "resume",
    "tokenize",
    "topology",
]
