"""A float32 matrix as two of 16 bit, x = hi + lo, so that products with it are nearly those of float32:

x ← Σ parts of x (· SiLU'(z))      hi = round(x)      lo = round(x − hi)
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .elementary import sigmoid
from .launch import kernel, launch
from .row import access, read, write


@kernel
def _split_kernel(
    x_ptr, z_ptr, out_ptr, numel, TWO_PARTS: tl.constexpr, HAS_Z: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK: tl.constexpr, ACCESS: tl.constexpr,
):  # fmt: skip
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = read(x_ptr, 1, offs, numel, ACCESS)
    if TWO_PARTS:
        x += read(x_ptr + numel, 1, offs, numel, ACCESS)
    if HAS_Z:
        z = read(z_ptr, 1, offs, numel, ACCESS).to(tl.float32)
        sigma = sigmoid(z)
        x *= sigma * (1.0 + z * (1.0 - sigma))
    hi = x.to(out_ptr.dtype.element_ty)
    write(out_ptr, 1, offs, numel, hi, ACCESS)
    if SPLIT:
        write(out_ptr + numel, 1, offs, numel, x - hi.to(tl.float32), ACCESS)


def split(
    x: Tensor,  # (j · M, d) float32, contiguous: j parts of M rows, one or two, to be added
    size: int,  # M
    dtype: torch.dtype,
    z: Tensor | None = None,  # (M, d), contiguous
) -> Tensor:
    """[hi; lo] (2M, d) in a `dtype` of 16 bit; else x alone, (M, d)."""
    width, parts = x.shape[1], 2 if dtype.itemsize == 2 else 1
    out = torch.empty(parts * size, width, dtype=dtype, device=x.device)
    flat = [t.view(-1) for t in (x, z, out) if t is not None]
    # Where 16 does not divide the parts, the second of them lies off the vectors.
    how = "single" if size * width % 16 else access(size * width, *flat)
    launch(
        _split_kernel,
        (triton.cdiv(size * width, 1024),),
        x,
        z,
        out,
        size * width,
        TWO_PARTS=x.shape[0] > size,
        HAS_Z=z is not None,
        SPLIT=parts == 2,
        BLOCK=1024,
        ACCESS=how,
        num_warps=4,
    )
    return out
