"""csrc/scale.cu."""

import torch
from torch import Tensor

from ..cuda import DTYPES, address, library, stream_of, structure

ScatterRowsArguments = structure(
    "ScatterRowsArguments", pointers="x factor token_row out", int64="tokens", int32="n width out_dtype"
)
_ALL = 2**31 - 1
MAX_PROGRAMS = 8 * 160  # of 256 threads: as many as fill the largest chips


def _scale(x: Tensor, factor: Tensor, out: Tensor, blocks: int) -> Tensor:
    library().scale(
        x.data_ptr(), DTYPES[x.dtype], factor.data_ptr(), out.data_ptr(), DTYPES[out.dtype], x.numel(), blocks,
        stream_of(x),
    )  # fmt: skip
    return out


def scale(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return _scale(x, factor, torch.empty_like(x, dtype=dtype), _ALL)


def scale_(x: Tensor, factor: Tensor) -> Tensor:
    return _scale(x, factor, x, MAX_PROGRAMS)


def scatter_rows(x: Tensor, factor: Tensor, token_row: Tensor, dtype: torch.dtype) -> Tensor:
    (n, width), token_row = x.shape, token_row.int().contiguous()
    out = torch.empty(token_row.shape[0], width, dtype=dtype, device=x.device)
    arguments = ScatterRowsArguments(
        x=x.data_ptr(), factor=factor.data_ptr(), token_row=token_row.data_ptr(), out=out.data_ptr(),
        out_dtype=DTYPES[dtype], tokens=out.shape[0], n=n, width=width,
    )  # fmt: skip
    library().scatter_rows(arguments, DTYPES[x.dtype], stream_of(x))
    return out


def split(x: Tensor, size: int, dtype: torch.dtype, z: Tensor | None = None) -> Tensor:
    width, halves, two_parts = x.shape[1], 2 if dtype.itemsize == 2 else 1, x.shape[0] > size
    out = torch.empty(halves * size, width, dtype=dtype, device=x.device)
    z = None if z is None else z.to(dtype)
    library().split(x.data_ptr(), address(z), out.data_ptr(), DTYPES[dtype], size * width, two_parts, stream_of(x))
    return out
