"""Sums of rows in a fixed order: csrc/sums.cu."""

import torch
from torch import Tensor

from .library import DTYPES, library, stream_of

# Row blocks of a sum over rows: about four for each of an H100's 132 multiprocessors, and few enough that the partial
# sums are small beside the rows.
MAX_PARTS = 512


def parts_for(n: int) -> tuple[int, int]:
    """Row blocks, and rows in each, for n rows."""
    rows = max(1, -(-n // MAX_PARTS))
    return -(-n // rows), rows


def column_sum(partial: Tensor) -> Tensor:  # (S, P, D) float32, contiguous
    """(S, D) float32."""
    sums, parts, width = partial.shape
    out = torch.empty(sums, width, dtype=torch.float32, device=partial.device)
    library().column_sum(
        partial.data_ptr(), DTYPES[partial.dtype], out.data_ptr(), sums, parts, width, stream_of(partial)
    )
    return out


def sum_by_index(
    x: Tensor,  # (n, D)
    index: Tensor,  # (n,) int32, in [0, M)
    size: int,  # M
) -> Tensor:
    """(M, D) float32: out[m] = Σ_{index = m} x."""
    (n, width), index = x.shape, index.int().contiguous()
    out = torch.empty(size, width, dtype=torch.float32, device=x.device)
    room = torch.empty(n + 2 * size, dtype=torch.int32, device=x.device)
    library().sum_by_index(
        x.data_ptr(),
        DTYPES[x.dtype],
        *x.stride(),
        index.data_ptr(),
        room.data_ptr(),
        room.data_ptr() + 4 * n,
        out.data_ptr(),
        n,
        width,
        size,
        stream_of(x),
    )
    return out
