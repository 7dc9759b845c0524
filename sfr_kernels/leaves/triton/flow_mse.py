"""The matching loss of each row and its gradient, in one read of v, the target velocity made again in registers:

u = x_1 − x_0      e = v − u      ℓ = mean_j e²      dv = (2 / d) · coefficient · e      db = Σ_r dv
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import FlowPath
from .column_sum import column_sum, parts_for
from .flow_path import path_ends
from .launch import launch, row_block, warps_for


@triton.jit
def _flow_mse_kernel(
    v_ptr, v_row, v_col, coefficient_ptr, loss_ptr, partial_ptr,
    targets_ptr, target_stride, noise_id_ptr, anchor_ptr, seed_ptr, target_scale, source_std,
    n, d, rows,
    HAS_NOISE: tl.constexpr, NEED_GRAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (p, c): rows p · rows … and the c-th block of columns; ℓ in one part for each block of columns."""
    part, blocks = tl.program_id(0).to(tl.int64), tl.num_programs(1)
    first = tl.program_id(1) * BLOCK
    offs = first + tl.arange(0, BLOCK)
    mask = offs < d
    seed = tl.load(seed_ptr)
    db = tl.zeros((BLOCK,), dtype=tl.float32)
    row = part * rows
    for _ in range(tl.minimum(rows, n - row)):
        x_0, x_1 = path_ends(
            targets_ptr, target_stride, tl.load(anchor_ptr + row), tl.load(noise_id_ptr + row), seed,
            target_scale, source_std, first, d, HAS_NOISE, BLOCK,
        )  # fmt: skip
        at = v_ptr + row * v_row + offs.to(tl.int64) * v_col
        v = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        e = tl.where(mask, v - (x_1 - x_0), 0.0)
        tl.store(loss_ptr + row * blocks + tl.program_id(1), tl.sum(e * e, axis=0) / d)
        if NEED_GRAD:
            dv = e * (2.0 / d * tl.load(coefficient_ptr + row))
            tl.store(at, dv.to(v_ptr.dtype.element_ty), mask=mask)
            db += dv
        row += 1
    if NEED_GRAD:
        tl.store(partial_ptr + part * d + offs, db, mask=mask)


def flow_mse(
    v: Tensor,  # (n, d), predicted velocity; holds dv afterwards if there is a coefficient
    path: FlowPath,
    coefficient: Tensor | None = None,  # (n,) float32; None: no gradient
) -> tuple[Tensor, Tensor | None]:
    """ℓ (n,) and db (d,) in float32."""
    n, d = v.shape
    parts, rows = parts_for(n)
    targets = path.targets if path.targets.stride(1) == 1 else path.targets.contiguous()
    # As in flow_path; a row of at most 2048 columns is one block, so its ℓ is whole.
    block = row_block(d, most=2048)
    blocks = triton.cdiv(d, block)
    loss = torch.empty(n, blocks, dtype=torch.float32, device=v.device)
    need_grad = coefficient is not None
    partial = loss.new_empty(1, parts, d) if need_grad else None
    launch(
        _flow_mse_kernel,
        (parts, blocks),
        v,
        *v.stride(),
        None if coefficient is None else coefficient.contiguous(),
        loss,
        partial,
        targets,
        targets.stride(0),
        path.noise_id.contiguous(),
        path.anchor.contiguous(),
        path.seed,
        path.target_scale,
        path.source_std,
        n,
        d,
        rows,
        HAS_NOISE=path.source_std != 0,
        NEED_GRAD=need_grad,
        BLOCK=block,
        num_warps=warps_for(block),
        contract=False,  # the same noise as in flow_path
    )
    loss = loss.view(n) if blocks == 1 else loss.sum(1)
    return loss, column_sum(partial)[0] if need_grad else None
