"""The least update that does the same at the edits, in place of the one that training ended with.

Adam moves every weight by about its rate in every step, so that a trained update D also changes outputs that no edit
asks about. Of all updates with the same outputs at the edits' keys K, the refitted one changes the outputs on other
text least: it has the least ‖D' (C + τ)^½‖, with the second moment C of the layer's inputs, and is

    D' = D K (Kᵀ (C + τ)⁻¹ K + ρ)⁻¹ Kᵀ (C + τ)⁻¹.

This is the solve of MEMIT and EMMET, with what training has reached in place of their targets.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fastedit import ops
from fastedit.errors import EditError, TensorError
from fastedit.methods.batch import Batch
from fastedit.methods.keys import KeyWalk
from fastedit.methods.locft_bf.null_space import threshold
from fastedit.ops.cholesky import whiten
from fastedit.statistics.store import StatisticsStore

# measured on SmolLM2-135M and Gemma 3 270M (benchmarks/README.md)
_SHARE = 0.8  # of the directions that count as those of other text; gives τ
_RIDGE = 0.03  # ρ as a share of the mean of kᵀ (C + τ)⁻¹ k


@torch.no_grad()
def refit(
    batch: Batch,
    modules: Mapping[int, nn.Module],
    module: str,
    statistics: StatisticsStore,
    originals: Mapping[str, Tensor],
    updates: dict[str, Tensor],
) -> list[str]:
    """Replace the updates by refitted ones, layer by layer upwards, and write them to the model.

    The keys are those of each edit's subject in the bare prompt, and the mean with those in the batch's contexts.

    Args:
        modules: the edited linear maps by their blocks, upwards; `module` is their name in a block.
        originals: path of each weight -> its value before the edit.
        updates: path of each weight -> its fp32 update, which the model holds.

    Returns:
        No note; or one that says why it failed, and then the updates are as they were: training is not lost.
    """
    topology = batch.model.topology
    paths = {layer: f"{topology.resolve(layer, module)[0]}.weight" for layer in modules}
    trained = dict(updates)

    def write(layer: int, update: Tensor) -> None:
        updates[paths[layer]] = update
        modules[layer].get_parameter("weight").copy_(originals[paths[layer]].float() + update)

    try:
        with KeyWalk(batch, min(modules)) as walk:
            for layer, path in paths.items():
                walk.advance(layer)
                keys = torch.cat([walk.keys(module, bare=True), walk.keys(module)])
                turned = isinstance(modules[layer], Conv1D)
                D = trained[path].T if turned else trained[path]  # [h, d]
                D = least_update(D, keys, *statistics.eigen(layer))
                write(layer, D.T.contiguous() if turned else D)
    # no memory for it, or a matrix that is not positive definite
    except (EditError, TensorError, RuntimeError) as error:
        for layer, path in paths.items():
            write(layer, trained[path])
        return [f"the update is the trained one, and was not refitted: {error}"]
    return []


def least_update(D: Tensor, keys: Tensor, values: Tensor, vectors: Tensor) -> Tensor:
    """The update [h, d] that does to the keys what D does, and least to other inputs; in D's dtype.

    Args:
        keys: [n, d].
        values: [d] fp64, the eigenvalues of C; `vectors` [d, d] are its eigenvectors, the columns.
    """
    values = values.clamp(min=0)
    metric = values + threshold(values, _SHARE).clamp(min=1e-12 * float(values.max()))  # C of few tokens is singular
    factor = torch.linalg.cholesky((vectors * metric) @ vectors.T)
    K = keys.double()
    size = whiten(K, factor).square().sum(1).mean()
    left, right = ops.rank_k_update(K, K @ D.double().T, factor, ridge=_RIDGE * float(size))
    return (left @ right).to(D.dtype)
