"""The operations: one public function for each, with its plain torch reference beside it."""

from fastedit.ops.cholesky import DependentKeysError, factor_covariance, find_dependent
from fastedit.ops.gated_activation import gated_activation
from fastedit.ops.localized import LocalizedAdam, localized
from fastedit.ops.localized_adam import localized_adam_
from fastedit.ops.rank_k_solve import null_space_update, rank_k_update
from fastedit.ops.rms_norm import rms_norm
from fastedit.ops.sequential import SequentialSolver
from fastedit.ops.syrk import syrk_
from fastedit.ops.target_cross_entropy import logits_buffer, target_cross_entropy

__all__ = [
    "DependentKeysError",
    "LocalizedAdam",
    "SequentialSolver",
    "factor_covariance",
    "find_dependent",
    "gated_activation",
    "localized",
    "localized_adam_",
    "logits_buffer",
    "null_space_update",
    "rank_k_update",
    "rms_norm",
    "syrk_",
    "target_cross_entropy",
]
