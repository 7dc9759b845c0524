"""What backward does with the gradients that forward left, and float32 in two parts of 16 bit: csrc/scale.cu."""

import torch
from torch import Tensor

from ..cuda import DTYPES, address, library, stream_of

_ALL = 2**31 - 1
MAX_PROGRAMS = 8 * 160  # of 256 threads: as many as fill the largest chips


def _scale(x: Tensor, factor: Tensor, out: Tensor, blocks: int) -> Tensor:
    library().scale(
        x.data_ptr(), DTYPES[x.dtype], factor.data_ptr(), out.data_ptr(), DTYPES[out.dtype], x.numel(), blocks,
        stream_of(x),
    )  # fmt: skip
    return out


def scale(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """x · factor in `dtype`; x contiguous, factor a zero-dim float32."""
    return _scale(x, factor, torch.empty_like(x, dtype=dtype), _ALL)


def scale_(x: Tensor, factor: Tensor) -> Tensor:
    """x *= factor, and x; x contiguous, factor a zero-dim float32. Where it is 1, x is not even read."""
    return _scale(x, factor, x, MAX_PROGRAMS)


def scatter_rows(
    x: Tensor,  # (n, H), contiguous
    factor: Tensor,  # zero-dim float32
    token_row: Tensor,  # (N,) int32, the row of each token; −1, or n and more: none
    dtype: torch.dtype,
) -> Tensor:
    """(N, H) in `dtype`: factor · x[token_row], and zero where there is no row."""
    token_row = token_row.int().contiguous()
    out = torch.empty(token_row.shape[0], x.shape[1], dtype=dtype, device=x.device)
    library().scatter_rows(
        x.data_ptr(), DTYPES[x.dtype], factor.data_ptr(), token_row.data_ptr(), out.data_ptr(), DTYPES[dtype],
        *(token_row.shape[0], *x.shape), stream_of(x),
    )  # fmt: skip
    return out


def split(
    x: Tensor,  # (j · M, d) float32, contiguous: j parts of M rows, one or two, to be added
    size: int,  # M
    dtype: torch.dtype,
    z: Tensor | None = None,  # (M, d), contiguous
) -> Tensor:
    """[hi; lo] (2M, d) in a `dtype` of 16 bit; else x alone, (M, d)."""
    width, parts = x.shape[1], 2 if dtype.itemsize == 2 else 1
    out = torch.empty(parts * size, width, dtype=dtype, device=x.device)
    z = None if z is None else z.to(dtype)
    two_parts = x.shape[0] > size
    library().split(x.data_ptr(), address(z), out.data_ptr(), DTYPES[dtype], size * width, two_parts, stream_of(x))
    return out
