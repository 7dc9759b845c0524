"""Backward of LayerNorm and SiLU (DESIGN section 2), from y, μ and ρ:

    x̂ = (y − μ) ρ      z = γ x̂ + β      dz = dout σ(z)(1 + z(1 − σ(z)))      q = γ dz
    dy = ρ (q − mean(q) − x̂ mean(q x̂))      dγ = Σ dz x̂      dβ = Σ dz      d row_bias[m] = Σ_{row_index = m} dy

One kernel makes dy and the partial sums of row blocks, a second adds those up (column_sum.py). The sums per row index
read dy once more (index_sum.py).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .column_sum import column_sum, parts_for
from .index_sum import sum_by_index
from .launch import launch, row_block, warps_for


@triton.jit
def _gates(
    row, offs, mask, dout_ptr, dout_row, dout_col, y_ptr, y_row, y_col, mean_ptr, rstd_ptr, gamma, beta,
):  # fmt: skip
    """x̂ and dz of a block of one row, and ρ."""
    wide = offs.to(tl.int64)
    y = tl.load(y_ptr + row * y_row + wide * y_col, mask=mask, other=0.0).to(tl.float32)
    dout = tl.load(dout_ptr + row * dout_row + wide * dout_col, mask=mask, other=0.0).to(tl.float32)
    rstd = tl.load(rstd_ptr + row)
    x_hat = (y - tl.load(mean_ptr + row)) * rstd
    z = gamma * x_hat + beta
    sigma = tl.sigmoid(z)
    return x_hat, dout * sigma * (1.0 + z * (1.0 - sigma)), rstd


@triton.jit
def _moments_kernel(
    dout_ptr, dout_row, dout_col, y_ptr, y_row, y_col, gamma_ptr, beta_ptr, mean_ptr, rstd_ptr, moments_ptr, D,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """mean(q) and mean(q x̂) of one row of more than one block."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    total_x = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, D, BLOCK):
        offs = first + tl.arange(0, BLOCK)
        mask = offs < D
        gamma = tl.load(gamma_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        beta = tl.load(beta_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        x_hat, dz, _ = _gates(
            row, offs, mask, dout_ptr, dout_row, dout_col, y_ptr, y_row, y_col, mean_ptr, rstd_ptr, gamma, beta
        )
        total += gamma * dz
        total_x += gamma * dz * x_hat
    tl.store(moments_ptr + 2 * row, tl.sum(total, axis=0) / D)
    tl.store(moments_ptr + 2 * row + 1, tl.sum(total_x, axis=0) / D)


@triton.jit
def _norm_act_backward_kernel(
    dout_ptr, dout_row, dout_col, y_ptr, y_row, y_col, gamma_ptr, beta_ptr, mean_ptr, rstd_ptr, moments_ptr,
    dy_ptr, dy_row, dy_col, partial_ptr, n, D, rows,
    SUM_DY: tl.constexpr, ONE_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (p, c): rows p · rows … and the c-th block of columns."""
    part, parts = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < D
    gamma = tl.load(gamma_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    beta = tl.load(beta_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    dgamma = tl.zeros((BLOCK,), dtype=tl.float32)
    dbeta = tl.zeros((BLOCK,), dtype=tl.float32)
    db = tl.zeros((BLOCK,), dtype=tl.float32)
    row = part * rows
    for _ in range(tl.minimum(rows, n - row)):
        x_hat, dz, rstd = _gates(
            row, offs, mask, dout_ptr, dout_row, dout_col, y_ptr, y_row, y_col, mean_ptr, rstd_ptr, gamma, beta
        )
        q = gamma * dz
        if ONE_BLOCK:
            mean_q = tl.sum(q, axis=0) / D
            mean_qx = tl.sum(q * x_hat, axis=0) / D
        else:
            mean_q = tl.load(moments_ptr + 2 * row)
            mean_qx = tl.load(moments_ptr + 2 * row + 1)
        dy = rstd * (q - mean_q - x_hat * mean_qx)
        tl.store(dy_ptr + row * dy_row + offs.to(tl.int64) * dy_col, dy.to(dy_ptr.dtype.element_ty), mask=mask)
        dgamma += dz * x_hat
        dbeta += dz
        if SUM_DY:
            db += dy
        row += 1
    base = partial_ptr + part * D + offs
    tl.store(base, dgamma, mask=mask)
    tl.store(base + parts.to(tl.int64) * D, dbeta, mask=mask)
    if SUM_DY:
        tl.store(base + 2 * parts.to(tl.int64) * D, db, mask=mask)


def norm_act_backward(
    dout: Tensor,  # (n, D)
    y: Tensor,  # (n, D), as norm_act left it
    gamma: Tensor,
    beta: Tensor,
    mean: Tensor,  # (n,)
    rstd: Tensor,  # (n,)
    *,
    row_index: Tensor | None = None,  # (n,) int32
    num_bias: int = 1,  # M
    dy: Tensor | None = None,  # (n, D), where to write dy; may be y or dout itself
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dy (n, D) in y's dtype; dγ, dβ (D,) and d row_bias (M, D) in float32; Σ dy (1, D) where row_index is None."""
    n, width = y.shape
    dy = torch.empty(n, width, dtype=y.dtype, device=y.device) if dy is None else dy
    gamma, beta = gamma.contiguous(), beta.contiguous()
    # A whole row a program, as in norm_act; half its widest block, since three sums stay in registers between rows.
    block = row_block(width, most=2048)
    blocks, meta = triton.cdiv(width, block), dict(BLOCK=block, num_warps=warps_for(block))
    parts, rows = parts_for(n)
    inputs = (dout, *dout.stride(), y, *y.stride(), gamma, beta, mean.contiguous(), rstd.contiguous())
    moments = None
    if blocks > 1:
        moments = mean.new_empty(n, 2)
        launch(_moments_kernel, (n,), *inputs, moments, width, **meta)
    sum_dy = row_index is None
    partial = mean.new_empty(3 if sum_dy else 2, parts, width)
    launch(
        _norm_act_backward_kernel,
        (parts, blocks),
        *inputs,
        moments,
        dy,
        *dy.stride(),
        partial,
        n,
        width,
        rows,
        SUM_DY=sum_dy,
        ONE_BLOCK=blocks == 1,
        **meta,
    )
    sums = column_sum(partial)
    if sum_dy:
        return dy, sums[0], sums[1], sums[2:]
    return dy, sums[0], sums[1], sum_by_index(dy, row_index, num_bias)
