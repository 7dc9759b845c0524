"""LayerNorm and SiLU, with the row bias before and the residual after:

    y ← y + row_bias[row_index]      x̂ = (y − μ) ρ      z = γ x̂ + β      out = SiLU(z) (+ residual)

Backward (norm_act_backward.py) needs y, μ and ρ.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch, row_block, warps_for

EPS = 1e-5  # of torch.nn.LayerNorm


@triton.jit
def _load_y(y_ptr, y_col, bias_ptr, D, first, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):
    offs = first + tl.arange(0, BLOCK)
    mask = offs < D
    y = tl.load(y_ptr + offs.to(tl.int64) * y_col, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        y += tl.load(bias_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    return y, offs, mask


@triton.jit
def _finish(
    y, mean, rstd, offs, mask, y_ptr, y_col, gamma_ptr, beta_ptr, residual_ptr, residual_col, out_ptr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """From a block of y and the row's statistics to the block of out."""
    wide = offs.to(tl.int64)
    gamma = tl.load(gamma_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    beta = tl.load(beta_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    z = gamma * ((y - mean) * rstd) + beta
    out = z * tl.sigmoid(z)
    if HAS_RESIDUAL:
        out += tl.load(residual_ptr + wide * residual_col, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        tl.store(y_ptr + wide * y_col, y.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(out_ptr + offs, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _norm_act_kernel(
    y_ptr, y_row, y_col, gamma_ptr, beta_ptr, bias_ptr, index_ptr, residual_ptr, residual_row, residual_col,
    out_ptr, mean_ptr, rstd_ptr, D, eps,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ONE_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row a program; a row of more than one block is read three times, from cache after the first."""
    row = tl.program_id(0).to(tl.int64)
    y_ptr += row * y_row
    out_ptr += row * D
    if HAS_BIAS:
        bias_ptr += tl.load(index_ptr + row).to(tl.int64) * D
    if HAS_RESIDUAL:
        residual_ptr += row * residual_row
    if ONE_BLOCK:
        y, offs, mask = _load_y(y_ptr, y_col, bias_ptr, D, 0, HAS_BIAS, BLOCK)
        mean = tl.sum(y, axis=0) / D
        centred = tl.where(mask, y - mean, 0.0)
        rstd = 1.0 / tl.sqrt_rn(tl.sum(centred * centred, axis=0) / D + eps)
        _finish(
            y, mean, rstd, offs, mask, y_ptr, y_col, gamma_ptr, beta_ptr, residual_ptr, residual_col, out_ptr,
            HAS_BIAS, HAS_RESIDUAL,
        )  # fmt: skip
    else:
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        for first in range(0, D, BLOCK):
            y, offs, mask = _load_y(y_ptr, y_col, bias_ptr, D, first, HAS_BIAS, BLOCK)
            total += y
        mean = tl.sum(total, axis=0) / D
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        for first in range(0, D, BLOCK):
            y, offs, mask = _load_y(y_ptr, y_col, bias_ptr, D, first, HAS_BIAS, BLOCK)
            centred = tl.where(mask, y - mean, 0.0)
            total += centred * centred
        rstd = 1.0 / tl.sqrt_rn(tl.sum(total, axis=0) / D + eps)
        for first in range(0, D, BLOCK):
            y, offs, mask = _load_y(y_ptr, y_col, bias_ptr, D, first, HAS_BIAS, BLOCK)
            _finish(
                y, mean, rstd, offs, mask, y_ptr, y_col, gamma_ptr, beta_ptr, residual_ptr, residual_col, out_ptr,
                HAS_BIAS, HAS_RESIDUAL,
            )  # fmt: skip
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
    out = torch.empty(n, width, dtype=y.dtype, device=y.device)
    mean, rstd = (torch.empty(n, dtype=torch.float32, device=y.device) for _ in range(2))
    # A whole row a program: one read of y, eight elements a thread.
    block = row_block(width)
    launch(
        _norm_act_kernel,
        (n,),
        y,
        *y.stride(),
        gamma.contiguous(),
        beta.contiguous(),
        None if row_bias is None else row_bias.contiguous(),
        None if row_index is None else row_index.contiguous(),
        residual,
        *((0, 0) if residual is None else residual.stride()),
        out,
        mean,
        rstd,
        width,
        EPS,
        HAS_BIAS=row_bias is not None,
        HAS_RESIDUAL=residual is not None,
        ONE_BLOCK=width <= block,
        BLOCK=block,
        num_warps=warps_for(block),
    )
    return out, mean, rstd
