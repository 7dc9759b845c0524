"""A float32 matrix as two of 16 bit, x = hi + lo, so that products with it are nearly those of float32:

x ← Σ parts of x (· SiLU'(z))      hi = round(x)      lo = round(x − hi)
"""

import torch
from torch import Tensor


def split(
    x: Tensor,  # (j · M, d) float32: j parts of M rows, to be added
    size: int,  # M
    dtype: torch.dtype,
    z: Tensor | None = None,  # (M, d)
) -> Tensor:
    """[hi; lo] (2M, d) in a `dtype` of 16 bit; else x alone, (M, d)."""
    x = x.view(-1, size, x.shape[1]).sum(0)
    if z is not None:
        x = torch.ops.aten.silu_backward(x, z.to(x.dtype))
    hi = x.to(dtype)
    return hi if dtype.itemsize > 2 else torch.cat([hi, (x - hi).to(dtype)])
