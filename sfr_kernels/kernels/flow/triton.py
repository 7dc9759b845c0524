"""The flow path of each row, from its identity, anchor and time:

x_0 = source_std · ε(seed, noise_id)        x_1 = target_scale · targets[anchor]
u = x_1 − x_0                               x_t = x_0 + t u

Both are rounded once, from float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import FlowPath, empty_rows
from .launch import kernel, launch, row_block, warps_for
from .philox import gaussian
from .row import access, read, write


@kernel
def _flow_path_kernel(
    x_t_ptr, u_ptr, out_row, targets_ptr, targets_row, times_ptr, noise_id_ptr, anchor_ptr, time_index_ptr, seed_ptr,
    target_scale, source_std, d,
    HAS_NOISE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, TARGETS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    offs = first + tl.arange(0, BLOCK)
    anchor, time_index = tl.load(anchor_ptr + row).to(tl.int64), tl.load(time_index_ptr + row)
    # Not waited for before the noise is made.
    x_1 = read(targets_ptr + anchor * targets_row, 1, offs, d, TARGETS)
    t = tl.load(times_ptr + time_index).to(tl.float32)
    if HAS_NOISE:
        block = first // 4 + tl.arange(0, BLOCK // 4)
        x_0 = gaussian(tl.load(seed_ptr), tl.load(noise_id_ptr + row), block, source_std)
        u = x_1.to(tl.float32) * target_scale - x_0
        x_t = x_0 + t * u
    else:
        u = x_1.to(tl.float32) * target_scale
        x_t = t * u
    write(x_t_ptr + row * out_row, 1, offs, d, x_t, ROWS)
    write(u_ptr + row * out_row, 1, offs, d, u, ROWS)


def flow_path(path: FlowPath, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x_t and u (n, d) in `dtype`."""
    n, d = path.noise_id.shape[0], path.targets.shape[1]
    targets = path.targets if path.targets.stride(1) == 1 else path.targets.contiguous()
    x_t, u = (empty_rows(n, d, dtype, targets.device) for _ in range(2))
    # Four counters a thread, sixteen coordinates: what a thread does once is spread over more, and registers are left
    # for many threads. Half of it where the ends of rows need some of them.
    block, rows = row_block(d, most=1024), access(d, x_t, u)
    launch(
        _flow_path_kernel,
        (n, triton.cdiv(d, block)),
        x_t,
        u,
        u.stride(0),
        targets,
        targets.stride(0),
        path.times.contiguous(),
        path.noise_id.contiguous(),
        path.anchor.contiguous(),
        path.time_index.contiguous(),
        path.seed,
        path.target_scale,
        path.source_std,
        d,
        HAS_NOISE=path.source_std != 0,
        BLOCK=block,
        ROWS=rows,
        TARGETS=access(d, targets),
        num_warps=warps_for(block, each=16 if rows == "whole" else 8),
        contract=False,  # the noise has the interpreter's bits
    )
    return x_t, u
