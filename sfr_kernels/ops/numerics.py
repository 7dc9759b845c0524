"""What every composite needs of arithmetic: casts under autocast, float32 accumulation and scaling, normalizers."""

import math

import torch
from torch import Tensor

_BLOCK_ELEMENTS = 1 << 22


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which torch's own linear would run on `x` here."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and statistics: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def row_blocks(x: Tensor) -> range:
    """Starts of blocks of rows small enough that a temporary of one costs nothing; the step is the block's rows."""
    return range(0, x.shape[0], max(1, _BLOCK_ELEMENTS // max(1, x[:1].numel())))


def scaled(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """x · factor in float32, rounded once to `dtype`; x is left as it is."""
    out = torch.empty_like(x, dtype=dtype)
    blocks = row_blocks(x)
    for start in blocks:
        block = slice(start, start + blocks.step)
        out[block] = x[block].to(wide_dtype(x.dtype)) * factor
    return out


def accumulate_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b with the sum kept in total's dtype, float32 for 16-bit factors."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
        return
    blocks, wide = row_blocks(total), b if a.is_cuda else b.to(total.dtype)
    for start in blocks:
        block = slice(start, start + blocks.step)
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
    if not (math.isfinite(normalizer) and normalizer >= 0):
        raise ValueError(f"normalizer must be a finite number, at least 0, got {normalizer}")
    return torch.full((), normalizer or 1, device=device, dtype=dtype)


def check_hidden(hidden: Tensor) -> None:
    if not isinstance(hidden, Tensor) or not hidden.is_floating_point():
        raise TypeError(f"hidden must be a floating-point tensor, got {getattr(hidden, 'dtype', type(hidden))}")
    if hidden.dim() < 2:
        raise ValueError(f"hidden must be (..., H) with at least two dimensions, got {tuple(hidden.shape)}")
