"""Forward takes a row a program. Backward takes a block of rows a program, makes dy, and leaves their sums for γ, β and
the bias to `column_sum`; the sums by row index read dy once more.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import empty_rows
from ..elementary import sigmoid
from ..sums.triton import blocks_for, column_sum, partial_sums, sum_by_index
from ..triton import access, kernel, launch, read, row_block, warps_for, write
from . import EPS


@triton.jit
def _read_y(y_ptr, y_col, bias_ptr, offs, D, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, VECTORS: tl.constexpr):
    y = read(y_ptr, y_col, offs, D, ROWS).to(tl.float32)
    if HAS_BIAS:
        y += read(bias_ptr, 1, offs, D, VECTORS).to(tl.float32)
    return y


@triton.jit
def _activate(y, mean, rstd, gamma, beta):
    z = gamma.to(tl.float32) * ((y - mean) * rstd) + beta.to(tl.float32)
    return z * sigmoid(z)


@kernel
def _norm_act_kernel(
    y_ptr, y_row, y_col, gamma_ptr, beta_ptr, bias_ptr, bias_row, index_ptr, residual_ptr, residual_row, residual_col,
    out_ptr, out_row, mean_ptr, rstd_ptr, D, eps,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ONE_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, VECTORS: tl.constexpr,
):  # fmt: skip
    """One row a program; a row of more than one block is read three times, from cache after the first."""
    row = tl.program_id(0).to(tl.int64)
    y_ptr += row * y_row
    out_ptr += row * out_row
    if HAS_BIAS:
        bias_ptr += tl.load(index_ptr + row).to(tl.int64) * bias_row
    if HAS_RESIDUAL:
        residual_ptr += row * residual_row
    offs = tl.arange(0, BLOCK)
    if ONE_BLOCK:
        # All that the row needs is on its way before its statistics are waited for.
        gamma, beta = read(gamma_ptr, 1, offs, D, VECTORS), read(beta_ptr, 1, offs, D, VECTORS)
        if HAS_RESIDUAL:
            residual = read(residual_ptr, residual_col, offs, D, ROWS)
        y = _read_y(y_ptr, y_col, bias_ptr, offs, D, HAS_BIAS, ROWS, VECTORS)
        if HAS_BIAS:
            write(y_ptr, y_col, offs, D, y, ROWS)
        mean = tl.sum(y, axis=0) / D
        centred = tl.where(offs < D, y - mean, 0.0)
        rstd = tl.rsqrt(tl.sum(centred * centred, axis=0) / D + eps)
        out = _activate(y, mean, rstd, gamma, beta)
        if HAS_RESIDUAL:
            out += residual.to(tl.float32)
        write(out_ptr, 1, offs, D, out, ROWS)
    else:
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        for first in range(0, D, BLOCK):
            total += _read_y(y_ptr, y_col, bias_ptr, first + offs, D, HAS_BIAS, ROWS, VECTORS)
        mean = tl.sum(total, axis=0) / D
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        for first in range(0, D, BLOCK):
            y = _read_y(y_ptr, y_col, bias_ptr, first + offs, D, HAS_BIAS, ROWS, VECTORS)
            centred = tl.where(first + offs < D, y - mean, 0.0)
            total += centred * centred
        rstd = tl.rsqrt(tl.sum(total, axis=0) / D + eps)
        for first in range(0, D, BLOCK):
            here = first + offs
            y = _read_y(y_ptr, y_col, bias_ptr, here, D, HAS_BIAS, ROWS, VECTORS)
            gamma, beta = read(gamma_ptr, 1, here, D, VECTORS), read(beta_ptr, 1, here, D, VECTORS)
            out = _activate(y, mean, rstd, gamma, beta)
            if HAS_RESIDUAL:
                out += read(residual_ptr, residual_col, here, D, ROWS).to(tl.float32)
            if HAS_BIAS:
                write(y_ptr, y_col, here, D, y, ROWS)
            write(out_ptr, 1, here, D, out, ROWS)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)


def norm_act(
    y: Tensor, gamma: Tensor, beta: Tensor, *,
    row_bias: Tensor | None = None, row_index: Tensor | None = None, residual: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    n, width = y.shape
    out = empty_rows(n, width, y.dtype, y.device)
    mean, rstd = (torch.empty(n, dtype=torch.float32, device=y.device) for _ in range(2))
    gamma, beta = gamma.contiguous(), beta.contiguous()
    if row_bias is not None and row_bias.stride(1) != 1:
        row_bias = row_bias.contiguous()
    # A whole row a program: one read of y. 32 bytes of it a thread, so that what a warp does once a row, such as the
    # sums over its threads, is spread over more.
    block = row_block(width)
    launch(
        _norm_act_kernel, (n,), y, *y.stride(), gamma, beta,
        row_bias, 0 if row_bias is None else row_bias.stride(0), None if row_index is None else row_index.contiguous(),
        residual, *((0, 0) if residual is None else residual.stride()), out, out.stride(0), mean, rstd, width, EPS,
        HAS_BIAS=row_bias is not None, HAS_RESIDUAL=residual is not None, ONE_BLOCK=width <= block, BLOCK=block,
        ROWS=access(width, y, residual, out), VECTORS=access(width, gamma, beta, row_bias),
        num_warps=warps_for(block, each=32 // y.element_size()),
    )  # fmt: skip
    return out, mean, rstd


@triton.jit
def _gates(y, dout, mean, rstd, gamma, beta):
    """x̂ and dz."""
    x_hat = (y.to(tl.float32) - mean) * rstd
    z = gamma * x_hat + beta
    sigma = sigmoid(z)
    return x_hat, dout.to(tl.float32) * sigma * (1.0 + z * (1.0 - sigma))


@kernel
def _moments_kernel(
    dout_ptr, dout_row, dout_col, y_ptr, y_row, y_col, gamma_ptr, beta_ptr, mean_ptr, rstd_ptr, moments_ptr, D,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, VECTORS: tl.constexpr,
):  # fmt: skip
    """mean(q) and mean(q x̂) of one row of more than one block."""
    row = tl.program_id(0).to(tl.int64)
    mean, rstd = tl.load(mean_ptr + row), tl.load(rstd_ptr + row)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    total_x = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, D, BLOCK):
        offs = first + tl.arange(0, BLOCK)
        gamma = read(gamma_ptr, 1, offs, D, VECTORS).to(tl.float32)
        beta = read(beta_ptr, 1, offs, D, VECTORS).to(tl.float32)
        y = read(y_ptr + row * y_row, y_col, offs, D, ROWS)
        dout = read(dout_ptr + row * dout_row, dout_col, offs, D, ROWS)
        x_hat, dz = _gates(y, dout, mean, rstd, gamma, beta)
        total += gamma * dz
        total_x += gamma * dz * x_hat
    tl.store(moments_ptr + 2 * row, tl.sum(total, axis=0) / D)
    tl.store(moments_ptr + 2 * row + 1, tl.sum(total_x, axis=0) / D)


@kernel
def _norm_act_backward_kernel(
    dout_ptr, dout_row, dout_col, y_ptr, y_row, y_col, gamma_ptr, beta_ptr, mean_ptr, rstd_ptr, moments_ptr,
    dy_ptr, dy_row, dy_col, partial_ptr, n, D, rows,
    SUM_DY: tl.constexpr, ONE_BLOCK: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, VECTORS: tl.constexpr,
):  # fmt: skip
    """Program (p, c): the p-th block of rows and the c-th of columns."""
    p, num_blocks = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gamma = read(gamma_ptr, 1, offs, D, VECTORS).to(tl.float32)
    beta = read(beta_ptr, 1, offs, D, VECTORS).to(tl.float32)
    dgamma = tl.zeros((BLOCK,), dtype=tl.float32)
    dbeta = tl.zeros((BLOCK,), dtype=tl.float32)
    db = tl.zeros((BLOCK,), dtype=tl.float32)
    first = p * rows
    stop = tl.minimum(first + rows, n)
    inverse = 1.0 / D
    y = read(y_ptr + first * y_row, y_col, offs, D, ROWS)
    dout = read(dout_ptr + first * dout_row, dout_col, offs, D, ROWS)
    mean, rstd = tl.load(mean_ptr + first), tl.load(rstd_ptr + first)
    for row in range(first, stop):
        # The next row is on its way while this one's sums are waited for.
        more = row + 1 < stop
        width = tl.where(more, D, 0)
        next_y = read(y_ptr + (row + 1) * y_row, y_col, offs, width, ROWS)
        next_dout = read(dout_ptr + (row + 1) * dout_row, dout_col, offs, width, ROWS)
        next_mean = tl.load(mean_ptr + row + 1, mask=more, other=0.0)
        next_rstd = tl.load(rstd_ptr + row + 1, mask=more, other=0.0)
        x_hat, dz = _gates(y, dout, mean, rstd, gamma, beta)
        q = gamma * dz
        if ONE_BLOCK:
            # One sum of pairs: half the barriers of two.
            mean_q, mean_qx = tl.split(tl.sum(tl.join(q, q * x_hat), axis=0) * inverse)
        else:
            mean_q = tl.load(moments_ptr + 2 * row)
            mean_qx = tl.load(moments_ptr + 2 * row + 1)
        dy = rstd * (q - mean_q - x_hat * mean_qx)
        write(dy_ptr + row * dy_row, dy_col, offs, D, dy, ROWS)
        dgamma += dz * x_hat
        dbeta += dz
        if SUM_DY:
            db += dy
        y, dout, mean, rstd = next_y, next_dout, next_mean, next_rstd
    padded = tl.cdiv(D, 16) * 16
    write(partial_ptr + p * padded, 1, offs, padded, dgamma, "whole")
    write(partial_ptr + (num_blocks + p) * padded, 1, offs, padded, dbeta, "whole")
    if SUM_DY:
        write(partial_ptr + (2 * num_blocks + p) * padded, 1, offs, padded, db, "whole")


def norm_act_backward(
    dout: Tensor, y: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, rstd: Tensor, *,
    row_index: Tensor | None = None, num_bias: int = 1, dy: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    n, width = y.shape
    dy = empty_rows(n, width, y.dtype, y.device) if dy is None else dy
    gamma, beta = gamma.contiguous(), beta.contiguous()
    # A whole row a program, as in norm_act; half its widest block, since three sums stay in registers between rows.
    block = row_block(width, most=2048)
    col_blocks = triton.cdiv(width, block)
    meta = dict(BLOCK=block, ROWS=access(width, dout, y, dy), VECTORS=access(width, gamma, beta))
    meta["num_warps"] = warps_for(block)
    num_blocks, rows = blocks_for(n)
    inputs = (dout, *dout.stride(), y, *y.stride(), gamma, beta, mean.contiguous(), rstd.contiguous())
    moments = None
    if col_blocks > 1:
        moments = mean.new_empty(n, 2)
        launch(_moments_kernel, (n,), *inputs, moments, width, **meta)
    sum_dy = row_index is None
    partial = partial_sums(3 if sum_dy else 2, num_blocks, width, y.device)
    launch(
        _norm_act_backward_kernel, (num_blocks, col_blocks), *inputs, moments, dy, *dy.stride(), partial,
        n, width, rows, SUM_DY=sum_dy, ONE_BLOCK=col_blocks == 1, **meta,
    )  # fmt: skip
    sums = column_sum(partial)[:, :width]
    return dy, sums[0], sums[1], sums[2:] if sum_dy else sum_by_index(dy, row_index, num_bias)
