"""Sums of rows by an index: out[m] = Σ_{index = m} x, the rows of an m added in their own order.

A counting sort without a counter: the program of m reads the whole index, which is small, twice. First it counts the
rows of smaller m, which is where its own begin; then it lists them. A second kernel adds up each list.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch


@triton.jit
def _group_kernel(index_ptr, order_ptr, start_ptr, stop_ptr, n, BLOCK: tl.constexpr):
    """order[start[m] : stop[m]] = the rows of m, ascending."""
    m = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    smaller = tl.zeros((BLOCK,), dtype=tl.int32)
    for first in range(0, n, BLOCK):
        row = first + offs
        smaller += (tl.load(index_ptr + row, mask=row < n, other=m) < m).to(tl.int32)
    place = tl.sum(smaller, axis=0)
    tl.store(start_ptr + m, place)
    for first in range(0, n, BLOCK):
        row = first + offs
        mine = (tl.load(index_ptr + row, mask=row < n, other=-1) == m).to(tl.int32)
        tl.store(order_ptr + place + tl.cumsum(mine, axis=0) - 1, row, mask=mine > 0)
        place += tl.sum(mine, axis=0)
    tl.store(stop_ptr + m, place)


@triton.jit
def _group_sum_kernel(
    x_ptr, x_row, x_col, order_ptr, start_ptr, stop_ptr, out_ptr, D, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    stop = tl.load(stop_ptr + m)
    total = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for first in range(tl.load(start_ptr + m), stop, ROWS):
        k = first + tl.arange(0, ROWS)
        row = tl.load(order_ptr + k, mask=k < stop, other=0).to(tl.int64)
        at = x_ptr + row[:, None] * x_row + offs.to(tl.int64)[None, :] * x_col
        total += tl.load(at, mask=(k < stop)[:, None] & (offs < D)[None, :], other=0.0).to(tl.float32)
    tl.store(out_ptr + m * D + offs, tl.sum(total, axis=0), mask=offs < D)


def sum_by_index(
    x: Tensor,  # (n, D)
    index: Tensor,  # (n,) int32, in [0, M)
    size: int,  # M
) -> Tensor:
    """(M, D) float32."""
    (n, width), index = x.shape, index.contiguous()
    out = torch.empty(size, width, dtype=torch.float32, device=x.device)
    order = torch.empty(n, dtype=torch.int32, device=x.device)
    start, stop = torch.empty(2, size, dtype=torch.int32, device=x.device)
    launch(_group_kernel, (size,), index, order, start, stop, n, BLOCK=1024, num_warps=4)
    # Eight rows at once, so that the loads of a list, a couple of dozen rows, wait for each other only three times.
    launch(
        _group_sum_kernel,
        (size, triton.cdiv(width, 128)),
        x,
        *x.stride(),
        order,
        start,
        stop,
        out,
        width,
        ROWS=8,
        BLOCK=128,
        num_warps=4,
    )
    return out
