"""Transformers for fastedit: the parts of a model, the packing of samples, the prefix cache."""

from fastedit.models.block_calls import BlockCalls
from fastedit.models.chat import special_tokens
from fastedit.models.continuations import Continuations
from fastedit.models.editable import check_own, load_suffix
from fastedit.models.encode import Span, encode, trailing, without_rows
from fastedit.models.fingerprint import fingerprint, fingerprint_of
from fastedit.models.forward import at_tokens, in_passes, observe, pass_tokens, resume, row_multiple, run_from_tokens
from fastedit.models.frozen import FrozenPart
from fastedit.models.fused import fuse
from fastedit.models.generation import generate_by, sampling
from fastedit.models.held_tokens import HeldTokens
from fastedit.models.hooks import Override, forwards, hooked, only_trainable, plain_state
from fastedit.models.mlp_tail import MLPTail
from fastedit.models.model import Model
from fastedit.models.offload import is_offloaded, load_weights, offloaded_prefix, read_weight
from fastedit.models.past import Past
from fastedit.models.per_sample import Factors, per_sample_updates
from fastedit.models.prefix_cache import PrefixCache
from fastedit.models.quantized import check_plain, has_quantized, plain, stored
from fastedit.models.scripts import LINE_ENDS, PARTICLES, SENTENCE_ENDS, hangul, in_word, joined, spaceless
from fastedit.models.self_check import SelfCheck, self_check
from fastedit.models.token_states import Budget, free_bytes
from fastedit.models.tokens import PairError, Rows, Samples, last_tokens, pack, prompt_samples, tokenize
from fastedit.models.topology import Topology, topology

__all__ = [
    "LINE_ENDS",
    "PARTICLES",
    "SENTENCE_ENDS",
    "BlockCalls",
    "Budget",
    "Continuations",
    "Factors",
    "FrozenPart",
    "HeldTokens",
    "MLPTail",
    "Model",
    "Override",
    "PairError",
    "Past",
    "PrefixCache",
    "Rows",
    "Samples",
    "SelfCheck",
    "Span",
    "Topology",
    "at_tokens",
    "check_own",
    "check_plain",
    "encode",
    "fingerprint",
    "fingerprint_of",
    "forwards",
    "free_bytes",
    "fuse",
    "generate_by",
    "hangul",
    "has_quantized",
    "hooked",
    "in_passes",
    "in_word",
    "is_offloaded",
    "joined",
    "last_tokens",
    "load_suffix",
    "load_weights",
    "observe",
    "offloaded_prefix",
    "only_trainable",
    "pack",
    "pass_tokens",
    "per_sample_updates",
    "plain",
    "plain_state",
    "prompt_samples",
    "read_weight",
    "resume",
    "row_multiple",
    "run_from_tokens",
    "sampling",
    "self_check",
    "spaceless",
    "special_tokens",
    "stored",
    "tokenize",
    "topology",
    "trailing",
    "without_rows",
]
