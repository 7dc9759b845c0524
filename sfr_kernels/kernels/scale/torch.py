"""What backward does with the gradients that forward left: factor · x in float32, rounded once."""

import torch
from torch import Tensor

_BLOCK_ELEMENTS = 1 << 22


def row_blocks(x: Tensor, elements: int = _BLOCK_ELEMENTS) -> list[slice]:
    """Blocks of rows small enough that a float32 copy of one costs nothing."""
    step = max(1, elements // max(1, x[:1].numel()))
    return [slice(start, start + step) for start in range(0, x.shape[0], step)]


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
