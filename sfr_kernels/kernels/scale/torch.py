"""In torch operations, on blocks of rows where a copy in another dtype is needed."""

import torch
from torch import Tensor

from .. import row_blocks


def scale(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty_like(x, dtype=dtype)
    for block in row_blocks(x):
        out[block] = x[block].to(factor.dtype) * factor
    return out


def scale_(x: Tensor, factor: Tensor) -> Tensor:
    if factor.is_cpu and factor == 1:
        return x
    if x.dtype == factor.dtype:
        return x.mul_(factor)
    for block in row_blocks(x):
        x[block] = x[block].to(factor.dtype) * factor
    return x


def scatter_rows(x: Tensor, factor: Tensor, token_row: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.zeros(token_row.shape[0], x.shape[1], dtype=dtype, device=x.device)
    if x.shape[0] == 0:
        return out
    for block in row_blocks(out):
        row = token_row[block]
        here = (row >= 0) & (row < x.shape[0])
        rows = x[torch.where(here, row, 0)].to(factor.dtype) * factor
        out[block] = torch.where(here.unsqueeze(1), rows, 0.0)
    return out


def split(x: Tensor, size: int, dtype: torch.dtype, z: Tensor | None = None) -> Tensor:
    x = x.view(-1, size, x.shape[1]).sum(0)
    if z is not None:
        x = torch.ops.aten.silu_backward(x, z.to(x.dtype))
    hi = x.to(dtype)
    return hi if dtype.itemsize > 2 else torch.cat([hi, (x - hi).to(dtype)])
