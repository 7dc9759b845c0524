"""What backward does with the gradients that forward left: factor · x in float32, rounded once.

`scatter_rows` also puts compact rows back in their places: every token looks for its row, so that the zeros of the
others are written in the same pass.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch

# 16 programs of 128 threads fill a multiprocessor, of which a chip has at most 160.
MAX_PROGRAMS = 16 * 160


@triton.jit
def _scale_kernel(x_ptr, factor_ptr, out_ptr, numel, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < numel
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offs, (x * tl.load(factor_ptr)).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _scale_in_place_kernel(x_ptr, factor_ptr, numel, BLOCK: tl.constexpr):
    """Few programs with many blocks each, so that those that find nothing to do are soon gone."""
    factor = tl.load(factor_ptr)
    if factor != 1.0:
        first = tl.program_id(0).to(tl.int64) * BLOCK
        for start in range(first, numel, tl.num_programs(0) * BLOCK):
            offs = start + tl.arange(0, BLOCK)
            mask = offs < numel
            x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
            tl.store(x_ptr + offs, (x * factor).to(x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _scatter_rows_kernel(x_ptr, factor_ptr, token_row_ptr, out_ptr, n, H, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(token_row_ptr + token).to(tl.int64)
    here = (row >= 0) & (row < n)
    x = tl.load(x_ptr + row * H + offs, mask=tl.where(here, offs < H, False), other=0.0).to(tl.float32)
    x = tl.where(here, x * tl.load(factor_ptr), 0.0)
    tl.store(out_ptr + token * H + offs, x.to(out_ptr.dtype.element_ty), mask=offs < H)


def scale(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """x · factor in `dtype`; x contiguous, factor a zero-dim float32."""
    out = torch.empty_like(x, dtype=dtype)
    # 16 bytes a thread, twice; blocks no larger, so that small tensors still fill the chip.
    launch(_scale_kernel, (triton.cdiv(x.numel(), 2048),), x, factor, out, x.numel(), BLOCK=2048, num_warps=4)
    return out


def scale_(x: Tensor, factor: Tensor) -> Tensor:
    """x *= factor, and x; x contiguous, factor a zero-dim float32. Where it is 1, x is not even read."""
    programs = min(triton.cdiv(x.numel(), 4096), MAX_PROGRAMS)
    launch(_scale_in_place_kernel, (programs,), x, factor, x.numel(), BLOCK=4096, num_warps=4)
    return x


def scatter_rows(
    x: Tensor,  # (n, H), contiguous
    factor: Tensor,  # zero-dim float32
    token_row: Tensor,  # (N,) int32, the row of each token; −1, or n and more: none
    dtype: torch.dtype,
) -> Tensor:
    """(N, H) in `dtype`: factor · x[token_row], and zero where there is no row."""
    tokens, width = token_row.shape[0], x.shape[1]
    out = torch.empty(tokens, width, dtype=dtype, device=x.device)
    block = min(2048, max(16, triton.next_power_of_2(width)))  # as in `scale`
    launch(
        _scatter_rows_kernel,
        (tokens, triton.cdiv(width, block)),
        x,
        factor,
        token_row.contiguous(),
        out,
        x.shape[0],
        width,
        BLOCK=block,
        num_warps=4,
    )
    return out
