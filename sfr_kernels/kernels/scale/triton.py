"""One pass each. In `scatter_rows` every token looks for its row, so that the zeros of the others are written too."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..elementary import sigmoid
from ..triton import access, kernel, launch, read, row_block, write

# 16 programs of 128 threads fill a multiprocessor, of which a chip has at most 160.
MAX_PROGRAMS = 16 * 160


@triton.jit
def _scale_block(x_ptr, out_ptr, factor, offs, numel, ALIGNED: tl.constexpr):
    x_at, out_at = x_ptr + offs, out_ptr + offs
    if ALIGNED:
        x_at, out_at = tl.multiple_of(x_at, 16), tl.multiple_of(out_at, 16)
    x = tl.load(x_at, mask=offs < numel, other=0.0).to(tl.float32)
    tl.store(out_at, (x * factor).to(out_ptr.dtype.element_ty), mask=offs < numel)


@triton.jit
def _scale_end(x_ptr, out_ptr, factor, numel):
    """What is left of whole vectors, fewer than 16 numbers: the first program's."""
    if tl.program_id(0) == 0:
        _scale_block(x_ptr, out_ptr, factor, numel // 16 * 16 + tl.arange(0, 16), numel, False)


def _aligned(*flat: Tensor) -> bool:
    return not any(x.data_ptr() % 16 for x in flat)


@kernel
def _scale_kernel(x_ptr, factor_ptr, out_ptr, numel: tl.int64, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    factor = tl.load(factor_ptr)
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    _scale_block(x_ptr, out_ptr, factor, offs, numel // 16 * 16, ALIGNED)
    _scale_end(x_ptr, out_ptr, factor, numel)


def scale(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty_like(x, dtype=dtype)
    # 16 bytes a thread, twice; blocks no larger, so that small tensors still fill the chip.
    launch(
        _scale_kernel, (triton.cdiv(x.numel(), 2048),), x, factor, out, x.numel(),
        ALIGNED=_aligned(x, out), BLOCK=2048, num_warps=4,
    )  # fmt: skip
    return out


@kernel
def _scale_in_place_kernel(x_ptr, factor_ptr, numel: tl.int64, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """Few programs with many blocks each, so that those that find nothing to do are soon gone."""
    factor = tl.load(factor_ptr)
    if factor != 1.0:
        for start in range(tl.program_id(0).to(tl.int64) * BLOCK, numel, tl.num_programs(0) * BLOCK):
            _scale_block(x_ptr, x_ptr, factor, start + tl.arange(0, BLOCK), numel // 16 * 16, ALIGNED)
        _scale_end(x_ptr, x_ptr, factor, numel)


def scale_(x: Tensor, factor: Tensor) -> Tensor:
    programs = min(triton.cdiv(x.numel(), 4096), MAX_PROGRAMS)
    launch(_scale_in_place_kernel, (programs,), x, factor, x.numel(), ALIGNED=_aligned(x), BLOCK=4096, num_warps=4)
    return x


@kernel
def _scatter_rows_kernel(
    x_ptr, x_row, x_col, factor_ptr, token_row_ptr, out_ptr, n, H,
    BLOCK: tl.constexpr, ACCESS: tl.constexpr, OUT_ACCESS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(token_row_ptr + token).to(tl.int64)
    here = (row >= 0) & (row < n)
    x = read(x_ptr + row * x_row, x_col, offs, tl.where(here, H, 0), ACCESS).to(tl.float32)
    x = tl.where(here, x * tl.load(factor_ptr), 0.0)
    write(out_ptr + token * H, 1, offs, H, x, OUT_ACCESS)


def scatter_rows(x: Tensor, factor: Tensor, token_row: Tensor, dtype: torch.dtype) -> Tensor:
    tokens, width = token_row.shape[0], x.shape[1]
    out = torch.empty(tokens, width, dtype=dtype, device=x.device)
    block = row_block(width, most=2048)  # as in `scale`
    launch(
        _scatter_rows_kernel, (tokens, triton.cdiv(width, block)),
        x, *x.stride(), factor, token_row.contiguous(), out, x.shape[0], width,
        BLOCK=block, ACCESS=access(width, x), OUT_ACCESS=access(width, out), num_warps=4,
    )  # fmt: skip
    return out


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


def split(x: Tensor, size: int, dtype: torch.dtype, z: Tensor | None = None) -> Tensor:
    width, parts = x.shape[1], 2 if dtype.itemsize == 2 else 1
    out = torch.empty(parts * size, width, dtype=dtype, device=x.device)
    flat = [t.view(-1) for t in (x, z, out) if t is not None]
    # Where 16 does not divide the parts, the second of them lies off the vectors.
    how = "single" if size * width % 16 else access(size * width, *flat)
    launch(
        _split_kernel, (triton.cdiv(size * width, 1024),), x, z, out, size * width,
        TWO_PARTS=x.shape[0] > size, HAS_Z=z is not None, SPLIT=parts == 2, BLOCK=1024, ACCESS=how, num_warps=4,
    )  # fmt: skip
    return out
