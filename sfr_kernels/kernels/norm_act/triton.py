"""LayerNorm and SiLU, with the row bias before and the residual after:

    y ← y + row_bias[row_index]      x̂ = (y − μ) ρ      z = γ x̂ + β      out = SiLU(z) (+ residual)

Backward (norm_act_backward.py) needs y, μ and ρ.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import empty_rows
from .elementary import sigmoid
from .launch import kernel, launch, row_block, warps_for
from .row import access, read, write

EPS = 1e-5  # of torch.nn.LayerNorm


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
    y: Tensor,  # (n, D); replaced by y + row_bias[row_index] where there is one
    gamma: Tensor,  # (D,)
    beta: Tensor,  # (D,)
    *,
    row_bias: Tensor | None = None,  # (M, D)
    row_index: Tensor | None = None,  # (n,) int32
    residual: Tensor | None = None,  # (n, D)
) -> tuple[Tensor, Tensor, Tensor]:
    """out (n, D) in y's dtype; μ and ρ (n,) in float32."""
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
        _norm_act_kernel,
        (n,),
        y,
        *y.stride(),
        gamma,
        beta,
        row_bias,
        0 if row_bias is None else row_bias.stride(0),
        None if row_index is None else row_index.contiguous(),
        residual,
        *((0, 0) if residual is None else residual.stride()),
        out,
        out.stride(0),
        mean,
        rstd,
        width,
        EPS,
        HAS_BIAS=row_bias is not None,
        HAS_RESIDUAL=residual is not None,
        ONE_BLOCK=width <= block,
        BLOCK=block,
        ROWS=access(width, y, residual, out),
        VECTORS=access(width, gamma, beta, row_bias),
        num_warps=warps_for(block, each=32 // y.element_size()),
    )
    return out, mean, rstd
