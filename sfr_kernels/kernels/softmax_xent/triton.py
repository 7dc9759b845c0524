"""One program a row, two passes over it: `_row_sums` keeps a running maximum and sums relative to it, `_write_gradient`
writes dx if it is wanted. Nothing else is saved for backward. `softmax_partials` is the first pass
alone, `softmax_gradient` the second.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..elementary import exp, tanh
from ..triton import access, columns, kernel, launch
from . import RowPartials, RowStats

# What L2 does with the logits that the first pass has read and the second will read again: "evict_last" prefers them to
# what other programs write in the meantime; "", no policy, would not mark a buffer many times the size of L2 as worth
# keeping. Only a measurement can tell which is faster.
KEPT = "evict_last"

# The first maximum: finite, so that z = −inf leaves exp(z − top) = 0; no finite z is lower.
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def _z_of(x, rate, softcap, HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """z, and where there is a cap the derivative of tanh: 1 − (z / cap)², without the cancellation."""
    x = x.to(tl.float32)
    if HAS_SCALE or HAS_SOFTCAP:
        x *= rate
    tanh_slope = x
    if HAS_SOFTCAP:
        t, tanh_slope = tanh(x)
        x = softcap * t
    return x, tanh_slope


@triton.jit
def _block_columns(LANES: tl.constexpr, WIDTH: tl.constexpr, ACCESS: tl.constexpr):
    """The columns of a block by lane and place in it. Neighbours lie in one thread where it can read them at once,
    else in neighbouring threads."""
    lane, within = tl.arange(0, LANES)[:, None], tl.arange(0, WIDTH)[None, :]
    return within * LANES + lane if ACCESS == "single" else lane * WIDTH + within


@triton.jit
def _columns_in_blocks(V, ACCESS: tl.constexpr):
    """How many columns are read in blocks: all, or those of whole vectors, a multiple of 16 that the compiler sees."""
    return V if ACCESS == "single" else V // 16 * 16


@triton.jit
def _rebased_moment(moment, total, below, carry):
    """Σ e (z − top) once top has risen by −below, which may be infinite, and exp(below) is carry."""
    return tl.where(carry > 0.0, (moment + total * below) * carry, 0.0)


@triton.jit
def _add_columns(
    z, first, lane_step, step, pivot, mask, top, total, moment, rest, best,
    NEED_REST: tl.constexpr, NEED_STATS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The sums of every lane (LANES,) with its next columns z (LANES, ·), which lie `step` apart, added."""
    if NEED_STATS:
        high, index = tl.max(z, axis=1, return_indices=True)
        best = tl.where(high > top, first + tl.arange(0, LANES) * lane_step + index * step, best)
    else:
        high = tl.max(z, axis=1)
    high = tl.maximum(top, high)
    below = top - high
    carry = exp(below)
    d = z - high[:, None]
    e = exp(d)
    if NEED_STATS:
        moment = _rebased_moment(moment, total, below, carry) + tl.sum(tl.where(e > 0.0, e * d, 0.0), axis=1)
    total = total * carry + tl.sum(e, axis=1)
    if NEED_REST:
        rest += tl.sum(tl.where(mask, z - pivot, 0.0), axis=1)
    return high, total, moment, rest, best


@triton.jit
def _sum_lanes(lane_top, total, moment, rest, best, top, V):
    """The sums of all lanes together, relative to their maximum `top`."""
    below = lane_top - top
    carry = exp(below)
    moment = tl.sum(_rebased_moment(moment, total, below, carry), axis=0)
    best = tl.min(tl.where(lane_top == top, best, V - 1), axis=0)
    return tl.sum(total * carry, axis=0), moment, tl.sum(rest, axis=0), best


@triton.jit
def _row_sums(
    x_ptr, x_col, label_ptr, V, rate, softcap,
    HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr, NEED_REST: tl.constexpr, NEED_STATS: tl.constexpr,
    POLICY: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr, ACCESS: tl.constexpr,
):  # fmt: skip
    """One pass over a row: top = max z, Σ exp(z − top), Σ exp(z − top) (z − top), Σ (z − top), argmax z; and
    x[label], NaN if there is none.

    A block is (LANES, WIDTH) columns; a lane, which lies in one thread, has its own maximum and sums until the row is
    over, so that no thread waits for another between the blocks.
    """
    lane_step: tl.constexpr = 1 if ACCESS == "single" else WIDTH
    step: tl.constexpr = LANES if ACCESS == "single" else 1
    offs_block = _block_columns(LANES, WIDTH, ACCESS)
    whole = _columns_in_blocks(V, ACCESS)
    top = tl.full((LANES,), LOWEST, dtype=tl.float32)
    total = tl.zeros((LANES,), dtype=tl.float32)
    moment = tl.zeros((LANES,), dtype=tl.float32)
    rest = tl.zeros((LANES,), dtype=tl.float32)
    best = tl.zeros((LANES,), dtype=tl.int32)
    pivot = 0.0
    if NEED_REST:
        # Σ (z − pivot) instead of Σ z: a large common offset cancels before it can cost digits.
        pivot = _z_of(tl.load(x_ptr), rate, softcap, HAS_SCALE, HAS_SOFTCAP)[0]
        pivot = tl.where(pivot > float("-inf"), pivot, 0.0)
    x = tl.load(
        columns(x_ptr, x_col, offs_block, ACCESS), mask=offs_block < whole, other=float("-inf"), eviction_policy=POLICY
    )
    for first in range(0, whole, LANES * WIDTH):
        offs = first + offs_block
        mask = offs < whole
        ahead = offs + LANES * WIDTH
        next_x = tl.load(
            columns(x_ptr, x_col, ahead, ACCESS), mask=ahead < whole, other=float("-inf"), eviction_policy=POLICY
        )
        z = _z_of(x, rate, softcap, HAS_SCALE, HAS_SOFTCAP)[0]
        if HAS_SCALE or HAS_SOFTCAP:
            z = tl.where(mask, z, float("-inf"))
        x = next_x
        top, total, moment, rest, best = _add_columns(
            z, first, lane_step, step, pivot, mask, top, total, moment, rest, best, NEED_REST, NEED_STATS, LANES
        )
    # On their way while the lanes are added up, and not before the row: what is the same for all threads is waited for
    # as soon as it is asked for, and the row's first loads would wait too.
    label = tl.load(label_ptr)
    x_label = tl.load(x_ptr + label * x_col, mask=tl.where(label >= 0, label < V, False), other=float("nan"))
    lane_top = top
    top = tl.max(lane_top, axis=0)
    if ACCESS == "ragged":
        # The last columns, which no vector may touch: sixteen lanes more.
        offs = whole + tl.arange(0, 16)[:, None]
        mask = offs < V
        x = tl.load(x_ptr + offs, mask=mask, other=float("-inf"))
        z = _z_of(x, rate, softcap, HAS_SCALE, HAS_SOFTCAP)[0]
        if HAS_SCALE or HAS_SOFTCAP:
            z = tl.where(mask, z, float("-inf"))
        low, none = tl.full((16,), LOWEST, dtype=tl.float32), tl.zeros((16,), dtype=tl.float32)
        end_top, end_total, end_moment, end_rest, end_best = _add_columns(
            z, whole, 1, 1, pivot, mask, low, none, none, none, none.to(tl.int32), NEED_REST, NEED_STATS, 16
        )
        top = tl.maximum(top, tl.max(end_top, axis=0))
        end_total, end_moment, end_rest, end_best = _sum_lanes(
            end_top, end_total, end_moment, end_rest, end_best, top, V
        )
    total, moment, rest, best = _sum_lanes(lane_top, total, moment, rest, best, top, V)
    if ACCESS == "ragged":
        total, moment, rest, best = total + end_total, moment + end_moment, rest + end_rest, tl.minimum(best, end_best)
    return top, total, moment, rest + V * (pivot - top), best, label, x_label


@triton.jit
def _write_columns(
    at, offs, mask, label, rate, softcap, top, share, label_share, uniform,
    HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_SMOOTHING: tl.constexpr,
):  # fmt: skip
    x = tl.load(at, mask=mask, other=0.0, eviction_policy="evict_first")
    z, tanh_slope = _z_of(x, rate, softcap, HAS_SCALE, HAS_SOFTCAP)
    dx = exp(z - top) * share
    if HAS_SMOOTHING:
        dx -= uniform
    dx = tl.where(offs == label.to(tl.int32), dx - label_share, dx)
    if HAS_SOFTCAP:
        dx *= tanh_slope
    tl.store(at, dx.to(x.dtype), mask=mask, eviction_policy="evict_first")


@triton.jit
def _write_gradient(
    x_ptr, x_col, V, label, rate, softcap, top, share, label_share, uniform,
    HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_SMOOTHING: tl.constexpr,
    LANES: tl.constexpr, WIDTH: tl.constexpr, ACCESS: tl.constexpr,
):  # fmt: skip
    """(share · exp(z − top) − label_share · onehot − uniform) · (1 − (z / cap)²) over a row's logits, in float32 until
    it is stored."""
    offs_block = _block_columns(LANES, WIDTH, ACCESS)
    whole = _columns_in_blocks(V, ACCESS)
    blocks = tl.cdiv(whole, LANES * WIDTH)
    # From the end: what was read last is what caches still hold.
    for back in range(blocks):
        offs = (blocks - 1 - back) * (LANES * WIDTH) + offs_block
        _write_columns(
            columns(x_ptr, x_col, offs, ACCESS), offs, offs < whole, label, rate, softcap, top, share, label_share,
            uniform, HAS_SCALE, HAS_SOFTCAP, HAS_SMOOTHING,
        )  # fmt: skip
    if ACCESS == "ragged":
        end = whole + tl.arange(0, 16)
        _write_columns(
            x_ptr + end, end, end < V, label, rate, softcap, top, share, label_share, uniform,
            HAS_SCALE, HAS_SOFTCAP, HAS_SMOOTHING,
        )  # fmt: skip


def _row_layout(logits: Tensor, more: int) -> dict:
    """LANES, WIDTH, ACCESS and num_warps. more: what a thread holds beside logits and sums; 0 nothing, 1 some, 2 much.

    A thread has four 16-byte loads in flight: 64 KiB a multiprocessor where it holds 1024 threads, more than an H100's
    memory needs to be busy. It reads about 256 bytes of the row in all. So the rows of the 1024 threads take 256 KiB
    together, 34 MB on the chip, and the second pass finds them in its 50 MB of L2. At V = 128256 in bf16 that is one
    program of 1024 threads with at most 64 registers each, of which a cap or smoothing needs some: two loads.
    Statistics, or the gradient alone with either, need much: two loads and 512 threads.
    """
    vocab, size = logits.shape[1], logits.element_size()
    warps = min(16 if more == 2 else 32, max(1, triton.next_power_of_2(triton.cdiv(vocab * size, 32 * 256))))
    how = access(vocab, logits)
    if how == "single":
        warps = min(warps, 8) if more == 1 else warps  # more spill
        return dict(LANES=32 * warps, WIDTH=8, ACCESS=how, num_warps=warps)
    loads = 2 if more else 4
    return dict(LANES=loads * 32 * warps, WIDTH=16 // size, ACCESS=how, num_warps=warps)


@kernel
def _softmax_xent_kernel(
    x_ptr, x_row, x_col, label_ptr, weight_ptr, loss_ptr, lse_ptr, predicted_ptr, entropy_ptr,
    V, logit_scale, softcap, label_smoothing, z_loss,
    HAS_WEIGHT: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_SMOOTHING: tl.constexpr,
    HAS_Z_LOSS: tl.constexpr, NEED_GRAD: tl.constexpr, NEED_STATS: tl.constexpr,
    POLICY: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr, ACCESS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_row
    weight = tl.load(weight_ptr + row).to(tl.float32) if HAS_WEIGHT else 1.0
    rate = logit_scale / softcap if HAS_SOFTCAP else logit_scale
    top, total, moment, rest, best, label, x_label = _row_sums(
        x_ptr, x_col, label_ptr + row, V, rate, softcap,
        HAS_SCALE, HAS_SOFTCAP, HAS_SMOOTHING, NEED_STATS, POLICY, LANES, WIDTH, ACCESS,
    )  # fmt: skip
    log_total = tl.log(total)
    lse = top + log_total
    z_label = _z_of(x_label, rate, softcap, HAS_SCALE, HAS_SOFTCAP)[0]
    loss = log_total - (1.0 - label_smoothing) * (z_label - top)
    if HAS_SMOOTHING:
        loss -= label_smoothing * (rest / V)
    if HAS_Z_LOSS:
        loss += z_loss * lse * lse
    tl.store(loss_ptr + row, loss * weight)
    if NEED_STATS:
        tl.store(lse_ptr + row, lse)
        tl.store(predicted_ptr + row, best.to(tl.int64))
        tl.store(entropy_ptr + row, log_total - moment / total)

    if NEED_GRAD:
        slope = weight * logit_scale
        share = slope / total
        if HAS_Z_LOSS:
            share *= 1.0 + 2.0 * z_loss * lse
        _write_gradient(
            x_ptr, x_col, V, label, rate, softcap, top, share,
            slope * (1.0 - label_smoothing), slope * (label_smoothing / V),
            HAS_SCALE, HAS_SOFTCAP, HAS_SMOOTHING, LANES, WIDTH, ACCESS,
        )  # fmt: skip


def softmax_xent(
    logits: Tensor, labels: Tensor, row_weight: Tensor | None = None, *,
    logit_scale: float = 1.0, softcap: float | None = None, label_smoothing: float = 0.0, z_loss: float = 0.0,
    need_grad: bool = True, need_stats: bool = False,
) -> tuple[Tensor, RowStats | None]:  # fmt: skip
    n, vocab = logits.shape
    loss = torch.empty(n, dtype=torch.float32, device=logits.device)
    stats = (torch.empty_like(loss), torch.empty_like(labels), torch.empty_like(loss)) if need_stats else (None,) * 3
    has_softcap, has_smoothing = softcap is not None, label_smoothing != 0
    launch(
        _softmax_xent_kernel, (n,), logits, *logits.stride(), labels.contiguous(),
        None if row_weight is None else row_weight.contiguous(), loss, *stats, vocab,
        float(logit_scale), float(softcap or 1.0), float(label_smoothing), float(z_loss),
        HAS_WEIGHT=row_weight is not None, HAS_SCALE=logit_scale != 1, HAS_SOFTCAP=has_softcap,
        HAS_SMOOTHING=has_smoothing, HAS_Z_LOSS=z_loss != 0, NEED_GRAD=need_grad, NEED_STATS=need_stats,
        POLICY=KEPT if need_grad else "evict_first",
        **_row_layout(logits, 2 if need_stats else int(has_softcap or has_smoothing)),
    )  # fmt: skip
    return loss, RowStats(*stats, stats[1] == labels) if need_stats else None


@kernel
def _softmax_partials_kernel(
    x_ptr, x_row, x_col, label_ptr, out_ptr, n, V, logit_scale, softcap,
    HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr, NEED_REST: tl.constexpr, NEED_STATS: tl.constexpr,
    POLICY: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr, ACCESS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    rate = logit_scale / softcap if HAS_SOFTCAP else logit_scale
    top, total, moment, rest, best, label, x_label = _row_sums(
        x_ptr + row * x_row, x_col, label_ptr + row, V, rate, softcap,
        HAS_SCALE, HAS_SOFTCAP, NEED_REST, NEED_STATS, POLICY, LANES, WIDTH, ACCESS,
    )  # fmt: skip
    owned = tl.where(label >= 0, label < V, False)
    chosen = _z_of(x_label, rate, softcap, HAS_SCALE, HAS_SOFTCAP)[0]
    tl.store(out_ptr + row, top)
    tl.store(out_ptr + n + row, total)
    tl.store(out_ptr + 2 * n + row, tl.where(owned, chosen, 0.0))
    tl.store(out_ptr + 3 * n + row, owned.to(tl.float32))
    tl.store(out_ptr + 4 * n + row, rest if NEED_REST else 0.0)
    tl.store(out_ptr + 5 * n + row, moment)
    tl.store(out_ptr + 6 * n + row, best.to(tl.float32))


def softmax_partials(
    logits: Tensor, labels: Tensor, *,
    logit_scale: float = 1.0, softcap: float | None = None, need_rest: bool = False, need_stats: bool = False,
) -> RowPartials:  # fmt: skip
    n, vocab = logits.shape
    out = torch.empty(7, n, dtype=torch.float32, device=logits.device)
    launch(
        _softmax_partials_kernel, (n,), logits, *logits.stride(), labels.contiguous(), out, n, vocab,
        float(logit_scale), float(softcap or 1.0),
        HAS_SCALE=logit_scale != 1, HAS_SOFTCAP=softcap is not None, NEED_REST=need_rest, NEED_STATS=need_stats,
        POLICY=KEPT,
        **_row_layout(logits, 2 if need_stats else int(softcap is not None or need_rest)),
    )  # fmt: skip
    return RowPartials(*out)


@kernel
def _softmax_gradient_kernel(
    x_ptr, x_row, x_col, label_ptr, weight_ptr, top_ptr, share_ptr, uniform_ptr,
    V, logit_scale, softcap, label_smoothing,
    HAS_WEIGHT: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_SMOOTHING: tl.constexpr,
    LANES: tl.constexpr, WIDTH: tl.constexpr, ACCESS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    label, top, share = tl.load(label_ptr + row), tl.load(top_ptr + row), tl.load(share_ptr + row)
    slope = logit_scale
    if HAS_WEIGHT:
        slope *= tl.load(weight_ptr + row).to(tl.float32)
    uniform = slope * tl.load(uniform_ptr) if HAS_SMOOTHING else 0.0
    _write_gradient(
        x_ptr + row * x_row, x_col, V, label, logit_scale / softcap if HAS_SOFTCAP else logit_scale, softcap, top,
        slope * share, slope * (1.0 - label_smoothing), uniform,
        HAS_SCALE, HAS_SOFTCAP, HAS_SMOOTHING, LANES, WIDTH, ACCESS,
    )  # fmt: skip


def softmax_gradient(
    logits: Tensor, labels: Tensor, row_weight: Tensor | None, top: Tensor, share: Tensor, uniform: Tensor, *,
    logit_scale: float = 1.0, softcap: float | None = None, label_smoothing: float = 0.0,
) -> None:  # fmt: skip
    n, vocab = logits.shape
    has_softcap, has_smoothing = softcap is not None, label_smoothing != 0
    launch(
        _softmax_gradient_kernel, (n,), logits, *logits.stride(), labels.contiguous(),
        None if row_weight is None else row_weight.contiguous(), top.contiguous(), share.contiguous(), uniform, vocab,
        float(logit_scale), float(softcap or 1.0), float(label_smoothing),
        HAS_WEIGHT=row_weight is not None, HAS_SCALE=logit_scale != 1, HAS_SOFTCAP=has_softcap,
        HAS_SMOOTHING=has_smoothing, **_row_layout(logits, 1 + (has_softcap or has_smoothing)),
    )  # fmt: skip
