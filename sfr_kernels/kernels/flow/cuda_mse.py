"""The matching loss of each row and its gradient: csrc/flow_mse.cu."""

import torch
from torch import Tensor

from .library import DTYPES, address, library, stream_of, threads_for
from .sums import column_sum, partial_sums, parts_for


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
