"""The chunk loop of the cross-entropy of a linear layer, over rows that are all supervised.

Per chunk of rows the logits are made in one reused buffer, turned into their gradient in place, and multiplied out at
once: dW += dzᵀ h, dh = dz W. With adapters, whose h Aᵀ is `low` and whose B is `up` (lora.py), likewise
z = low upᵀ + h Wᵀ, dup += dzᵀ low, dlow = dz up.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels import empty_rows
from ..kernels.softmax_xent import RowStats, softmax_xent
from .autograd import OF_ROWS, Inputs, Need
from .numerics import aligned, product_into, wide_dtype
from .vocab_parallel import VocabShard, sharded_softmax_xent

# Rows of a product at which cuBLAS reaches its rate; at some larger counts, 4096 among them, it is a fifth slower.
_PRODUCT_ROWS, _MANY_ROWS = 2048, 8192
# The buffer of logits has a multiple of so many rows: with a size for every number of supervised rows, the allocator
# would keep a gigabyte block for each, that fits no other request.
_BUFFER_ROWS = 256
_CPU_ROWS = 512


class LogitLoss(NamedTuple):
    """How the logits of supervised rows become losses, and how they are held in memory."""

    labels: Tensor  # (n,) int64
    row_weight: Tensor | None = None  # (n,)
    softcap: float | None = None
    logit_scale: float = 1.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    logits_dtype: torch.dtype | None = None  # None: that of hidden
    chunk_rows: int = 0  # 0: chunk_rows_for decides
    accum_dtype: torch.dtype | None = None
    need_stats: bool = False
    debug: bool = False
    group: str = ""  # name of the process group over which the vocabulary is spread; empty: there is none
    vocab_start: int = 0

    def options(self) -> dict[str, Any]:
        """The options of the formula, by name."""
        names = ("softcap", "logit_scale", "label_smoothing", "z_loss")
        return {name: getattr(self, name) for name in names}

    def dweight_dtype(self, most: int, hidden: Tensor) -> torch.dtype:
        """The dtype in which dW is summed, for at most so many rows: float32 where it may be a sum over chunks, unless
        the caller chose. One chunk needs no accumulator, but in fp16 a sum over thousands of rows overflows or loses
        digits."""
        dtype = hidden.dtype
        rows = self.chunk_rows or chunk_rows_for(most, hidden.shape[1], self.logits_dtype or dtype, True)
        return dtype if rows >= most and dtype != torch.float16 else self.accum_dtype or wide_dtype(dtype)

    def empty_stats(self, h: Tensor, n: int) -> RowStats:
        """Uninitialised statistics of n rows of logits h Wᵀ; of no row where they are not asked for."""
        wide = wide_dtype(h.dtype)
        dtypes = (wide, torch.int64, wide, torch.bool)
        return RowStats(*(h.new_empty(n if self.need_stats else 0, dtype=t) for t in dtypes))


def chunk_rows_for(n: int, hidden_size: int, dtype: torch.dtype, trained_head: bool, on_cpu: bool = False) -> int:
    """Rows of logits held at once.

    Trained head: all of them while they take no more memory than the float32 dW accumulator that a single chunk saves
    (n · itemsize ≤ 4 H; float16 needs one all the same), else equal chunks of at most 1.4 H rows: every chunk reads and
    writes the accumulator. Logits and accumulator take, in 16 bit, 2.4 times the weight's bytes beyond the gradient.
    Frozen head: chunks of at most H / 2 rows. Never below 1024: small products waste the machine.
    On a CPU, in a dtype in which dW is its own accumulator: at most 512 rows, enough for the products' full rate, so
    that fewer pages of the buffer are mapped at every call.
    """
    if on_cpu:
        return max(1, -(-n // max(1, -(-n // _CPU_ROWS))))
    if trained_head and dtype != torch.float16 and n * dtype.itemsize <= 4 * hidden_size:
        return max(n, 1)
    most = max(1024, 7 * hidden_size // 5 if trained_head else hidden_size // 2)
    chunks = max(1, -(-n // most))
    return max(1, -(-n // chunks))


def product_blocks(rows: int) -> list[slice]:
    """Blocks of rows in which a product of so many rows is made: all at once up to 2048 and from 8192 on, else equal
    blocks of at most 2048, a multiple of 128."""
    step = max(rows, 1)
    if _PRODUCT_ROWS < rows < _MANY_ROWS:
        step = -(-rows // -(-rows // _PRODUCT_ROWS))
        step = -(-step // 128) * 128
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _logits(x: Inputs, chunk: slice, out: Tensor) -> Tensor:
    """h Wᵀ + b in `out`, whose dtype may be wider than that of the factors; rounded once, bias included. With adapters
    what they add is made and rounded first, and the sum of all is rounded once."""
    h, bias = x.hidden[chunk], x.bias
    products = [(h, x.weight)] if x.low is None else [(x.low[chunk], x.up), (h, x.weight)]
    with_bias = bias is not None and out.dtype == h.dtype
    for block in product_blocks(h.shape[0]):
        for i, (rows, matrix) in enumerate(products):
            if i == 0 and with_bias:
                torch.addmm(bias, rows[block], matrix.T, out=out[block])
            else:
                product_into(out[block], rows[block], matrix.T, add=i > 0)
    return out if bias is None or with_bias else out.add_(bias)


def run_chunks(
    backend: str,
    x: Inputs,  # hidden (n, H) and low (n, r) of the rows
    loss: LogitLoss,
    need: Need,
    dweight_dtype: torch.dtype,
    dh: Tensor | None = None,  # (n, H), where to write the gradient of h; may be h
) -> tuple[Tensor, RowStats, Sequence[Tensor]]:
    """The chunk loop: row losses (n,) in float32 (float64 for float64), their statistics, and the gradients of
    Σ_r row_weight[r] ℓ_r, empty where not needed: dh, dW in `dweight_dtype` and db in the dtype of the losses; with
    adapters dlow, and dup in the dtype of the losses. Where H or r is odd, rows are padded."""
    h, (n, hidden_size) = x.hidden, x.hidden.shape
    grad = any(need[:-1])
    wide, logits_dtype = wide_dtype(h.dtype), loss.logits_dtype or h.dtype
    shard = VocabShard(loss.group, loss.vocab_start, loss.debug) if loss.group else None
    on_cpu = h.is_cpu and h.dtype == wide
    rows = loss.chunk_rows or chunk_rows_for(n, hidden_size, logits_dtype, need.weight, on_cpu)
    rows = max(1, min(rows, n))
    h, weight, vocab = aligned(h), aligned(x.weight), x.weight.shape[0]
    x = x._replace(hidden=h, weight=weight)
    buffer_rows = rows if loss.chunk_rows or rows < _BUFFER_ROWS else -(-rows // _BUFFER_ROWS) * _BUFFER_ROWS
    buffer = empty_rows(buffer_rows, vocab, logits_dtype, h.device)
    losses, stats = h.new_empty(n, dtype=wide), loss.empty_stats(h, n)
    partial = h.dtype if shard is None else wide  # a part of a sum over the group
    if not need.hidden:
        dh = h.new_empty(0, 0)
    elif dh is None or shard is not None:
        dh = empty_rows(n, hidden_size, partial, h.device)
    dw = empty_rows(vocab, hidden_size, dweight_dtype, h.device) if need.weight else h.new_empty(0)
    db = h.new_zeros(vocab, dtype=wide) if need.bias else h.new_empty(0)
    grads, back = [dh, dw, db], [(dh, weight)] if need.hidden else []
    across = [(dw, h)] if need.weight else []
    if x.up is not None:
        low, up = aligned(x.low), aligned(x.up)
        x, rank = x._replace(low=low, up=up), up.shape[1]
        dlow = empty_rows(n, rank, partial, h.device) if need.low else h.new_empty(0, 0)
        dup = empty_rows(vocab, rank, wide, h.device) if need.up else h.new_empty(0)
        grads += [dlow, dup]
        back += [(dlow, up)] if need.low else []
        across += [(dup, low)] if need.up else []
    for total, _ in across if n == 0 else ():
        total.zero_()
    for start in range(0, n, rows):
        chunk = slice(start, min(start + rows, n))
        z = _logits(x, chunk, buffer[: chunk.stop - start])
        row_weight = None if loss.row_weight is None else loss.row_weight[chunk]
        options = dict(loss.options(), need_grad=grad, need_stats=loss.need_stats)
        if shard is None:
            losses[chunk], found = softmax_xent(backend, z, loss.labels[chunk], row_weight, **options)
        else:
            losses[chunk], found = sharded_softmax_xent(backend, shard, z, loss.labels[chunk], row_weight, **options)
        if found is not None:
            for to, values in zip(stats, found, strict=True):
                to[chunk] = values
        if grad:
            dz = z if z.dtype == h.dtype else empty_rows(*z.shape, h.dtype, h.device).copy_(z)
            for total, factor in across:
                product_into(total, dz.T, factor[chunk], add=start > 0)
            if need.bias:
                db += z.sum(0, dtype=wide)
            for out, factor in back:
                for block in product_blocks(dz.shape[0]):
                    product_into(out[chunk][block], dz[block], factor)
    if shard is not None:
        grads = [
            shard.sum(g.contiguous()).to(h.dtype) if i in OF_ROWS and g.numel() else g for i, g in enumerate(grads)
        ]
    return losses, stats, grads
