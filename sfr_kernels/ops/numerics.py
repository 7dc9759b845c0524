"""What every composite needs of arithmetic: casts under autocast, products with float32 sums, normalizers."""

import contextlib
import math

import torch
from torch import Tensor

from ..leaves.torch.scale import row_blocks


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which torch's own linear would run on `x` here."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and statistics: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


@contextlib.contextmanager
def as_written(x: Tensor):
    """Inside an op: the dtypes that the code says, on the device where `x` is."""
    guard = torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
    with guard, torch.autocast(x.device.type, enabled=False):
        yield


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, not rounded to the factors' dtype where that is of 16 bit."""
    wide = wide_dtype(a.dtype)
    if wide == a.dtype:
        return a @ b
    return torch.mm(a, b, out_dtype=wide) if a.is_cuda else a.to(wide) @ b.to(wide)


def accumulate_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b with the sum kept in total's dtype, float32 for 16-bit factors."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
        return
    wide = b if a.is_cuda else b.to(total.dtype)
    for block in row_blocks(total):
        if a.is_cuda:
            total[block] = torch.addmm(total[block], a[block], b, out_dtype=total.dtype)
        else:
            total[block].addmm_(a[block].to(total.dtype), wide)


def normalizer_of(normalizer: float | Tensor | None, count: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The normalizer as a zero-dim tensor of `dtype`; 0 becomes 1, since it divides a sum over no rows."""
    if normalizer is None:
        normalizer = count
    if isinstance(normalizer, Tensor):
        if normalizer.numel() != 1:
            raise ValueError(f"normalizer must have one element, got shape {tuple(normalizer.shape)}")
        normalizer = normalizer.detach().reshape(()).to(device, dtype)
        return torch.where(normalizer == 0, 1.0, normalizer)
    if isinstance(normalizer, bool) or not isinstance(normalizer, int | float):
        raise TypeError(f"normalizer must be a number or a tensor, got {type(normalizer).__name__}")
    if not 0 <= normalizer < math.inf:
        raise ValueError(f"normalizer must be a finite number, at least 0, got {normalizer}")
    return torch.full((), normalizer or 1, device=device, dtype=dtype)
