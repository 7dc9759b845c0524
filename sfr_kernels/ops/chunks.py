"""The chunk loop of the cross-entropy of a linear layer, over rows that are all supervised.

Per chunk of rows the logits are made in one reused buffer, turned into their gradient in place, and multiplied out at
once: dh = dz W, dW += dzᵀ h.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..leaves import RowStats
from .numerics import accumulate_product, wide_dtype

_VOCAB_BLOCK = 4096


@dataclass(frozen=True)
class LogitOptions:
    """How logits become a loss; the same for every row."""

    softcap: float | None = None
    logit_scale: float = 1.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def __post_init__(self):
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap must be positive, got {self.softcap}")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {self.label_smoothing}")
        if not 0 <= self.z_loss < math.inf:
            raise ValueError(f"z_loss must be finite and not negative, got {self.z_loss}")
        if not -math.inf < self.logit_scale < math.inf:
            raise ValueError(f"logit_scale must be finite, got {self.logit_scale}")


@dataclass(frozen=True)
class Plan:
    """Everything about a call that is not a differentiable tensor."""

    labels: Tensor  # (n,)
    options: LogitOptions
    leaves: object
    logits_dtype: torch.dtype
    dweight_dtype: torch.dtype
    row_weight: Tensor | None = None  # (n,)
    chunk_rows: int = 0  # 0: chunk_rows_for decides
    need_stats: bool = False


def chunk_rows_for(n: int, hidden_size: int, dtype: torch.dtype, trained_head: bool) -> int:
    """Rows of logits held at once.

    Trained head: all of them while they take no more than the float32 dW accumulator that one chunk makes needless
    (n · itemsize ≤ 4 H), else equal chunks of about H rows. Frozen head: chunks of at most H / 2 rows. Never below
    1024: small products waste the machine.
    """
    if trained_head and n * dtype.itemsize <= 4 * hidden_size:
        return max(n, 1)
    most = max(1024, hidden_size if trained_head else hidden_size // 2)
    chunks = max(1, -(-n // most))
    return max(1, -(-n // chunks))


def dweight_dtype_for(
    most: int,  # rows there can be
    hidden_size: int,
    dtype: torch.dtype,  # of the products
    logits_dtype: torch.dtype,
    chunk_rows: int,
) -> torch.dtype:
    """float32 where dW may be a sum over chunks. One chunk needs no accumulator, but fp16 has no room for a sum over
    thousands of rows."""
    rows = chunk_rows or chunk_rows_for(most, hidden_size, logits_dtype, True)
    return dtype if rows >= most and dtype != torch.float16 else wide_dtype(dtype)


@dataclass
class LinearCrossEntropyResult:
    """Row losses and the gradients of their sum; a gradient is None where it was not asked for."""

    loss: Tensor  # (n,) float32
    stats: RowStats | None
    dhidden: Tensor | None  # (n, H)
    dweight: Tensor | None  # (V, H), float32 where it was accumulated
    dbias: Tensor | None  # (V,) float32


def _logits(h: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """h Wᵀ + b in `out`, whose dtype may be wider than that of the factors; rounded once, bias included."""
    if out.dtype == h.dtype:
        return torch.mm(h, weight.T, out=out) if bias is None else torch.addmm(bias, h, weight.T, out=out)
    if h.is_cuda:
        torch.mm(h, weight.T, out_dtype=out.dtype, out=out)
    else:
        wide = h.to(out.dtype)
        for start in range(0, weight.shape[0], _VOCAB_BLOCK):
            block = slice(start, start + _VOCAB_BLOCK)
            out[:, block] = wide @ weight[block].to(out.dtype).T
    return out if bias is None else out.add_(bias)


def run_chunks(
    h: Tensor,  # (n, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    plan: Plan,
    need: tuple[bool, bool, bool],  # gradients of h, weight, bias
    dh: Tensor | None = None,  # (n, H), where to write the gradient of h
) -> LinearCrossEntropyResult:
    """The chunk loop: row losses, and the gradients of Σ_r row_weight[r] ℓ_r."""
    n, hidden_size = h.shape
    need_h, need_w, need_b = need
    rows = plan.chunk_rows or chunk_rows_for(n, hidden_size, plan.logits_dtype, need_w)
    rows = max(1, min(rows, n))
    wide = wide_dtype(h.dtype)
    buffer = h.new_empty(rows, weight.shape[0], dtype=plan.logits_dtype)
    loss = h.new_empty(n, dtype=wide)
    if need_h and dh is None:
        dh = torch.empty_like(h)
    dw = torch.zeros_like(weight, dtype=plan.dweight_dtype) if need_w else None
    db = h.new_zeros(weight.shape[0], dtype=wide) if need_b else None
    stats = []
    for start in range(0, n, rows):
        chunk = slice(start, min(start + rows, n))
        x = _logits(h[chunk], weight, bias, buffer[: chunk.stop - start])
        loss[chunk], row_stats = plan.leaves.softmax_xent(
            x,
            plan.labels[chunk],
            None if plan.row_weight is None else plan.row_weight[chunk],
            logit_scale=plan.options.logit_scale,
            softcap=plan.options.softcap,
            label_smoothing=plan.options.label_smoothing,
            z_loss=plan.options.z_loss,
            need_grad=any(need),
            need_stats=plan.need_stats,
        )
        stats.append(row_stats)
        if any(need):
            dz = x.to(h.dtype)
            if need_h:
                torch.mm(dz, weight, out=dh[chunk])
            if need_w:
                accumulate_product(dw, dz.T, h[chunk])
            if need_b:
                db += x.sum(0, dtype=wide)
    if plan.need_stats:
        empty = RowStats(loss.new_empty(0), plan.labels.new_empty(0), loss.new_empty(0))
        stats = RowStats(*(torch.cat(column) for column in zip(*(stats or [empty]), strict=True)))
    return LinearCrossEntropyResult(loss, stats if plan.need_stats else None, dh, dw, db)
