"""The second half of a sum over rows: partial sums of row blocks, (S, P, D) → (S, D), added in the order of the blocks.

The first half is a loop over rows inside a kernel, so that the order of additions depends on the shape alone: the same
call gives the same bits, with no atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import kernel, launch

# Row blocks of a sum over rows: almost five programs for each of an H100's 132 multiprocessors, as many as fit, and few
# enough that the partial sums are small beside the rows.
MAX_PARTS = 640


def parts_for(n: int) -> tuple[int, int]:
    """Row blocks, and rows in each, for n rows."""
    rows = max(1, triton.cdiv(n, MAX_PARTS))
    return triton.cdiv(n, rows), rows


def empty_partial(sums: int, parts: int, width: int, device: torch.device) -> Tensor:
    """Room for partial sums, (S, P, width or a few columns more of no meaning): kernels write whole vectors of them."""
    return torch.empty(sums, parts, triton.cdiv(width, 16) * 16, dtype=torch.float32, device=device)


@kernel
def _column_sum_kernel(
    partial_ptr, out_ptr, P, D, VECTOR: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    D = D // VECTOR * VECTOR
    offs_d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_p = tl.arange(0, BLOCK_P)
    which = tl.program_id(1).to(tl.int64)
    base = tl.multiple_of(partial_ptr + which * P * D, 4 * VECTOR)
    total = tl.zeros((BLOCK_P, BLOCK_D), dtype=tl.float32)
    for first in range(0, P, BLOCK_P):
        part = first + offs_p
        mask = (part < P)[:, None] & (offs_d < D)[None, :]
        total += tl.load(base + part.to(tl.int64)[:, None] * D + offs_d[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + which * D + offs_d, tl.sum(total, axis=0), mask=offs_d < D)


def column_sum(partial: Tensor) -> Tensor:  # (S, P, D) float32, contiguous
    """(S, D) float32."""
    sums, parts, width = partial.shape
    out = torch.empty(sums, width, dtype=torch.float32, device=partial.device)
    # Narrow column blocks, a 128-byte line each, for more programs; 128 parts at once, for more loads in flight.
    launch(
        _column_sum_kernel,
        (triton.cdiv(width, 32), sums),
        partial,
        out,
        parts,
        width,
        VECTOR=1 if width % 4 else 4,
        BLOCK_P=128,
        BLOCK_D=32,
        num_warps=4,
    )
    return out
