"""LayerNorm and SiLU, and their backward: csrc/norm_act.cu."""

import torch
from torch import Tensor

from .. import empty_rows
from ..cuda import DTYPES, address, library, stream_of, threads_for
from ..sums.cuda import column_sum, partial_sums, parts_for, sum_by_index
from . import EPS


def _vectors(gamma: Tensor, beta: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """gamma and beta in one dtype, float32 or that of y."""
    wanted = dtype if gamma.dtype == beta.dtype == dtype else torch.float32
    return gamma.to(wanted).contiguous(), beta.to(wanted).contiguous()


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
    (n, width), (gamma, beta) = y.shape, _vectors(gamma, beta, y.dtype)
    out = empty_rows(n, width, y.dtype, y.device)
    mean, rstd = (torch.empty(n, dtype=torch.float32, device=y.device) for _ in range(2))
    if row_bias is not None:
        row_bias = row_bias.float()
        row_bias = row_bias if row_bias.stride(1) == 1 else row_bias.contiguous()
    row_index = None if row_index is None else row_index.int().contiguous()
    residual = None if residual is None else residual.to(y.dtype)
    library().norm_act(
        y.data_ptr(),
        DTYPES[y.dtype],
        *y.stride(),
        None,  # no bias without an index: the product has it
        gamma.data_ptr(),
        beta.data_ptr(),
        DTYPES[gamma.dtype],
        address(row_bias),
        0 if row_bias is None else row_bias.stride(0),
        address(row_index),
        address(residual),
        *((0, 0) if residual is None else residual.stride()),
        out.data_ptr(),
        out.stride(0),
        mean.data_ptr(),
        rstd.data_ptr(),
        n,
        width,
        EPS,
        threads_for(width, y.dtype, 512),
        stream_of(y),
    )
    return out, mean, rstd


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
    (n, width), (gamma, beta) = y.shape, _vectors(gamma, beta, y.dtype)
    dout, mean, rstd = dout.to(y.dtype), mean.float().contiguous(), rstd.float().contiguous()
    dy = empty_rows(n, width, y.dtype, y.device) if dy is None else dy
    threads, sum_dy = threads_for(width, y.dtype, 256), row_index is None
    parts, rows = parts_for(n, threads)
    wide = width * y.dtype.itemsize > 16 * threads
    moments = mean.new_empty(n, 2) if wide else None
    partial = partial_sums(3 if sum_dy else 2, parts, width, y.device)
    library().norm_act_backward(
        dout.data_ptr(),
        DTYPES[y.dtype],
        *dout.stride(),
        y.data_ptr(),
        *y.stride(),
        None,
        gamma.data_ptr(),
        beta.data_ptr(),
        DTYPES[gamma.dtype],
        mean.data_ptr(),
        rstd.data_ptr(),
        address(moments),
        dy.data_ptr(),
        *dy.stride(),
        partial.data_ptr(),
        partial.stride(1),
        sum_dy,
        n,
        width,
        parts,
        rows,
        threads,
        stream_of(y),
    )
    *dbias, dgamma, dbeta = column_sum(partial)
    return dy, dgamma, dbeta, dbias[0][None] if sum_dy else sum_by_index(dy, row_index, num_bias)
