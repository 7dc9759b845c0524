"""Launching a kernel: the one place where every launch of this package passes."""

import triton

# The widest block of a row that one program holds in registers; wider rows are taken in several.
MAX_BLOCK = 4096


def launch(kernel, grid: tuple[int, ...], *args, contract: bool = True, **meta) -> None:
    """kernel[grid](*args, **meta); an empty grid launches nothing. contract: a · b + c may be rounded once."""
    if all(grid):
        kernel[grid](*args, enable_fp_fusion=contract, **meta)


def row_block(width: int, most: int = MAX_BLOCK) -> int:
    """Columns in the block of a row of `width` columns: the next power of two, 16 at least."""
    return min(most, max(16, triton.next_power_of_2(width)))


def warps_for(block: int) -> int:
    """Warps for a block of one row: eight elements a thread, a 16-byte access in 16 bit."""
    return min(16, max(1, block // 256))
