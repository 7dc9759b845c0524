"""An experiment: the head's output layer and the matching loss in one kernel, so that v is never stored.

v = a W_oᵀ + b_o      e = v − u      ℓ = mean_j e²      dv = (2 / d) · coefficient · e

Against cuBLAS followed by `flow_mse` it saves writing and reading v, 4 bytes an element in 16 bit: at n = 6144, D = d =
1024 that is 25 MB, 8 µs of an H100, which a product slower than cuBLAS's soon loses. The package uses cuBLAS and
`flow_mse` until a measurement says otherwise.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sfr_kernels.kernels.sums.triton import column_sum
from sfr_kernels.kernels.triton import launch


@triton.jit
def _fused_output_kernel(
    a_ptr, w_ptr, b_ptr, u_ptr, dv_ptr, loss_ptr, partial_ptr, coefficient_ptr, n, d, D,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One (BLOCK_N, BLOCK_D) tile of v; neighbouring programs share their rows of a."""
    columns = tl.cdiv(d, BLOCK_D)
    tile_n, tile_d = (tl.program_id(0) // columns).to(tl.int64), tl.program_id(0) % columns
    offs_n, offs_d = tile_n * BLOCK_N + tl.arange(0, BLOCK_N), tile_d * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_n, mask_d = offs_n < n, offs_d < d
    offs_k = tl.arange(0, BLOCK_K)
    a_at = a_ptr + offs_n[:, None] * D + offs_k[None, :]
    w_at = w_ptr + offs_d.to(tl.int64)[None, :] * D + offs_k[:, None]
    v = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    for first in range(0, D, BLOCK_K):
        inside = offs_k < D - first
        a = tl.load(a_at + first, mask=mask_n[:, None] & inside[None, :], other=0.0)
        w = tl.load(w_at + first, mask=mask_d[None, :] & inside[:, None], other=0.0)
        v = tl.dot(a, w, v, input_precision="ieee")
    v += tl.load(b_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)[None, :]

    mask = mask_n[:, None] & mask_d[None, :]
    u = tl.load(u_ptr + offs_n[:, None] * d + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
    e = tl.where(mask, v - u, 0.0)
    tl.store(loss_ptr + offs_n * columns + tile_d, tl.sum(e * e, axis=1) / d, mask=mask_n)
    dv = e * (2.0 / d * tl.load(coefficient_ptr + offs_n, mask=mask_n, other=0.0))[:, None]
    tl.store(dv_ptr + offs_n[:, None] * d + offs_d[None, :], dv.to(dv_ptr.dtype.element_ty), mask=mask)
    tl.store(partial_ptr + tile_n * d + offs_d, tl.sum(dv, axis=0), mask=mask_d)


def fused_output(
    a: Tensor,  # (n, D), contiguous
    w_out: Tensor,  # (d, D), contiguous
    b_out: Tensor,  # (d,)
    u: Tensor,  # (n, d), contiguous
    coefficient: Tensor,  # (n,) float32
    tile: tuple[int, int, int, int, int] = (128, 64, 64, 8, 3),  # rows, columns, depth, warps, stages
) -> tuple[Tensor, Tensor, Tensor]:
    """ℓ (n,) float32, dv (n, d) in a's dtype, db (d,) float32."""
    (n, width), d = a.shape, w_out.shape[0]
    rows, columns, depth, warps, stages = tile
    row_tiles, column_tiles = triton.cdiv(n, rows), triton.cdiv(d, columns)
    dv = torch.empty(n, d, dtype=a.dtype, device=a.device)
    loss = torch.empty(n, column_tiles, dtype=torch.float32, device=a.device)
    partial = loss.new_empty(1, row_tiles, d)
    sizes = dict(BLOCK_N=rows, BLOCK_D=columns, BLOCK_K=depth, num_warps=warps, num_stages=stages)
    grid = (row_tiles * column_tiles,)
    launch(_fused_output_kernel, grid, a, w_out, b_out, u, dv, loss, partial, coefficient, n, d, width, **sizes)
    return loss.sum(1), dv, column_sum(partial)[0]
