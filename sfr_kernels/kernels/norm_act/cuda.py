"""csrc/norm_act.cu."""

import torch
from torch import Tensor

from .. import empty_rows
from ..cuda import DTYPES, address, library, stream_of, structure, threads_for
from ..sums.cuda import blocks_for, column_sum, partial_sums, sum_by_index
from . import EPS

NormActArguments = structure(
    "NormActArguments",
    pointers="y bias gamma beta row_bias row_index residual out mean rstd",
    int64="y_row y_col row_bias_row residual_row residual_col out_row n",
    int32="width vector_dtype threads",
    float32="eps",
)
NormActBackwardArguments = structure(
    "NormActBackwardArguments",
    pointers="dout y bias gamma beta mean rstd moments dy partial",
    int64="dout_row dout_col y_row y_col dy_row dy_col partial_row n",
    int32="width vector_dtype sum_dy num_blocks rows threads",
)


def _vectors(gamma: Tensor, beta: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """gamma and beta in one dtype, float32 or that of y."""
    wanted = dtype if gamma.dtype == beta.dtype == dtype else torch.float32
    return gamma.to(wanted).contiguous(), beta.to(wanted).contiguous()


def norm_act(
    y: Tensor, gamma: Tensor, beta: Tensor, *,
    row_bias: Tensor | None = None, row_index: Tensor | None = None, residual: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    (n, width), (gamma, beta) = y.shape, _vectors(gamma, beta, y.dtype)
    out = empty_rows(n, width, y.dtype, y.device)
    mean, rstd = (torch.empty(n, dtype=torch.float32, device=y.device) for _ in range(2))
    arguments = NormActArguments(
        y=y.data_ptr(), y_row=y.stride(0), y_col=y.stride(1),
        gamma=gamma.data_ptr(), beta=beta.data_ptr(), vector_dtype=DTYPES[gamma.dtype],
        out=out.data_ptr(), out_row=out.stride(0), mean=mean.data_ptr(), rstd=rstd.data_ptr(),
        n=n, width=width, eps=EPS, threads=threads_for(width, y.dtype, 512),
    )  # fmt: skip
    if row_bias is not None:
        row_bias, row_index = row_bias.float(), row_index.int().contiguous()
        row_bias = row_bias if row_bias.stride(1) == 1 else row_bias.contiguous()
        arguments.row_bias, arguments.row_index = row_bias.data_ptr(), row_index.data_ptr()
        arguments.row_bias_row = row_bias.stride(0)
    if residual is not None:
        residual = residual.to(y.dtype)
        arguments.residual = residual.data_ptr()
        arguments.residual_row, arguments.residual_col = residual.stride()
    library().norm_act(arguments, DTYPES[y.dtype], stream_of(y))
    return out, mean, rstd


def norm_act_backward(
    dout: Tensor, y: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, rstd: Tensor, *,
    row_index: Tensor | None = None, num_bias: int = 1, dy: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    (n, width), (gamma, beta) = y.shape, _vectors(gamma, beta, y.dtype)
    dout, mean, rstd = dout.to(y.dtype), mean.float().contiguous(), rstd.float().contiguous()
    dy = empty_rows(n, width, y.dtype, y.device) if dy is None else dy
    threads, sum_dy = threads_for(width, y.dtype, 256), row_index is None
    num_blocks, rows = blocks_for(n, threads)
    moments = mean.new_empty(n, 2) if width * y.dtype.itemsize > 16 * threads else None
    partial = partial_sums(3 if sum_dy else 2, num_blocks, width, y.device)
    arguments = NormActBackwardArguments(
        dout=dout.data_ptr(), dout_row=dout.stride(0), dout_col=dout.stride(1),
        y=y.data_ptr(), y_row=y.stride(0), y_col=y.stride(1),
        dy=dy.data_ptr(), dy_row=dy.stride(0), dy_col=dy.stride(1),
        gamma=gamma.data_ptr(), beta=beta.data_ptr(), vector_dtype=DTYPES[gamma.dtype],
        mean=mean.data_ptr(), rstd=rstd.data_ptr(), moments=address(moments),
        partial=partial.data_ptr(), partial_row=partial.stride(1), sum_dy=sum_dy,
        n=n, width=width, num_blocks=num_blocks, rows=rows, threads=threads,
    )  # fmt: skip
    library().norm_act_backward(arguments, DTYPES[y.dtype], stream_of(y))
    *dbias, dgamma, dbeta = column_sum(partial)
    return dy, dgamma, dbeta, dbias[0][None] if sum_dy else sum_by_index(dy, row_index, num_bias)
