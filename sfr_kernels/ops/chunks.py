"""The chunk loop of the cross-entropy of a linear layer, over rows that are all supervised.

Per chunk of rows the logits are made in one reused buffer, turned into their gradient in place, and multiplied out at
once: dW += dzᵀ h, dh = dz W.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import empty_rows
from ..kernels.softmax_xent import RowStats
from .numerics import aligned, product_into, wide_dtype
from .vocab_parallel import VocabShard, sharded_softmax_xent

# Rows of a product at which cuBLAS runs at its rate; at some row counts above, 4096 among them, it is a fifth slower.
_PRODUCT_ROWS, _MANY_ROWS = 2048, 8192
# The buffer of logits has a multiple of so many rows: a gigabyte of a size of its own for each number of supervised
# rows would leave the allocator with as many blocks that fit no other.
_BUFFER_ROWS = 256
_CPU_ROWS = 512


@dataclass(frozen=True)
class LogitOptions:
    """How logits become a loss; the same for every row."""

    softcap: float | None = None
    logit_scale: float = 1.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def __post_init__(self):
        for name, value in self.named().items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise TypeError(f"{name} must be a number, got {value!r}")
        if self.softcap is not None and not 0 < self.softcap < math.inf:
            raise ValueError(f"softcap must be positive and finite, got {self.softcap}")
        if not 0 <= self.label_smoothing <= 1:
            raise ValueError(f"label_smoothing must be in [0, 1], got {self.label_smoothing}")
        if not 0 <= self.z_loss < math.inf:
            raise ValueError(f"z_loss must be finite and not negative, got {self.z_loss}")
        if not -math.inf < self.logit_scale < math.inf:
            raise ValueError(f"logit_scale must be finite, got {self.logit_scale}")

    def named(self) -> dict[str, float | None]:
        """The options by name; not `vars`, which torch 2.11 cannot trace."""
        return {name: getattr(self, name) for name in ("softcap", "logit_scale", "label_smoothing", "z_loss")}


@dataclass(frozen=True)
class Plan:
    """Everything about a call that is not a differentiable tensor."""

    labels: Tensor  # (n,)
    options: LogitOptions
    kernels: object
    logits_dtype: torch.dtype
    dweight_dtype: torch.dtype
    row_weight: Tensor | None = None  # (n,)
    chunk_rows: int = 0  # 0: chunk_rows_for decides
    need_stats: bool = False
    shard: VocabShard | None = None  # the weight has a part of the vocabulary


def chunk_rows_for(n: int, hidden_size: int, dtype: torch.dtype, trained_head: bool, on_cpu: bool = False) -> int:
    """Rows of logits held at once.

    Trained head: all of them while they take no more than the float32 dW accumulator that one chunk makes needless
    (n · itemsize ≤ 4 H; float16 needs one all the same), else equal chunks of at most 1.4 H rows: every chunk reads and
    writes the accumulator, and with it, in 16 bit, they take 2.4 times the weight's bytes beyond the gradient returned.
    Frozen head: chunks of at most H / 2 rows. Never below 1024: small products waste the machine.
    On a CPU, in a dtype in which dW is its own accumulator: at most 512, where products run at their rate and fewer
    pages of the buffer have to be mapped at every call.
    """
    if on_cpu:
        return max(1, -(-n // max(1, -(-n // _CPU_ROWS))))
    if trained_head and dtype != torch.float16 and n * dtype.itemsize <= 4 * hidden_size:
        return max(n, 1)
    most = max(1024, 7 * hidden_size // 5 if trained_head else hidden_size // 2)
    chunks = max(1, -(-n // most))
    return max(1, -(-n // chunks))


def dweight_dtype_for(
    most: int,  # rows there can be
    hidden_size: int,
    dtype: torch.dtype,  # of the products
    logits_dtype: torch.dtype,
    chunk_rows: int,
    accum_dtype: torch.dtype | None,
) -> torch.dtype:
    """float32 where dW may be a sum over chunks, unless the caller chose. One chunk needs no accumulator, but fp16 has
    no room for a sum over thousands of rows."""
    rows = chunk_rows or chunk_rows_for(most, hidden_size, logits_dtype, True)
    if rows >= most and dtype != torch.float16:
        return dtype
    return accum_dtype or wide_dtype(dtype)


def product_blocks(rows: int) -> list[slice]:
    """Blocks of rows in which a product of so many rows is made: all at once up to 2048 and from 8192 on, else equal
    blocks of at most 2048, a multiple of 128."""
    step = max(rows, 1)
    if _PRODUCT_ROWS < rows < _MANY_ROWS:
        step = -(-rows // -(-rows // _PRODUCT_ROWS))
        step = -(-step // 128) * 128
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


@dataclass
class LinearCrossEntropyResult:
    """Row losses and the gradients of their sum; a gradient is None where it was not asked for."""

    loss: Tensor  # (n,) float32
    stats: RowStats | None
    dhidden: Tensor | None  # (n, H); beside an odd H with room between the rows, as dweight
    dweight: Tensor | None  # (V, H), in the plan's dtype
    dbias: Tensor | None  # (V,) float32


def _logits(h: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """h Wᵀ + b in `out`, whose dtype may be wider than that of the factors; rounded once, bias included."""
    for block in product_blocks(h.shape[0]):
        if bias is not None and out.dtype == h.dtype:
            torch.addmm(bias, h[block], weight.T, out=out[block])
        else:
            product_into(out[block], h[block], weight.T)
    return out if bias is None or out.dtype == h.dtype else out.add_(bias)


def run_chunks(
    h: Tensor,  # (n, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    plan: Plan,
    need: tuple[bool, bool, bool],  # gradients of h, weight, bias
    dh: Tensor | None = None,  # (n, H), where to write the gradient of h; may be h itself
) -> LinearCrossEntropyResult:
    """The chunk loop: row losses, and the gradients of Σ_r row_weight[r] ℓ_r."""
    n, hidden_size = h.shape
    need_h, need_w, need_b = need
    wide = wide_dtype(h.dtype)
    on_cpu = h.is_cpu and h.dtype == wide
    rows = plan.chunk_rows or chunk_rows_for(n, hidden_size, plan.logits_dtype, need_w, on_cpu)
    rows = max(1, min(rows, n))
    h, weight, vocab = aligned(h), aligned(weight), weight.shape[0]
    room = rows if plan.chunk_rows or rows < _BUFFER_ROWS else -(-rows // _BUFFER_ROWS) * _BUFFER_ROWS
    buffer = empty_rows(room, vocab, plan.logits_dtype, h.device)
    loss = h.new_empty(n, dtype=wide)
    if not need_h:
        dh = None
    elif plan.shard is not None:
        dh = empty_rows(n, hidden_size, wide, h.device)  # a part of a sum over the group
    elif dh is None:
        dh = empty_rows(n, hidden_size, h.dtype, h.device)
    dw = empty_rows(vocab, hidden_size, plan.dweight_dtype, h.device) if need_w else None
    if need_w and n == 0:
        dw.zero_()
    db = h.new_zeros(vocab, dtype=wide) if need_b else None
    stats = []
    for start in range(0, n, rows):
        chunk = slice(start, min(start + rows, n))
        x = _logits(h[chunk], weight, bias, buffer[: chunk.stop - start])
        loss[chunk], row_stats = _softmax_xent(plan, x, chunk, need_grad=any(need))
        stats.append(row_stats)
        if any(need):
            dz = x if x.dtype == h.dtype else empty_rows(*x.shape, h.dtype, h.device).copy_(x)
            if need_w:
                product_into(dw, dz.T, h[chunk], add=start > 0)
            if need_b:
                db += x.sum(0, dtype=wide)
            if need_h:
                for block in product_blocks(dz.shape[0]):
                    product_into(dh[chunk][block], dz[block], weight)
    if need_h and plan.shard is not None:
        dh = plan.shard.sum(dh.contiguous()).to(h.dtype)
    if plan.need_stats:
        stats = RowStats(*(torch.cat(column) for column in zip(*(stats or [empty_stats(h)]), strict=True)))
    return LinearCrossEntropyResult(loss, stats if plan.need_stats else None, dh, dw, db)


def empty_stats(h: Tensor, n: int = 0) -> RowStats:
    """Room for the statistics of n rows of logits that are products of h."""
    wide = wide_dtype(h.dtype)
    return RowStats(*(h.new_empty(n, dtype=t) for t in (wide, torch.int64, wide, torch.bool)))


def _softmax_xent(plan: Plan, x: Tensor, chunk: slice, need_grad: bool) -> tuple[Tensor, RowStats | None]:
    """The row losses of a chunk of logits, which become their own gradient."""
    function = plan.kernels.softmax_xent if plan.shard is None else sharded_softmax_xent
    where = {} if plan.shard is None else dict(kernels=plan.kernels, shard=plan.shard)
    return function(
        x,
        plan.labels[chunk],
        None if plan.row_weight is None else plan.row_weight[chunk],
        logit_scale=plan.options.logit_scale,
        softcap=plan.options.softcap,
        label_smoothing=plan.options.label_smoothing,
        z_loss=plan.options.z_loss,
        need_grad=need_grad,
        need_stats=plan.need_stats,
        **where,
    )
