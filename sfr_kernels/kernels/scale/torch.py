"""What backward does with the gradients that forward left: factor · x in float32, rounded once.

A float32 matrix as two of 16 bit, x = hi + lo, so that products with it are nearly those of float32:

x ← Σ parts of x (· SiLU'(z))      hi = round(x)      lo = round(x − hi)
"""

import torch
from torch import Tensor

from .. import row_blocks


def scale(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """x · factor in `dtype`; factor is a zero-dim float32 (float64 for float64 x)."""
    out = torch.empty_like(x, dtype=dtype)
    for block in row_blocks(x):
        out[block] = x[block].to(factor.dtype) * factor
    return out


def scale_(x: Tensor, factor: Tensor) -> Tensor:
    """x *= factor, and x; untouched where the factor is 1."""
    if factor.is_cpu and factor == 1:
        return x
    if x.dtype == factor.dtype:
        return x.mul_(factor)
    for block in row_blocks(x):
        x[block] = x[block].to(factor.dtype) * factor
    return x


def scatter_rows(
    x: Tensor,  # (n, H)
    factor: Tensor,  # zero-dim
    token_row: Tensor,  # (N,) int32, the row of each token; −1, or n and more: none
    dtype: torch.dtype,
) -> Tensor:
    """(N, H) in `dtype`: factor · x[token_row], and zero where there is no row."""
    out = torch.zeros(token_row.shape[0], x.shape[1], dtype=dtype, device=x.device)
    if x.shape[0] == 0:
        return out
    for block in row_blocks(out):
        row = token_row[block]
        here = (row >= 0) & (row < x.shape[0])
        rows = x[torch.where(here, row, 0)].to(factor.dtype) * factor
        out[block] = torch.where(here.unsqueeze(1), rows, 0.0)
    return out


def split(
    x: Tensor,  # (j · M, d) float32: j parts of M rows, to be added
    size: int,  # M
    dtype: torch.dtype,
    z: Tensor | None = None,  # (M, d)
) -> Tensor:
    """[hi; lo] (2M, d) in a `dtype` of 16 bit; else x alone, (M, d)."""
    x = x.view(-1, size, x.shape[1]).sum(0)
    if z is not None:
        x = torch.ops.aten.silu_backward(x, z.to(x.dtype))
    hi = x.to(dtype)
    return hi if dtype.itemsize > 2 else torch.cat([hi, (x - hi).to(dtype)])
