"""What every Triton kernel is made with: how it is compiled and launched, and how it reads and writes rows.

A thread reads or writes a block of a row's columns 16 bytes at a time where it can, and none past `width`, since a row
may be part of a wider one. ACCESS says how:

    "whole"   rows start at multiples of 16 bytes, and 16 divides `width`: vectors alone
    "ragged"  rows start so: vectors up to the last multiple of 16 columns, and one by one after it
    "single"  one by one
"""

import inspect

import triton
import triton.language as tl
from torch import Tensor

# The widest block of a row that one program holds in registers; wider rows are taken in several.
MAX_BLOCK = 4096


def kernel(function):
    """A Triton kernel that is compiled once for given dtypes and constants, whatever its other arguments are.

    Triton's own rule, a variant for each argument that is 1 or a multiple of 16, would compile in the middle of
    training whenever a count of rows or the start of a slice has a new pattern. What a kernel has to know of alignment,
    its launcher says by a constant, ACCESS.
    """
    parameters = inspect.signature(function).parameters.items()
    return triton.jit(function, do_not_specialize=[name for name, p in parameters if p.annotation is not tl.constexpr])


def launch(function, grid: tuple[int, ...], *args, contract: bool = True, **meta) -> None:
    """function[grid](*args, **meta); an empty grid launches nothing. contract: a · b + c may be rounded once."""
    if all(grid):
        function[grid](*args, enable_fp_fusion=contract, **meta)


def row_block(width: int, most: int = MAX_BLOCK) -> int:
    """Columns in the block of a row of `width` columns: the next power of two, 16 at least."""
    return min(most, max(16, triton.next_power_of_2(width)))


def warps_for(block: int, each: int = 8) -> int:
    """Warps for a block of one row, with so many elements a thread: eight are a 16-byte access in 16 bit."""
    return min(16, max(1, block // (32 * each)))


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
    """Columns `offs` of a row, as they are stored, and 0 past `width`."""
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
