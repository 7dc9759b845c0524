"""What backward does with the gradients that forward left: factor · x in float32, rounded once.

And a float32 matrix as two of 16 bit, x = hi + lo, so that products with it are nearly those of float32:

    x ← Σ parts of x (· SiLU'(z))      hi = round(x)      lo = round(x − hi)
"""

import torch
from torch import Tensor

from ..backend import dispatch


@dispatch
def scale(
    x: Tensor,  # contiguous
    factor: Tensor,  # zero-dim float32 (float64 for float64 x)
    dtype: torch.dtype,
) -> Tensor:
    """x · factor in `dtype`."""


@dispatch
def scale_(
    x: Tensor,  # contiguous
    factor: Tensor,  # zero-dim float32 (float64 for float64 x)
) -> Tensor:
    """x *= factor; returns x, which is not even read where the factor is 1."""


@dispatch
def scatter_rows(
    x: Tensor,  # (n, H), contiguous
    factor: Tensor,  # zero-dim float32 (float64 for float64 x)
    token_row: Tensor,  # (N,) int32, the row of each token; −1, or n and more: none
    dtype: torch.dtype,
) -> Tensor:
    """(N, H) in `dtype`: factor · x[token_row], and zero where there is no row."""


@dispatch
def split(
    x: Tensor,  # (j · M, d) float32, contiguous: j parts of M rows, one or two, to be added
    size: int,  # M
    dtype: torch.dtype,
    z: Tensor | None = None,  # (M, d), contiguous
) -> Tensor:
    """[hi; lo] (2M, d) in a `dtype` of 16 bit; else x alone, (M, d)."""
