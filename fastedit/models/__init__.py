"""What fastedit knows of a transformer: its parts, the packing of its samples, its prefix cache."""

from fastedit.models.fingerprint import checksum, fingerprint
from fastedit.models.frozen import FrozenPart
from fastedit.models.generation import generate_by
from fastedit.models.low_rank import LowRank, Update, add_
from fastedit.models.partial import BlockCalls, HeldTokens, at_tokens, observe
from fastedit.models.past import Past
from fastedit.models.per_sample import Factors, per_sample_updates
from fastedit.models.prefix import Override, PrefixCache, full, in_passes, pass_tokens, resume
from fastedit.models.token_states import Budget, free_bytes
from fastedit.models.tokens import PairError, Rows, Samples, pack, tokenize
from fastedit.models.topology import Topology, no_autocast, topology

__all__ = [
    "BlockCalls",
    "Budget",
    "Factors",
    "FrozenPart",
    "HeldTokens",
    "LowRank",
    "Override",
    "PairError",
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
    "generate_by",
    "in_passes",
    "no_autocast",
    "observe",
    "pack",
    "pass_tokens",
    "per_sample_updates",
    "resume",
    "tokenize",
    "topology",
]
