"""The path in one write of x_t = x_0 + t u and of u, the loss and its gradient in one read of v and u."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import empty_rows
from ..philox.triton import gaussian
from ..sums.triton import blocks_for, column_sum, partial_sums
from ..triton import access, kernel, launch, read, row_block, warps_for, write
from . import FlowPath


@kernel
def _flow_path_kernel(
    x_t_ptr, u_ptr, out_row, targets_ptr, targets_row, times_ptr, noise_id_ptr, anchor_ptr, time_index_ptr, seed_ptr,
    target_scale, source_std, d,
    HAS_NOISE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, TARGETS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    offs = first + tl.arange(0, BLOCK)
    anchor, time_index = tl.load(anchor_ptr + row).to(tl.int64), tl.load(time_index_ptr + row)
    # Asked for here, and waited for once the noise is made.
    x_1 = read(targets_ptr + anchor * targets_row, 1, offs, d, TARGETS)
    t = tl.load(times_ptr + time_index).to(tl.float32)
    if HAS_NOISE:
        block = first // 4 + tl.arange(0, BLOCK // 4)
        x_0 = gaussian(tl.load(seed_ptr), tl.load(noise_id_ptr + row), block, source_std)
        u = x_1.to(tl.float32) * target_scale - x_0
        x_t = x_0 + t * u
    else:
        u = x_1.to(tl.float32) * target_scale
        x_t = t * u
    write(x_t_ptr + row * out_row, 1, offs, d, x_t, ROWS)
    write(u_ptr + row * out_row, 1, offs, d, u, ROWS)


def flow_path(path: FlowPath, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    n, d = path.noise_id.shape[0], path.targets.shape[1]
    targets = path.targets if path.targets.stride(1) == 1 else path.targets.contiguous()
    x_t, u = (empty_rows(n, d, dtype, targets.device) for _ in range(2))
    # Four counters a thread, sixteen coordinates: what a thread does once is spread over more, and registers are left
    # for many threads. Half of it where the ends of rows need some of them.
    block, rows = row_block(d, most=1024), access(d, x_t, u)
    vectors = (v.contiguous() for v in (path.times, path.noise_id, path.anchor, path.time_index))
    launch(
        _flow_path_kernel, (n, triton.cdiv(d, block)), x_t, u, u.stride(0), targets, targets.stride(0),
        *vectors, path.seed, path.target_scale, path.source_std, d,
        HAS_NOISE=path.source_std != 0, BLOCK=block, ROWS=rows, TARGETS=access(d, targets),
        num_warps=warps_for(block, each=16 if rows == "whole" else 8),
        contract=False,  # the noise has the interpreter's bits
    )  # fmt: skip
    return x_t, u


@kernel
def _flow_mse_kernel(
    v_ptr, v_row, v_col, u_ptr, u_row, u_col, coefficient_ptr, loss_ptr, partial_ptr, n, d, rows,
    NEED_GRAD: tl.constexpr, BLOCK: tl.constexpr, ACCESS: tl.constexpr,
):  # fmt: skip
    """Program (p, c): the p-th block of rows and the c-th of columns, each of which adds a part to its rows' ℓ."""
    p, col_blocks = tl.program_id(0).to(tl.int64), tl.num_programs(1)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    db = tl.zeros((BLOCK,), dtype=tl.float32)
    first = p * rows
    stop = tl.minimum(first + rows, n)
    inverse = 1.0 / d
    v = read(v_ptr + first * v_row, v_col, offs, d, ACCESS)
    u = read(u_ptr + first * u_row, u_col, offs, d, ACCESS)
    coefficient = tl.load(coefficient_ptr + first) if NEED_GRAD else 0.0
    for row in range(first, stop):
        # The next row is on its way while this one's sum is waited for.
        more = row + 1 < stop
        width = tl.where(more, d, 0)
        next_v = read(v_ptr + (row + 1) * v_row, v_col, offs, width, ACCESS)
        next_u = read(u_ptr + (row + 1) * u_row, u_col, offs, width, ACCESS)
        e = v.to(tl.float32) - u.to(tl.float32)
        tl.store(loss_ptr + row * col_blocks + tl.program_id(1), tl.sum(e * e, axis=0) * inverse)
        if NEED_GRAD:
            dv = e * (2.0 * inverse * coefficient)
            write(v_ptr + row * v_row, v_col, offs, d, dv, ACCESS)
            db += dv
            coefficient = tl.load(coefficient_ptr + row + 1, mask=more, other=0.0)
        v, u = next_v, next_u
    if NEED_GRAD:
        padded = tl.cdiv(d, 16) * 16
        write(partial_ptr + p * padded, 1, offs, padded, db, "whole")


def flow_mse(v: Tensor, u: Tensor, coefficient: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    n, d = v.shape
    num_blocks, rows = blocks_for(n)
    # A row of at most 2048 columns is one block, so its ℓ is whole.
    block = row_block(d, most=2048)
    col_blocks = triton.cdiv(d, block)
    loss = torch.empty(n, col_blocks, dtype=torch.float32, device=v.device)
    need_grad = coefficient is not None
    coefficient = coefficient.contiguous() if need_grad else None
    partial = partial_sums(1, num_blocks, d, v.device) if need_grad else None
    launch(
        _flow_mse_kernel, (num_blocks, col_blocks), v, *v.stride(), u, *u.stride(), coefficient, loss, partial,
        n, d, rows, NEED_GRAD=need_grad, BLOCK=block, ACCESS=access(d, v, u), num_warps=warps_for(block),
    )  # fmt: skip
    loss = loss.view(n) if col_blocks == 1 else loss.sum(1)
    return loss, column_sum(partial)[0, :d] if need_grad else None
