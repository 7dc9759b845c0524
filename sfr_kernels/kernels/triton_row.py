"""Reading and writing a block of the columns of a row, 16 bytes a thread at once wherever the rows lie so.

Columns past `width` are neither read nor written: a row may be part of a wider one. ACCESS says how:

    "whole"   rows start at multiples of 16 bytes, and 16 divides `width`: vectors alone
    "ragged"  rows start so: vectors up to the last multiple of 16 columns, and one by one after it
    "single"  one by one
"""

import triton
import triton.language as tl
from torch import Tensor


def access(width: int, *tensors: Tensor | None) -> str:
    """ACCESS for tensors of rows of `width` columns, or of one such row."""
    for x in tensors:
        if x is not None and (
            x.stride(-1) != 1 or x.data_ptr() % 16 or (x.dim() == 2 and x.stride(0) * x.element_size() % 16)
        ):
            return "single"
    return "ragged" if width % 16 else "whole"


@triton.jit
def columns(start, stride, offs, ACCESS: tl.constexpr):
    """The addresses of columns `offs` of the row that starts at `start`; of two dimensions if either has them."""
    if ACCESS == "single":
        return start + offs.to(tl.int64) * stride
    at = start + offs
    return tl.multiple_of(at, 16 if len(at.shape) == 1 else [1, 16])


@triton.jit
def read(start, stride, offs, width, ACCESS: tl.constexpr):
    """The columns `offs` of a row, as they are stored, and 0 past `width`."""
    at = columns(start, stride, offs, ACCESS)
    if ACCESS == "single":
        return tl.load(at, mask=offs < width, other=0.0)
    whole = width // 16 * 16  # which the compiler can see to be a multiple of every vector
    x = tl.load(at, mask=offs < whole, other=0.0)
    if ACCESS == "ragged":
        x = tl.where(offs < whole, x, tl.load(at, mask=(offs >= whole) & (offs < width), other=0.0))
    return x


@triton.jit
def write(start, stride, offs, width, x, ACCESS: tl.constexpr):
    at = columns(start, stride, offs, ACCESS)
    x = x.to(start.dtype.element_ty)
    if ACCESS == "single":
        tl.store(at, x, mask=offs < width)
    else:
        whole = width // 16 * 16
        tl.store(at, x, mask=offs < whole)
        if ACCESS == "ragged":
            tl.store(at, x, mask=(offs >= whole) & (offs < width))
