"""Sums over rows without atomics, so that the order of additions depends on the shape and the index alone.

A kernel that goes through rows leaves the sums of its block of rows, (S, P, D), and `column_sum` adds those up in the
order of the blocks.

`sum_by_index` with few indices multiplies x by a one-hot matrix, made in registers, on tensor cores: its entries are 0
and 1, so the sums are as exact as their float32 additions. With many, it sorts the rows by index and adds each list of
rows in its order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton import access, kernel, launch, read, write

# Row blocks of a sum over rows: almost five programs for each of an H100's 132 multiprocessors, as many as fit, and few
# enough that the partial sums are small beside the rows.
MAX_BLOCKS = 640

MAX_ONE_HOT = 1024  # indices; above, the product costs more than sorting
PROGRAMS = 4 * 132  # of the product on an H100; where the result has fewer tiles, each takes a block of rows


def blocks_for(n: int) -> tuple[int, int]:
    """Row blocks, and rows in each, for n rows."""
    rows = max(1, triton.cdiv(n, MAX_BLOCKS))
    return triton.cdiv(n, rows), rows


def partial_sums(sums: int, num_blocks: int, width: int, device: torch.device) -> Tensor:
    """Uninitialised (S, P, width, rounded up to whole vectors, which kernels write)."""
    return torch.empty(sums, num_blocks, triton.cdiv(width, 16) * 16, dtype=torch.float32, device=device)


@kernel
def _column_sum_kernel(
    partial_ptr, out_ptr, P, D, VECTOR: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    D = D // VECTOR * VECTOR
    offs_d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_p = tl.arange(0, BLOCK_P)
    which = tl.program_id(1).to(tl.int64)
    base = tl.multiple_of(partial_ptr + which * P * D, 4 * VECTOR)
    total = tl.zeros((BLOCK_P, BLOCK_D), dtype=tl.float32)
    for first in range(0, P, BLOCK_P):
        p = first + offs_p
        mask = (p < P)[:, None] & (offs_d < D)[None, :]
        total += tl.load(base + p.to(tl.int64)[:, None] * D + offs_d[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + which * D + offs_d, tl.sum(total, axis=0), mask=offs_d < D)


def column_sum(partial: Tensor) -> Tensor:  # (S, P, D) float32, contiguous
    sums, num_blocks, width = partial.shape
    out = torch.empty(sums, width, dtype=torch.float32, device=partial.device)
    # Narrow column blocks, a 128-byte line each, for more programs; 128 row blocks at once, for more loads in flight.
    launch(
        _column_sum_kernel, (triton.cdiv(width, 32), sums), partial, out, num_blocks, width,
        VECTOR=1 if width % 4 else 4, BLOCK_P=128, BLOCK_D=32, num_warps=4,
    )  # fmt: skip
    return out


@kernel
def _one_hot_kernel(
    x_ptr, x_row, x_col, index_ptr, out_ptr, n, M, D, rows,
    ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, ACCESS: tl.constexpr,
):  # fmt: skip
    """One (BLOCK_M, BLOCK_D) tile of the sums of one block of rows."""
    block = tl.program_id(2)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    stop = tl.minimum(block * rows + rows, n)
    total = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    for first in range(block * rows, stop, ROWS):
        row = first + tl.arange(0, ROWS)
        index = tl.load(index_ptr + row, mask=row < stop, other=-1)
        width = tl.where(row < stop, D, 0)[:, None]
        x = read(x_ptr + row.to(tl.int64)[:, None] * x_row, x_col, offs, width, ACCESS)
        total = tl.dot((index[None, :] == m[:, None]).to(x.dtype), x, total, input_precision="ieee")
    padded = tl.cdiv(D, 16) * 16
    start = out_ptr + (block.to(tl.int64) * M + m)[:, None] * padded
    write(start, 1, offs, tl.where(m < M, padded, 0)[:, None], total, "whole")


def sum_by_index(x: Tensor, index: Tensor, size: int) -> Tensor:
    if size > MAX_ONE_HOT:
        return _sum_lists(x, index, size)
    (n, width), padded = x.shape, triton.cdiv(x.shape[1], 16) * 16
    how = access(width, x)
    # Tiles that do not spill.
    block_m, block_d = min(64, max(16, triton.next_power_of_2(size))), 128 if how == "whole" else 64
    tiles = triton.cdiv(size, block_m), triton.cdiv(width, block_d)
    depth = 64 if how == "whole" and x.element_size() == 2 else 32
    # Four steps of the loop a program at least.
    num_blocks = max(1, min(triton.cdiv(n, 4 * depth), PROGRAMS // (tiles[0] * tiles[1])))
    rows = triton.cdiv(triton.cdiv(n, num_blocks), depth) * depth
    out = torch.empty(1, num_blocks, size * padded, dtype=torch.float32, device=x.device)
    launch(
        _one_hot_kernel, (*tiles, num_blocks), x, *x.stride(), index.contiguous(), out, n, size, width, rows,
        ROWS=depth, BLOCK_M=block_m, BLOCK_D=block_d, ACCESS=how, num_warps=4,
    )  # fmt: skip
    return (out[0] if num_blocks == 1 else column_sum(out)).view(size, padded)[:, :width].contiguous()


@kernel
def _list_sum_kernel(
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


def _sum_lists(x: Tensor, index: Tensor, size: int) -> Tensor:
    width = x.shape[1]
    out = torch.empty(size, width, dtype=torch.float32, device=x.device)
    index, order = index.sort(stable=True)
    bounds = torch.searchsorted(index, torch.arange(size + 1, device=x.device, dtype=index.dtype))
    # Eight rows at once, so that the loads of a list wait for each other only every eighth row.
    launch(
        _list_sum_kernel, (size, triton.cdiv(width, 128)), x, *x.stride(), order, bounds, out, width,
        ROWS=8, BLOCK=128, ACCESS=access(width, x), num_warps=4,
    )  # fmt: skip
    return out
