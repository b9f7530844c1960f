"""Cross-entropy at target tokens with a frozen head: the loss and its gradient, without keeping logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastedit.errors import TensorError
from fastedit.ops.library import define
from fastedit.ops.registry import Backend, Call, Option, choose, no_triton, only_interpreted, register

_CHUNK_LOGITS = 1 << 25
"""Logits in memory at once (128 MiB in fp32), in one buffer for all chunks. Products of few rows are slow: on a CPU
166 rows of 50,304 logits ran at 3/4 of the rate of 500."""


LogitLoss = Callable[[Tensor], tuple[Tensor, Tensor]]
"""A function of fp32 logits [Q, V] that returns the loss of each row [Q] and its gradient in these logits [Q, V]."""


def logits_buffer(head_weight: Tensor, n: int, n_others: int = 0) -> Tensor:
    """Allocate a buffer [chunk, V] for the logits of n rows, or of a chunk of them: the ``scratch`` of a loop's calls.

    It has room for at least the last ``n_others`` rows, those of ``others``, which are always taken at once.
    """
    V = len(head_weight)
    return head_weight.new_empty(max(1, n_others, min(_chunk_rows(V), n)), V)


def _chunk_rows(V: int) -> int:
    """Rows of a chunk; whole tiles of a product, 128 rows, where it has as many."""
    rows = _CHUNK_LOGITS // V
    return rows - rows % 128 if rows > 128 else rows


def target_cross_entropy(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    sample_weight: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    others: LogitLoss | None = None,
    per_row: bool = False,
    scratch: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Compute a weighted sum of negative log-likelihoods of labels, and its gradient in the hidden states.

    loss = Σ_r w_r · (logsumexp(z_r) − z_r[label_r]) with z = cap(hidden @ head_weightᵀ + bias). Loss and
    gradient take two matrix products together, because the head is frozen; rows are taken in chunks.

    The loss can be differentiated: if hidden requires a gradient, `loss.backward()` passes on grad_hidden times the
    gradient of the loss. Nothing else gets a gradient.

    Args:
        hidden: [R, h], after the final norm, fp32, bf16 or fp16; with ``others`` [R + Q, h].
        head_weight: [V, h], same dtype.
        labels: [R] int64.
        sample_weight: [R] fp32, the weight w of each row (1/(B·n_b) averages over samples, 1/R over tokens); with
            ``others`` [R + Q].
        bias: [V] or None.
        softcap: c of cap(z) = c·tanh(z/c); None for no cap.
        others: the loss of Q more rows after those with labels, from their logits z (which it may overwrite). They
            share the products: on a CPU products of few rows take nearly as long as those of many.
        per_row: return the terms of the sum, for callers that watch parts of a batch.
        scratch: a `logits_buffer`, which is overwritten; None allocates one. Its rows are the size of a chunk. Reusing
            one in a loop avoids page faults on a CPU, a tenth or more of the time.
        backend: see `fastedit.ops.registry`; ConfigError if it cannot serve.

    Returns:
        (loss [], or [R + Q] with per_row, fp32; grad_hidden [R + Q, h], dtype of hidden). Both are on the device of
        hidden, without a synchronization.

    Raises:
        TensorError: shapes, dtypes or devices do not fit, or a label is not a row of the head (checked on a CPU only,
            because a GPU would have to be waited for); rows without labels but no ``others``; a ``scratch`` that is too
            small for these rows; from `loss.backward()`, if tensors other than hidden require a gradient (names all).
    """
    with torch.no_grad():
        if torch.compiler.is_compiling() and others is None:
            losses, grad = _operator(
                hidden, head_weight, labels, sample_weight, bias=bias, softcap=softcap, backend=backend
            )
        else:
            losses, grad = _of_rows(hidden, head_weight, labels, sample_weight, bias, softcap, others, scratch, backend)
    if torch.is_grad_enabled() and hidden.requires_grad:
        tensors = {"head_weight": head_weight, "sample_weight": sample_weight, "bias": bias}
        unfrozen = [name for name, x in tensors.items() if x is not None and x.requires_grad]
        return _Loss.apply(hidden, losses, grad, per_row, unfrozen), grad  # type: ignore[no-untyped-call]
    return losses if per_row else losses.sum(), grad


class _Loss(torch.autograd.Function):
    """The loss as an autograd function; its gradient in `hidden` is already computed."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, losses: Tensor, grad: Tensor, per_row: bool, unfrozen: list[str]) -> Tensor:
        ctx.save_for_backward(grad)
        ctx.unfrozen = unfrozen
        return losses.clone() if per_row else losses.sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.unfrozen:
            raise TensorError(
                f"target_cross_entropy gives a gradient to hidden alone, and these require one: "
                f"{', '.join(ctx.unfrozen)}; freeze them by requires_grad_(False), or give them with .detach()"
            )
        (grad,) = ctx.saved_tensors
        return (grad * (slope[:, None] if slope.ndim else slope)).to(grad.dtype), None, None, None, None


def _of_rows(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    sample_weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    others: LogitLoss | None,
    scratch: Tensor | None,
    backend: Backend,
) -> tuple[Tensor, Tensor]:
    """Loss [R + Q] and gradient [R + Q, h], by the backend for this call."""
    _check(hidden, head_weight, labels, sample_weight, bias)
    R, V, Q = len(labels), len(head_weight), len(hidden) - len(labels)
    if Q < 0 or (Q > 0 and others is None):
        raise TensorError(f"labels is [{R}] for hidden {list(hidden.shape)}: rows without labels need others")
    if scratch is not None and len(scratch) < Q:
        raise TensorError(f"scratch is {list(scratch.shape)}, fewer than the {Q} rows of others; see logits_buffer")
    if choose("target_cross_entropy", backend, device=hidden.device, dtype=hidden.dtype, R=R, V=V) == "triton":
        from fastedit.kernels.target_cross_entropy import target_cross_entropy as kernel

        losses, grad = kernel(hidden[:R], head_weight, labels, sample_weight[:R], bias=bias, softcap=softcap)
        if others is not None:
            of_others = _in_chunks(
                hidden[R:], head_weight, labels[:0], sample_weight[R:], bias, softcap, others, scratch
            )
            losses, grad = torch.cat([losses, of_others[0]]), torch.cat([grad, of_others[1]])
    else:
        try:
            losses, grad = _in_chunks(hidden, head_weight, labels, sample_weight, bias, softcap, others, scratch)
        except RuntimeError:
            if labels.device.type == "cpu":  # it has looked them up
                _check_labels(labels, V)
            raise
    return losses, grad


def _in_chunks(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    sample_weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    others: LogitLoss | None,
    scratch: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Loss [R + Q] and gradient [R + Q, h]."""
    losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
    grad = torch.empty_like(hidden)
    if scratch is None:
        scratch = logits_buffer(head_weight, len(hidden), len(hidden) - len(labels))
    for stop in range(len(hidden), 0, -len(scratch)):  # from the end, so that one chunk has all rows of `others`
        r = slice(max(0, stop - len(scratch)), stop)
        weight, label = sample_weight[r].float(), labels[r]
        z = torch.mm(hidden[r], head_weight.T, out=scratch[: len(weight)])  # [r, V]
        if bias is not None:
            z += bias
        z = z.float()
        slope = None
        if softcap is not None:
            z = z.div_(softcap).tanh_()
            slope = 1 - z.square()
            z = z.mul_(softcap)
        labelled, unlabelled = z.split([len(label), len(weight) - len(label)])
        losses[r][: len(label)] = _to_slope(labelled, label)
        if others is not None and len(unlabelled):
            losses[r][len(label) :], unlabelled[:] = others(unlabelled)
        losses[r] *= weight
        if slope is not None:
            z *= slope
        grad[r] = (z.to(hidden.dtype) @ head_weight) * weight[:, None]
    return losses, grad


def _to_slope(z: Tensor, label: Tensor) -> Tensor:
    """The negative log-likelihood [r] of the labels; overwrites the logits z [r, V] with its gradient."""
    largest, argmax = z.max(1, keepdim=True)
    at_label = z.gather(1, label[:, None])
    torch.softmax(z, 1, out=z)
    # log Σ exp z = largest − log p(largest), where p is at least 1/V
    loss = (largest - z.gather(1, argmax).log() - at_label)[:, 0]
    # subtract the label before the product: after it, half precision would lose the rest for p close to 1
    z.scatter_add_(1, label[:, None], z.new_full((len(label), 1), -1))
    return loss


def _check(hidden: Tensor, head_weight: Tensor, labels: Tensor, sample_weight: Tensor, bias: Tensor | None) -> None:
    if hidden.ndim != 2 or head_weight.ndim != 2 or hidden.shape[1] != head_weight.shape[1]:
        shapes = f"{list(hidden.shape)} and {list(head_weight.shape)}"
        raise TensorError(f"hidden and head_weight are {shapes}, expected [R, h] and [V, h]")
    if not hidden.is_floating_point() or hidden.dtype != head_weight.dtype:
        dtypes = f"{hidden.dtype} and {head_weight.dtype}"
        raise TensorError(f"hidden and head_weight are {dtypes}, expected one floating-point dtype")
    V = len(head_weight)
    if labels.ndim != 1 or labels.dtype != torch.int64:
        raise TensorError(f"labels is {list(labels.shape)} {labels.dtype}, expected [R] torch.int64")
    for name, x, n in (("sample_weight", sample_weight, len(hidden)), ("bias", bias, V)):
        if x is not None and list(x.shape) != [n]:
            raise TensorError(f"{name} is {list(x.shape)}, expected [{n}]")
    for name, x in (("head_weight", head_weight), ("labels", labels), ("sample_weight", sample_weight), ("bias", bias)):
        if x is not None and x.device != hidden.device:
            raise TensorError(f"{name} is on {x.device}, hidden on {hidden.device}; bring them to one device")


def _check_labels(labels: Tensor, V: int) -> None:
    bad = ((labels < 0) | (labels >= V)).nonzero()[:, 0].tolist()
    if bad:
        raise TensorError(
            f"labels[{bad[0]}] is {int(labels[bad[0]])}, expected 0 to {V - 1}, a row of head_weight ({len(bad)} of "
            f"{len(labels)} are none); leave rows without a label out"
        ) from None


def _cannot(call: Call) -> str | None:
    served = call.dtype in (torch.bfloat16, torch.float16, torch.float32)
    return no_triton(call) or (None if served else f"hidden is {call.dtype}, not bfloat16, float16 or float32")


def _slower(call: Call) -> str | None:
    if reason := only_interpreted(call):
        return reason
    if call.dtype == torch.float32:
        return "fp32 products take three passes on tensor cores"
    # estimates, not measured: torch reads the head twice per chunk, the kernel twice per call, but in more launches
    R, V = call.sizes.get("R", 0), call.sizes.get("V", 0)
    if R > 0 and V > 0 and (rows := _chunk_rows(V)) >= R:
        return f"R = {R} is at most {rows}, one chunk for torch"
    return None


register("target_cross_entropy", Option("triton", _cannot, _slower))


def _serve(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    sample_weight: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    losses, grad = _of_rows(hidden, head_weight, labels, sample_weight, bias, softcap, None, None, backend)
    return losses, grad.contiguous()


def _fake(hidden: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    return hidden.new_empty(hidden.shape[0], dtype=torch.float32), hidden.new_empty(hidden.shape)


_operator = define(
    "target_cross_entropy(Tensor hidden, Tensor head_weight, Tensor labels, Tensor sample_weight, *, "
    'Tensor? bias=None, float? softcap=None, str backend="auto") -> (Tensor, Tensor)',
    _serve,
    _fake,
)
