"""The second half of a sum over rows: partial sums of row blocks, (S, P, D) → (S, D), added in the order of the blocks.

The first half is a loop over rows inside a kernel, so that the order of additions depends on the shape alone: the same
call gives the same bits, with no atomics.

Sums of rows by an index: out[m] = Σ_{index = m} x, in an order that the shapes and the index fix.

Few m: the product of a one-hot matrix, made in registers, with x, on tensor cores: its factors are 0 and 1, so that a
sum is as exact as its float32 additions. Row blocks make partial sums, which column_sum.py adds up.
Many m: the rows are sorted by m, and each list of rows is added in its order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton import access, kernel, launch, read, write

# Row blocks of a sum over rows: almost five programs for each of an H100's 132 multiprocessors, as many as fit, and few
# enough that the partial sums are small beside the rows.
MAX_PARTS = 640


def parts_for(n: int) -> tuple[int, int]:
    """Row blocks, and rows in each, for n rows."""
    rows = max(1, triton.cdiv(n, MAX_PARTS))
    return triton.cdiv(n, rows), rows


def empty_partial(sums: int, parts: int, width: int, device: torch.device) -> Tensor:
    """Room for partial sums, (S, P, width or a few columns more of no meaning): kernels write whole vectors of them."""
    return torch.empty(sums, parts, triton.cdiv(width, 16) * 16, dtype=torch.float32, device=device)


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
        part = first + offs_p
        mask = (part < P)[:, None] & (offs_d < D)[None, :]
        total += tl.load(base + part.to(tl.int64)[:, None] * D + offs_d[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + which * D + offs_d, tl.sum(total, axis=0), mask=offs_d < D)


def column_sum(partial: Tensor) -> Tensor:  # (S, P, D) float32, contiguous
    """(S, D) float32."""
    sums, parts, width = partial.shape
    out = torch.empty(sums, width, dtype=torch.float32, device=partial.device)
    # Narrow column blocks, a 128-byte line each, for more programs; 128 parts at once, for more loads in flight.
    launch(
        _column_sum_kernel,
        (triton.cdiv(width, 32), sums),
        partial,
        out,
        parts,
        width,
        VECTOR=1 if width % 4 else 4,
        BLOCK_P=128,
        BLOCK_D=32,
        num_warps=4,
    )
    return out


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
