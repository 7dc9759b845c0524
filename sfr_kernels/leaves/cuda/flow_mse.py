"""The matching loss of each row and its gradient: csrc/flow_mse.cu."""

import torch
from torch import Tensor

from .. import FlowPath
from .flow_path import path_arguments
from .library import DTYPES, address, library, stream_of, threads_for
from .sums import column_sum, parts_for


def flow_mse(
    v: Tensor,  # (n, d), predicted velocity; holds dv afterwards if there is a coefficient
    path: FlowPath,
    coefficient: Tensor | None = None,  # (n,) float32; None: no gradient
) -> tuple[Tensor, Tensor | None]:
    """ℓ (n,) and db (d,) in float32."""
    (n, d), (targets, noise_id, anchor) = v.shape, path_arguments(path)
    parts, rows = parts_for(n)
    threads = threads_for(d, v.dtype, 256)
    blocks = -(-d * v.dtype.itemsize // (16 * threads))
    loss = torch.empty(n, blocks, dtype=torch.float32, device=v.device)
    coefficient = None if coefficient is None else coefficient.float().contiguous()
    partial = None if coefficient is None else loss.new_empty(1, parts, d)
    library().flow_mse(
        v.data_ptr(),
        DTYPES[v.dtype],
        *v.stride(),
        address(coefficient),
        loss.data_ptr(),
        address(partial),
        targets.data_ptr(),
        DTYPES[targets.dtype],
        targets.stride(0),
        noise_id.data_ptr(),
        anchor.data_ptr(),
        path.seed.data_ptr(),
        path.target_scale,
        path.source_std,
        n,
        d,
        parts,
        rows,
        threads,
        stream_of(v),
    )
    loss = loss.view(n) if blocks == 1 else loss.sum(1)
    return loss, None if partial is None else column_sum(partial)[0]
