"""The flow path of each row, from its identity, anchor and time:

x_0 = source_std · ε(seed, noise_id)        x_1 = target_scale · targets[anchor]
x_t = (1 − t) x_0 + t x_1

Nothing is saved: whoever needs the noise again makes it again (`path_ends`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import FlowPath
from .launch import launch, row_block, warps_for
from .philox import gaussian


@triton.jit
def path_ends(
    targets_ptr, target_stride, anchor, noise_id, seed, target_scale, source_std, first, d,
    HAS_NOISE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x_0 and x_1 of one row, its BLOCK coordinates from `first` on."""
    offs = first + tl.arange(0, BLOCK)
    x_1 = tl.load(targets_ptr + anchor.to(tl.int64) * target_stride + offs, mask=offs < d, other=0.0).to(tl.float32)
    x_1 *= target_scale
    if HAS_NOISE:
        x_0 = gaussian(seed, noise_id, first // 4 + tl.arange(0, BLOCK // 4)) * source_std
    else:
        x_0 = tl.zeros_like(x_1)
    return x_0, x_1


@triton.jit
def _flow_path_kernel(
    x_t_ptr, targets_ptr, target_stride, times_ptr, noise_id_ptr, anchor_ptr, time_index_ptr, seed_ptr,
    target_scale, source_std, d,
    HAS_NOISE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    t = tl.load(times_ptr + tl.load(time_index_ptr + row)).to(tl.float32)
    x_0, x_1 = path_ends(
        targets_ptr, target_stride, tl.load(anchor_ptr + row), tl.load(noise_id_ptr + row), tl.load(seed_ptr),
        target_scale, source_std, first, d, HAS_NOISE, BLOCK,
    )  # fmt: skip
    offs = first + tl.arange(0, BLOCK)
    x_t = (1.0 - t) * x_0 + t * x_1
    tl.store(x_t_ptr + row * d + offs, x_t.to(x_t_ptr.dtype.element_ty), mask=offs < d)


def flow_path(path: FlowPath, dtype: torch.dtype) -> Tensor:
    """x_t (n, d) in `dtype`."""
    n, d = path.noise_id.shape[0], path.targets.shape[1]
    targets = path.targets if path.targets.stride(1) == 1 else path.targets.contiguous()
    x_t = torch.empty(n, d, dtype=dtype, device=targets.device)
    # Two counters a thread, eight coordinates: one 16-byte store in 16 bit, few enough registers for full occupancy.
    block = row_block(d, most=1024)
    launch(
        _flow_path_kernel,
        (n, triton.cdiv(d, block)),
        x_t,
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
        num_warps=warps_for(block),
        contract=False,  # the noise has the interpreter's bits
    )
    return x_t
