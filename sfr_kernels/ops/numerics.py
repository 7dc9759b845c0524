"""What every composite needs of arithmetic: casts under autocast, products with float32 sums, the norm of h."""

import contextlib

import torch
from torch import Tensor

from ..config import HIDDEN_NORM_EPS
from ..kernels import ACCESS_BYTES, empty_rows, row_blocks


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
def without_autocast(x: Tensor):
    """Inside an operator: autocast off, and the GPU of x the current one."""
    guard = torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
    with guard, torch.autocast(x.device.type, enabled=False):
        yield


def is_aligned(x: Tensor) -> bool:
    """Whether every row of a matrix, or of its transpose, starts on a multiple of 16 bytes."""
    return not any(k * x.element_size() % ACCESS_BYTES for k in (max(x.stride()), x.storage_offset()))


def aligned(x: Tensor) -> Tensor:
    """The matrix itself, or a copy whose rows are aligned."""
    return x if is_aligned(x) else empty_rows(*x.shape, x.dtype, x.device).copy_(x)


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """x[index], its rows aligned."""
    out = empty_rows(index.shape[0], x.shape[1], x.dtype, x.device)
    return torch.index_select(x, 0, index, out=out)


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x Wᵀ + b, its rows aligned."""
    out = empty_rows(x.shape[0], weight.shape[0], x.dtype, x.device)
    return torch.addmm(bias, x, weight.T, out=out)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, its rows aligned."""
    return product_into(empty_rows(a.shape[0], b.shape[1], a.dtype, a.device), a, b)


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, not rounded to the factors' dtype where that is of 16 bit."""
    out = empty_rows(a.shape[0], b.shape[1], wide_dtype(a.dtype), a.device)
    return product_into(out, a, b)


def product_into(out: Tensor, a: Tensor, b: Tensor, *, add: bool = False, alpha: float = 1.0) -> Tensor:
    """out = α a @ b, or out += a @ b, with the sum kept in out's dtype, which may be wider than that of the factors."""
    if not is_aligned(out) and not add:
        return out.copy_(product_into(empty_rows(*out.shape, out.dtype, out.device), a, b, alpha=alpha))
    if out.dtype == a.dtype:
        return torch.addmm(out, a, b, beta=int(add), alpha=alpha, out=out)
    if alpha != 1.0:
        return product_into(out, a, b).mul_(alpha)
    if a.is_cuda:
        with _untuned():
            if add:
                return torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
            return torch.mm(a, b, out_dtype=out.dtype, out=out)
    # No such product here: the factor with more rows or columns is widened a block at a time.
    total, a, b = (out.T, b.T, a.T) if a.shape[0] < b.shape[1] else (out, a, b)
    b = aligned(b.to(out.dtype))
    for block in row_blocks(a):
        wide = aligned(a[block].to(out.dtype))
        total[block].addmm_(wide, b) if add else torch.mm(wide, b, out=total[block])
    return out


@contextlib.contextmanager
def _untuned():
    """TunableOp refuses products whose result is wider than their factors, rather than leave them to cuBLAS."""
    tunable = torch.cuda.tunable
    on = tunable.is_enabled()
    if on:
        tunable.enable(False)
    try:
        yield
    finally:
        if on:
            tunable.enable(True)


def rms_norm(h: Tensor) -> tuple[Tensor, Tensor]:  # h (n, H)
    """h̃ = ρ h (n, H), and ρ = 1 / √(mean_j h_j² + ε) (n, 1) in float32 (float64 for float64). Differentiable."""
    return torch.ops.aten._fused_rms_norm(h, [h.shape[1]], None, HIDDEN_NORM_EPS)


def rms_norm_backward(
    grad: Tensor,  # (n, H), of h̃
    h: Tensor,  # (n, H)
    rstd: Tensor,  # (n, 1)
    dh: Tensor,  # (n, H), where the gradient of h goes, may be h itself
    *,
    add: bool = False,  # to what dh holds
) -> None:
    """dh = ρ (g − h̃ mean_j(g_j h̃_j))."""
    if grad.is_cuda:  # torch has this kernel for CUDA alone
        grad, h = grad.contiguous(), h.contiguous()
        found, _ = torch.ops.aten._fused_rms_norm_backward(grad, h, [h.shape[1]], rstd, None, [True, False])
        dh.add_(found) if add else dh.copy_(found)
        return
    for block in row_blocks(grad):
        g, rho = grad[block].to(rstd.dtype), rstd[block]
        normed = h[block] * rho
        total = torch.bmm(g.unsqueeze(1), normed.unsqueeze(2)).squeeze(2)
        found = torch.addcmul(g, normed, total, value=-1 / h.shape[1], out=normed).mul_(rho)
        dh[block] = found.add_(dh[block]) if add else found


def split_normalizer(normalizer: Tensor, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """What forward and what backward divides gradients in `dtype` by, None for 1. Forward does, but in float16, where
    gradients of probabilities divided by a large normalizer underflow below 6e-8."""
    return (None, normalizer) if dtype == torch.float16 else (normalizer, None)
