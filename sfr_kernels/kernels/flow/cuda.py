"""The flow path of each row: csrc/flow_path.cu.

The matching loss of each row and its gradient: csrc/flow_mse.cu.
"""

import torch
from torch import Tensor

from .. import empty_rows
from ..cuda import DTYPES, address, library, stream_of, threads_for
from ..sums.cuda import column_sum, partial_sums, parts_for
from . import FlowPath


def path_arguments(path: FlowPath) -> tuple[Tensor, Tensor, Tensor]:
    """targets, noise_id and anchor as the kernels take them."""
    targets = path.targets if path.targets.dtype in DTYPES else path.targets.float()
    targets = targets if targets.stride(1) == 1 else targets.contiguous()
    return targets, path.noise_id.long().contiguous(), path.anchor.int().contiguous()


def flow_path(path: FlowPath, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x_t and u (n, d) in `dtype`."""
    targets, noise_id, anchor = path_arguments(path)
    n, d = noise_id.shape[0], targets.shape[1]
    times, time_index = path.times.float().contiguous(), path.time_index.int().contiguous()
    x_t, u = (empty_rows(n, d, dtype, targets.device) for _ in range(2))
    library().flow_path(
        x_t.data_ptr(),
        u.data_ptr(),
        DTYPES[dtype],
        x_t.stride(0),
        targets.data_ptr(),
        DTYPES[targets.dtype],
        targets.stride(0),
        times.data_ptr(),
        noise_id.data_ptr(),
        anchor.data_ptr(),
        time_index.data_ptr(),
        path.seed.data_ptr(),
        path.target_scale,
        path.source_std,
        n,
        d,
        stream_of(x_t),
    )
    return x_t, u


def flow_mse(
    v: Tensor,  # (n, d), predicted velocity; holds dv afterwards if there is a coefficient
    u: Tensor,  # (n, d), target velocity
    coefficient: Tensor | None = None,  # (n,) float32; None: no gradient
) -> tuple[Tensor, Tensor | None]:
    """ℓ (n,) and db (d,) in float32."""
    (n, d), u = v.shape, u.to(v.dtype)
    threads = threads_for(d, v.dtype, 256)
    parts, rows = parts_for(n, threads)
    blocks = -(-d * v.dtype.itemsize // (16 * threads))
    loss = torch.empty(n, blocks, dtype=torch.float32, device=v.device)
    coefficient = None if coefficient is None else coefficient.float().contiguous()
    partial = None if coefficient is None else partial_sums(1, parts, d, v.device)
    library().flow_mse(
        v.data_ptr(),
        DTYPES[v.dtype],
        *v.stride(),
        u.data_ptr(),
        *u.stride(),
        None,  # no bias: the product has it
        address(coefficient),
        loss.data_ptr(),
        address(partial),
        0 if partial is None else partial.stride(1),
        n,
        d,
        parts,
        rows,
        threads,
        stream_of(v),
    )
    loss = loss.view(n) if blocks == 1 else loss.sum(1)
    return loss, None if partial is None else column_sum(partial)[0]
