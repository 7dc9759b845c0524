"""Kernels and their launches: the one place where every kernel of this package is made and every launch passes."""

import inspect

import triton
import triton.language as tl

# The widest block of a row that one program holds in registers; wider rows are taken in several.
MAX_BLOCK = 4096


def kernel(function):
    """A Triton kernel that is compiled once for given dtypes and constants, whatever its other arguments are.

    Triton's own rule, a variant for each argument that is 1 or a multiple of 16, would compile anew in the middle of
    training, whenever a count of rows or the start of a slice has a pattern that was not seen before. What a kernel has
    to know of alignment, its launcher says by a constant (row.py).
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
