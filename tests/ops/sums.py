"""Totals of syrk_ that show what was touched, and how right they are."""

from __future__ import annotations

import torch
from torch import Tensor

from fastedit.ops import syrk

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def blank(d: int) -> Tensor:
    """A total of zeros with sevens above the diagonal: read or written, they would show (NaN would hide a sum)."""
    return torch.full((d, d), 7.0, dtype=torch.float64).triu(1)


def check(total: Tensor, rows: Tensor, cut_off: int = 0) -> None:
    """Every entry c_ij is that of rowsᵀ rows, within 2√n roundings of fp32, n products summed, at size √(c_ii c_jj).

    cut_off: sums that are not rounded, but cut off to fp32, besides.
    """
    tolerance = 2**-23 * (min(len(rows), syrk.CHUNK) ** 0.5 + cut_off)
    wanted = rows.double().T @ rows.double()
    norms = wanted.diagonal().sqrt().clamp(min=1e-300)
    error = (total - wanted).tril().abs() / norms / norms[:, None]
    assert error.max() <= tolerance
    assert total.triu(1).equal(blank(len(total)))
