"""Sums of rows by an index: out[m] = Σ_{index = m} x, in an order that the shapes and the index fix.

Few m: the product of a one-hot matrix, made in registers, with x, on tensor cores: its factors are 0 and 1, so that a
sum is as exact as its float32 additions. Row blocks make partial sums, which column_sum.py adds up.
Many m: the rows are sorted by m, and each list of rows is added in its order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .column_sum import column_sum
from .launch import kernel, launch
from .row import access, read, write

# Above, a product with M rows costs more than sorting the index.
FEW = 1024
PROGRAMS = 4 * 132  # for an H100, of which each takes a block of rows where there are fewer tiles of the result


@kernel
def _one_hot_kernel(
    x_ptr, x_row, x_col, index_ptr, out_ptr, n, M, D, rows,
    ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, ACCESS: tl.constexpr,
):  # fmt: skip
    """One (BLOCK_M, BLOCK_D) tile of the sums of one block of rows."""
    part = tl.program_id(2)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    stop = tl.minimum(part * rows + rows, n)
    total = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    for first in range(part * rows, stop, ROWS):
        row = first + tl.arange(0, ROWS)
        index = tl.load(index_ptr + row, mask=row < stop, other=-1)
        width = tl.where(row < stop, D, 0)[:, None]
        x = read(x_ptr + row.to(tl.int64)[:, None] * x_row, x_col, offs, width, ACCESS)
        total = tl.dot((index[None, :] == m[:, None]).to(x.dtype), x, total, input_precision="ieee")
    padded = tl.cdiv(D, 16) * 16
    start = out_ptr + (part.to(tl.int64) * M + m)[:, None] * padded
    write(start, 1, offs, tl.where(m < M, padded, 0)[:, None], total, "whole")


@kernel
def _group_sum_kernel(
    x_ptr, x_row, x_col, order_ptr, bounds_ptr, out_ptr, D,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, ACCESS: tl.constexpr,
):  # fmt: skip
    """The sum of the rows order[bounds[m] : bounds[m + 1]]."""
    m = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    stop = tl.load(bounds_ptr + m + 1)
    total = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for first in range(tl.load(bounds_ptr + m), stop, ROWS):
        k = first + tl.arange(0, ROWS)
        row = tl.load(order_ptr + k, mask=k < stop, other=0)
        width = tl.where(k < stop, D, 0)[:, None]
        total += read(x_ptr + row[:, None] * x_row, x_col, offs[None, :], width, ACCESS).to(tl.float32)
    tl.store(out_ptr + m * D + offs, tl.sum(total, axis=0), mask=offs < D)


def sum_by_index(
    x: Tensor,  # (n, D)
    index: Tensor,  # (n,) int32, in [0, M)
    size: int,  # M
) -> Tensor:
    """(M, D) float32."""
    if size > FEW:
        return _sum_lists(x, index, size)
    (n, width), padded = x.shape, triton.cdiv(x.shape[1], 16) * 16
    how = access(width, x)
    # Tiles that do not spill.
    block, block_d = min(64, max(16, triton.next_power_of_2(size))), 128 if how == "whole" else 64
    tiles = triton.cdiv(size, block), triton.cdiv(width, block_d)
    depth = 64 if how == "whole" and x.element_size() == 2 else 32
    # Four steps of the loop a program at least.
    parts = max(1, min(triton.cdiv(n, 4 * depth), PROGRAMS // (tiles[0] * tiles[1])))
    out = torch.empty(1, parts, size * padded, dtype=torch.float32, device=x.device)
    launch(
        _one_hot_kernel,
        (*tiles, parts),
        x,
        *x.stride(),
        index.contiguous(),
        out,
        n,
        size,
        width,
        triton.cdiv(triton.cdiv(n, parts), depth) * depth,
        ROWS=depth,
        BLOCK_M=block,
        BLOCK_D=block_d,
        ACCESS=how,
        num_warps=4,
    )
    return (out[0] if parts == 1 else column_sum(out)).view(size, padded)[:, :width].contiguous()


def _sum_lists(x: Tensor, index: Tensor, size: int) -> Tensor:
    width = x.shape[1]
    out = torch.empty(size, width, dtype=torch.float32, device=x.device)
    index, order = index.sort(stable=True)
    bounds = torch.searchsorted(index, torch.arange(size + 1, device=x.device, dtype=index.dtype))
    # Eight rows at once, so that the loads of a list wait for each other only every eighth row.
    launch(
        _group_sum_kernel,
        (size, triton.cdiv(width, 128)),
        x,
        *x.stride(),
        order,
        bounds,
        out,
        width,
        ROWS=8,
        BLOCK=128,
        ACCESS=access(width, x),
        num_warps=4,
    )
    return out
