"""csrc/flow_path.cu and csrc/flow_mse.cu."""

import torch
from torch import Tensor

from .. import empty_rows
from ..cuda import DTYPES, library, stream_of, structure, threads_for
from ..sums.cuda import blocks_for, column_sum, partial_sums
from . import FlowPath

FlowPathArguments = structure(
    "FlowPathArguments",
    pointers="x_t u targets times noise_id anchor time_index seed",
    int64="row target_row n",
    int32="d targets_dtype",
    float32="target_scale source_std",
)
FlowMseArguments = structure(
    "FlowMseArguments",
    pointers="v u bias coefficient loss partial",
    int64="v_row v_col u_row u_col partial_row n",
    int32="d num_blocks rows threads",
)


def path_tensors(path: FlowPath) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """targets, times, noise_id, anchor and time_index, in the dtypes and strides that the kernels take."""
    targets = path.targets if path.targets.dtype in DTYPES else path.targets.float()
    targets = targets if targets.stride(1) == 1 else targets.contiguous()
    times, noise_id = path.times.float().contiguous(), path.noise_id.long().contiguous()
    return targets, times, noise_id, path.anchor.int().contiguous(), path.time_index.int().contiguous()


def flow_path(path: FlowPath, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    targets, times, noise_id, anchor, time_index = path_tensors(path)
    n, d = noise_id.shape[0], targets.shape[1]
    x_t, u = (empty_rows(n, d, dtype, targets.device) for _ in range(2))
    arguments = FlowPathArguments(
        x_t=x_t.data_ptr(), u=u.data_ptr(), row=x_t.stride(0), n=n, d=d,
        targets=targets.data_ptr(), targets_dtype=DTYPES[targets.dtype], target_row=targets.stride(0),
        times=times.data_ptr(), time_index=time_index.data_ptr(), anchor=anchor.data_ptr(),
        noise_id=noise_id.data_ptr(), seed=path.seed.data_ptr(),
        target_scale=path.target_scale, source_std=path.source_std,
    )  # fmt: skip
    library().flow_path(arguments, DTYPES[dtype], stream_of(x_t))
    return x_t, u


def flow_mse(v: Tensor, u: Tensor, coefficient: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    (n, d), u = v.shape, u.to(v.dtype)
    threads = threads_for(d, v.dtype, 256)
    num_blocks, rows = blocks_for(n, threads)
    col_blocks = -(-d * v.dtype.itemsize // (16 * threads))
    loss = torch.empty(n, col_blocks, dtype=torch.float32, device=v.device)
    arguments = FlowMseArguments(
        v=v.data_ptr(), v_row=v.stride(0), v_col=v.stride(1), u=u.data_ptr(), u_row=u.stride(0), u_col=u.stride(1),
        loss=loss.data_ptr(), n=n, d=d, num_blocks=num_blocks, rows=rows, threads=threads,
    )  # fmt: skip
    partial = None
    if coefficient is not None:
        coefficient, partial = coefficient.float().contiguous(), partial_sums(1, num_blocks, d, v.device)
        arguments.coefficient, arguments.partial = coefficient.data_ptr(), partial.data_ptr()
        arguments.partial_row = partial.stride(1)
    library().flow_mse(arguments, DTYPES[v.dtype], stream_of(v))
    loss = loss.view(n) if col_blocks == 1 else loss.sum(1)
    return loss, None if partial is None else column_sum(partial)[0]
