"""The matching loss of each row and its gradient, in one read of v and of the target velocity u:

e = v − u      ℓ = mean_j e²      dv = (2 / d) · coefficient · e      db = Σ_r dv
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .column_sum import column_sum, empty_partial, parts_for
from .launch import kernel, launch, row_block, warps_for
from .row import access, read, write


@kernel
def _flow_mse_kernel(
    v_ptr, v_row, v_col, u_ptr, u_row, u_col, coefficient_ptr, loss_ptr, partial_ptr, n, d, rows,
    NEED_GRAD: tl.constexpr, BLOCK: tl.constexpr, ACCESS: tl.constexpr,
):  # fmt: skip
    """Program (p, c): rows p · rows … and the c-th block of columns; ℓ in one part for each block of columns."""
    part, blocks = tl.program_id(0).to(tl.int64), tl.num_programs(1)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    db = tl.zeros((BLOCK,), dtype=tl.float32)
    first = part * rows
    stop = tl.minimum(first + rows, n)
    inverse = 1.0 / d
    v = read(v_ptr + first * v_row, v_col, offs, d, ACCESS)
    u = read(u_ptr + first * u_row, u_col, offs, d, ACCESS)
    coefficient = tl.load(coefficient_ptr + first) if NEED_GRAD else 0.0
    for row in range(first, stop):
        # The next row is on its way while this one's sum is waited for.
        more = row + 1 < stop
        width = tl.where(more, d, 0)
        next_v = read(v_ptr + (row + 1) * v_row, v_col, offs, width, ACCESS)
        next_u = read(u_ptr + (row + 1) * u_row, u_col, offs, width, ACCESS)
        e = v.to(tl.float32) - u.to(tl.float32)
        tl.store(loss_ptr + row * blocks + tl.program_id(1), tl.sum(e * e, axis=0) * inverse)
        if NEED_GRAD:
            dv = e * (2.0 * inverse * coefficient)
            write(v_ptr + row * v_row, v_col, offs, d, dv, ACCESS)
            db += dv
            coefficient = tl.load(coefficient_ptr + row + 1, mask=more, other=0.0)
        v, u = next_v, next_u
    if NEED_GRAD:
        padded = tl.cdiv(d, 16) * 16
        write(partial_ptr + part * padded, 1, offs, padded, db, "whole")


def flow_mse(
    v: Tensor,  # (n, d), predicted velocity; holds dv afterwards if there is a coefficient
    u: Tensor,  # (n, d), target velocity
    coefficient: Tensor | None = None,  # (n,) float32; None: no gradient
) -> tuple[Tensor, Tensor | None]:
    """ℓ (n,) and db (d,) in float32."""
    n, d = v.shape
    parts, rows = parts_for(n)
    # A row of at most 2048 columns is one block, so its ℓ is whole.
    block = row_block(d, most=2048)
    blocks = triton.cdiv(d, block)
    loss = torch.empty(n, blocks, dtype=torch.float32, device=v.device)
    need_grad = coefficient is not None
    partial = empty_partial(1, parts, d, v.device) if need_grad else None
    launch(
        _flow_mse_kernel,
        (parts, blocks),
        v,
        *v.stride(),
        u,
        *u.stride(),
        None if coefficient is None else coefficient.contiguous(),
        loss,
        partial,
        n,
        d,
        rows,
        NEED_GRAD=need_grad,
        BLOCK=block,
        ACCESS=access(d, v, u),
        num_warps=warps_for(block),
    )
    loss = loss.view(n) if blocks == 1 else loss.sum(1)
    return loss, column_sum(partial)[0, :d] if need_grad else None
