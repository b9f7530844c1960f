"""Keys and values of tokens before the rows that run, and the attention of the rows to these and to themselves."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache


class _AppendedRows(torch.autograd.Function):
    """Write the last R columns of a buffer [B, heads, P + R, width]; ``torch.cat`` would copy all of it.

    Earlier content is overwritten, so autograd refuses a backward pass through an earlier call.
    """

    @staticmethod
    def forward(ctx: Any, new: Tensor, buffer: Tensor) -> Tensor:
        ctx.rows = new.shape[2]
        buffer[:, :, -ctx.rows :].copy_(new)
        return buffer.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0][:, :, -ctx.rows :], None


class _Attention(torch.autograd.Function):
    """softmax(scale · Q K_allᵀ + mask) V_all [B, heads, Q, width]; gradients only in Q and in the rows' own K, V.

    Q need not be R: transformers may pass the queries of one row that share a key head as several queries.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, own_keys: Tensor, _: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float
    ) -> Tensor:
        scores = (query @ keys.transpose(2, 3)).mul_(scale)  # [B, heads, Q, P + R]
        # finite like the models' own masks, so that a row without tokens does not become NaN
        if mask.dtype == torch.bool:
            scores.masked_fill_(~mask, torch.finfo(scores.dtype).min)
        else:
            scores += mask
        weights = torch.softmax(scores, 3, out=scores)
        output = weights @ values
        ctx.save_for_backward(query, keys, values, weights, output)
        ctx.scale, ctx.rows = scale, own_keys.shape[2]
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, keys, values, weights, output = ctx.saved_tensors
        (grad,), rows = grads, ctx.rows
        slope = (grad @ values.transpose(2, 3)).sub_((grad * output).sum(3, keepdim=True)).mul_(weights).mul_(ctx.scale)
        own_keys = slope[..., -rows:].transpose(2, 3) @ query
        own_values = weights[..., -rows:].transpose(2, 3) @ grad
        return slope @ keys, own_keys, own_values, None, None, None, None


class _Attend(TorchFunctionMode):
    """Interceptor of ``scaled_dot_product_attention`` calls that ``past`` can serve."""

    def __init__(self, past: Past) -> None:
        super().__init__()
        self._past = past

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.scaled_dot_product_attention:
            served = self._past.attend(*args, **(kwargs or {}))
            if served is not None:
                return served
        return func(*args, **(kwargs or {}))


class Past(DynamicCache):  # type: ignore[misc]  # transformers is not typed
    """A cache with the keys and values of the tokens before some rows; it does not grow.

    ``held`` has, for each block, keys and values [B, heads, P + R, width]; the last R columns are filled by a pass, one
    pass at a time. ``mask`` [B, P + R] bool is true at tokens and false at pads, for the tokens before and the rows.
    """

    def __init__(self, held: dict[int, tuple[Tensor, Tensor]], mask: Tensor, length: int) -> None:
        super().__init__()
        self.held, self.mask, self.length = held, mask, length
        self._given: tuple[Tensor, ...] = ()

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """All keys and values [B, heads, P + R, width] of a block, given those of its rows."""
        if not self.length:
            return keys, values
        buffers = self.held[layer_idx]
        put = cast(Callable[[Tensor, Tensor], Tensor], _AppendedRows.apply)
        given = put(keys, buffers[0]), put(values, buffers[1])
        self._given = *given, keys, values, *buffers
        return given

    def attention(self) -> AbstractContextManager[Any]:
        """On a CPU, a context in which attention uses plain matrix products: for few rows and many columns the fused
        kernel takes 2.5 times as long, mostly for gradients of columns that need none."""
        return _Attend(self) if self.length and self.mask.device.type == "cpu" else nullcontext()

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor | None:
        """The attention [B, heads, Q, width] to what ``update`` returned last; None for calls that are left to torch:
        other keys (if heads share them, they are copies), half precision, dropout, no mask."""
        given = self._given
        if not given or key is not given[0] or value is not given[1] or attn_mask is None or dropout_p:
            return None
        if not query.dtype == key.dtype == value.dtype or query.dtype not in (torch.float32, torch.float64):
            return None
        attend = cast(Callable[..., Tensor], _Attention.apply)
        return attend(query, *given[2:], attn_mask, query.shape[-1] ** -0.5 if scale is None else scale)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.length

    def get_mask_sizes(self, _: Any, layer_idx: int = 0) -> tuple[int, int]:
        return self.mask.shape[1], 0
