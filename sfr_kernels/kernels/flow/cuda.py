"""The flow path of each row: csrc/flow_path.cu."""

import torch
from torch import Tensor

from .. import FlowPath, empty_rows
from .library import DTYPES, library, stream_of


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
