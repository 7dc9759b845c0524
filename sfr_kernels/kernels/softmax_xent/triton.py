"""Cross-entropy of rows of logits, and its gradient written over them:

    z = cap · tanh(s x / cap)      lse = log Σ_j exp z_j
    ℓ = lse − (1 − ε) z_y − ε mean(z) + λ_z lse²
    dz = p (1 + 2 λ_z lse) − (1 − ε) onehot(y) − ε / V      dx = w s (1 − (z / cap)²) dz

One program a row, two passes over it. The first keeps a running maximum and sums relative to it; the second, only
where there is a gradient, writes dx. Nothing is saved: the gradient is the only thing backward needs.

The two halves of `softmax_xent`, for logits of which each process of a group has some columns:

    partials: top = max z      total = Σ exp(z − top)      and what else one part adds (`RowPartials`)
    gradient: dx = w s (1 − (z / cap)²) (share · exp(z − top) − (1 − ε) onehot(y) − uniform)

Between them the processes exchange the partials; top, share = (1 + 2 λ_z lse) / total and uniform = ε / V are then
those of the whole vocabulary. Each is one of the two passes of softmax_xent.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..philox.triton import tanh
from ..triton import access, columns, kernel, launch
from . import RowPartials, RowStats

# What L2 is to do with the logits that the first pass has read and the second will read again: "evict_last" keeps them
# before what other programs write in the meantime; "evict_normal" does not mark a buffer of many times the L2, row
# after row, as worth keeping. Only a measurement can tell which is faster.
KEPT = tl.constexpr("evict_last")

# The first maximum: finite, so that z = −inf leaves exp(z − top) = 0; no finite z is lower.
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def _exp(x):
    """`tl.exp` without its care of subnormal results: a probability below 2⁻¹²⁶ may as well be 0."""
    return tl.exp2(1.4426950408889634 * x)


@triton.jit
def _moved(moment, total, below, carry):
    """Σ e (z − top) once top has risen by −below, which may be infinite, and exp(below) is carry."""
    return tl.where(carry > 0.0, (moment + total * below) * carry, 0.0)


@triton.jit
def squash(x, rate, softcap, HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """z, and where there is a cap the derivative of tanh: 1 − (z / cap)², without the cancellation."""
    x = x.to(tl.float32)
    if HAS_SCALE or HAS_SOFTCAP:
        x *= rate
    bend = x
    if HAS_SOFTCAP:
        t, bend = tanh(x)
        x = softcap * t
    return x, bend


@triton.jit
def _part_columns(LANES: tl.constexpr, WIDTH: tl.constexpr, ACCESS: tl.constexpr):
    """The columns of a block by lane and place in it. Neighbours lie in one thread where it can read them at once,
    else in neighbouring threads."""
    lane, within = tl.arange(0, LANES)[:, None], tl.arange(0, WIDTH)[None, :]
    return within * LANES + lane if ACCESS == "single" else lane * WIDTH + within


@triton.jit
def _whole(V, ACCESS: tl.constexpr):
    """The columns that come in blocks: all, or those of whole vectors, which the compiler can see to be such."""
    return V if ACCESS == "single" else V // 16 * 16


@triton.jit
def _add(
    z, first, lane_step, step, pivot, mask, top, total, moment, rest, best,
    NEED_REST: tl.constexpr, NEED_STATS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The sums of every lane (LANES,) and its next columns z (LANES, ·), which lie `step` apart."""
    if NEED_STATS:
        high, index = tl.max(z, axis=1, return_indices=True)
        best = tl.where(high > top, first + tl.arange(0, LANES) * lane_step + index * step, best)
    else:
        high = tl.max(z, axis=1)
    high = tl.maximum(top, high)
    below = top - high
    carry = _exp(below)
    d = z - high[:, None]
    e = _exp(d)
    if NEED_STATS:
        moment = _moved(moment, total, below, carry) + tl.sum(tl.where(e > 0.0, e * d, 0.0), axis=1)
    total = total * carry + tl.sum(e, axis=1)
    if NEED_REST:
        rest += tl.sum(tl.where(mask, z - pivot, 0.0), axis=1)
    return high, total, moment, rest, best


@triton.jit
def _together(lane_top, total, moment, rest, best, top, V):
    """The sums of lanes as those of one, whose maximum is `top`."""
    below = lane_top - top
    carry = _exp(below)
    moment = tl.sum(_moved(moment, total, below, carry), axis=0)
    best = tl.min(tl.where(lane_top == top, best, V - 1), axis=0)
    return tl.sum(total * carry, axis=0), moment, tl.sum(rest, axis=0), best


@triton.jit
def row_sums(
    x_ptr, x_col, label_ptr, V, rate, softcap,
    HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr, NEED_REST: tl.constexpr, NEED_STATS: tl.constexpr,
    READ_AGAIN: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr, ACCESS: tl.constexpr,
):  # fmt: skip
    """One pass over a row: top = max z, Σ exp(z − top), Σ exp(z − top) (z − top), Σ (z − top), argmax z; and
    x[label], NaN if there is none.

    A block is (LANES, WIDTH) columns; a lane, which lies in one thread, has its own maximum and sums until the row is
    over, so that no thread waits for another between the blocks.
    """
    lane_step: tl.constexpr = 1 if ACCESS == "single" else WIDTH
    step: tl.constexpr = LANES if ACCESS == "single" else 1
    policy: tl.constexpr = KEPT if READ_AGAIN else "evict_first"
    offs_block = _part_columns(LANES, WIDTH, ACCESS)
    whole = _whole(V, ACCESS)
    top = tl.full((LANES,), LOWEST, dtype=tl.float32)
    total = tl.zeros((LANES,), dtype=tl.float32)
    moment = tl.zeros((LANES,), dtype=tl.float32)
    rest = tl.zeros((LANES,), dtype=tl.float32)
    best = tl.zeros((LANES,), dtype=tl.int32)
    pivot = 0.0
    if NEED_REST:
        # Σ (z − pivot) instead of Σ z: a large common offset cancels before it can cost digits.
        pivot = squash(tl.load(x_ptr), rate, softcap, HAS_SCALE, HAS_SOFTCAP)[0]
        pivot = tl.where(pivot > float("-inf"), pivot, 0.0)
    x = tl.load(
        columns(x_ptr, x_col, offs_block, ACCESS), mask=offs_block < whole, other=float("-inf"), eviction_policy=policy
    )
    for first in range(0, whole, LANES * WIDTH):
        offs = first + offs_block
        mask = offs < whole
        ahead = offs + LANES * WIDTH
        next_x = tl.load(
            columns(x_ptr, x_col, ahead, ACCESS), mask=ahead < whole, other=float("-inf"), eviction_policy=policy
        )
        z = squash(x, rate, softcap, HAS_SCALE, HAS_SOFTCAP)[0]
        if HAS_SCALE or HAS_SOFTCAP:
            z = tl.where(mask, z, float("-inf"))
        x = next_x
        top, total, moment, rest, best = _add(
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
        z = squash(x, rate, softcap, HAS_SCALE, HAS_SOFTCAP)[0]
        if HAS_SCALE or HAS_SOFTCAP:
            z = tl.where(mask, z, float("-inf"))
        low, none = tl.full((16,), LOWEST, dtype=tl.float32), tl.zeros((16,), dtype=tl.float32)
        end_top, end_total, end_moment, end_rest, end_best = _add(
            z, whole, 1, 1, pivot, mask, low, none, none, none, none.to(tl.int32), NEED_REST, NEED_STATS, 16
        )
        top = tl.maximum(top, tl.max(end_top, axis=0))
        end_total, end_moment, end_rest, end_best = _together(
            end_top, end_total, end_moment, end_rest, end_best, top, V
        )
    total, moment, rest, best = _together(lane_top, total, moment, rest, best, top, V)
    if ACCESS == "ragged":
        total, moment, rest, best = total + end_total, moment + end_moment, rest + end_rest, tl.minimum(best, end_best)
    return top, total, moment, rest + V * (pivot - top), best, label, x_label


@triton.jit
def _write(
    at, offs, mask, label, rate, softcap, top, share, label_share, uniform,
    HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_SMOOTHING: tl.constexpr,
):  # fmt: skip
    x = tl.load(at, mask=mask, other=0.0, eviction_policy="evict_first")
    z, bend = squash(x, rate, softcap, HAS_SCALE, HAS_SOFTCAP)
    dx = _exp(z - top) * share
    if HAS_SMOOTHING:
        dx -= uniform
    dx = tl.where(offs == label.to(tl.int32), dx - label_share, dx)
    if HAS_SOFTCAP:
        dx *= bend
    tl.store(at, dx.to(x.dtype), mask=mask, eviction_policy="evict_first")


@triton.jit
def write_gradient(
    x_ptr, x_col, V, label, rate, softcap, top, share, label_share, uniform,
    HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_SMOOTHING: tl.constexpr,
    LANES: tl.constexpr, WIDTH: tl.constexpr, ACCESS: tl.constexpr,
):  # fmt: skip
    """(share · exp(z − top) − label_share · onehot − uniform) · (1 − (z / cap)²) over a row's logits, in float32 until
    it is stored."""
    offs_block = _part_columns(LANES, WIDTH, ACCESS)
    whole = _whole(V, ACCESS)
    blocks = tl.cdiv(whole, LANES * WIDTH)
    # From the end: what was read last is what caches still hold.
    for back in range(blocks):
        offs = (blocks - 1 - back) * (LANES * WIDTH) + offs_block
        _write(
            columns(x_ptr, x_col, offs, ACCESS), offs, offs < whole, label, rate, softcap, top, share, label_share,
            uniform, HAS_SCALE, HAS_SOFTCAP, HAS_SMOOTHING,
        )  # fmt: skip
    if ACCESS == "ragged":
        end = whole + tl.arange(0, 16)
        _write(
            x_ptr + end, end, end < V, label, rate, softcap, top, share, label_share, uniform,
            HAS_SCALE, HAS_SOFTCAP, HAS_SMOOTHING,
        )  # fmt: skip


@kernel
def _softmax_xent_kernel(
    x_ptr, x_row, x_col, label_ptr, weight_ptr, loss_ptr, lse_ptr, predicted_ptr, entropy_ptr,
    V, logit_scale, softcap, label_smoothing, z_loss,
    HAS_WEIGHT: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_SMOOTHING: tl.constexpr,
    HAS_Z_LOSS: tl.constexpr, NEED_GRAD: tl.constexpr, NEED_STATS: tl.constexpr,
    LANES: tl.constexpr, WIDTH: tl.constexpr, ACCESS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_row
    weight = tl.load(weight_ptr + row).to(tl.float32) if HAS_WEIGHT else 1.0
    rate = logit_scale / softcap if HAS_SOFTCAP else logit_scale
    top, total, moment, rest, best, label, x_label = row_sums(
        x_ptr, x_col, label_ptr + row, V, rate, softcap,
        HAS_SCALE, HAS_SOFTCAP, HAS_SMOOTHING, NEED_STATS, NEED_GRAD, LANES, WIDTH, ACCESS,
    )  # fmt: skip
    log_total = tl.log(total)
    lse = top + log_total
    z_label = squash(x_label, rate, softcap, HAS_SCALE, HAS_SOFTCAP)[0]
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
        write_gradient(
            x_ptr, x_col, V, label, rate, softcap, top, share,
            slope * (1.0 - label_smoothing), slope * (label_smoothing / V),
            HAS_SCALE, HAS_SOFTCAP, HAS_SMOOTHING, LANES, WIDTH, ACCESS,
        )  # fmt: skip


def row_layout(logits: Tensor, more: int) -> dict:
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


def softmax_xent(
    logits: Tensor,  # (n, V); holds dlogits afterwards if need_grad
    labels: Tensor,  # (n,) int64 in [0, V)
    row_weight: Tensor | None = None,  # (n,) float32
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    need_grad: bool = True,
    need_stats: bool = False,
) -> tuple[Tensor, RowStats | None]:
    """row_weight · ℓ (n,) in float32, and the statistics if asked for."""
    n, vocab = logits.shape
    loss = torch.empty(n, dtype=torch.float32, device=logits.device)
    stats = (torch.empty_like(loss), torch.empty_like(labels), torch.empty_like(loss)) if need_stats else (None,) * 3
    launch(
        _softmax_xent_kernel,
        (n,),
        logits,
        *logits.stride(),
        labels.contiguous(),
        None if row_weight is None else row_weight.contiguous(),
        loss,
        *stats,
        vocab,
        float(logit_scale),
        1.0 if softcap is None else float(softcap),
        float(label_smoothing),
        float(z_loss),
        HAS_WEIGHT=row_weight is not None,
        HAS_SCALE=logit_scale != 1,
        HAS_SOFTCAP=softcap is not None,
        HAS_SMOOTHING=label_smoothing != 0,
        HAS_Z_LOSS=z_loss != 0,
        NEED_GRAD=need_grad,
        NEED_STATS=need_stats,
        **row_layout(logits, 2 if need_stats else int(softcap is not None or label_smoothing != 0)),
    )
    return loss, RowStats(*stats, stats[1] == labels) if need_stats else None


@kernel
def _softmax_partials_kernel(
    x_ptr, x_row, x_col, label_ptr, out_ptr, n, V, logit_scale, softcap,
    HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr, NEED_REST: tl.constexpr, NEED_STATS: tl.constexpr,
    LANES: tl.constexpr, WIDTH: tl.constexpr, ACCESS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    rate = logit_scale / softcap if HAS_SOFTCAP else logit_scale
    top, total, moment, rest, best, label, x_label = row_sums(
        x_ptr + row * x_row, x_col, label_ptr + row, V, rate, softcap,
        HAS_SCALE, HAS_SOFTCAP, NEED_REST, NEED_STATS, True, LANES, WIDTH, ACCESS,
    )  # fmt: skip
    owned = tl.where(label >= 0, label < V, False)
    chosen = squash(x_label, rate, softcap, HAS_SCALE, HAS_SOFTCAP)[0]
    tl.store(out_ptr + row, top)
    tl.store(out_ptr + n + row, total)
    tl.store(out_ptr + 2 * n + row, tl.where(owned, chosen, 0.0))
    tl.store(out_ptr + 3 * n + row, owned.to(tl.float32))
    tl.store(out_ptr + 4 * n + row, rest if NEED_REST else 0.0)
    tl.store(out_ptr + 5 * n + row, moment)
    tl.store(out_ptr + 6 * n + row, best.to(tl.float32))


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
    write_gradient(
        x_ptr + row * x_row, x_col, V, label, logit_scale / softcap if HAS_SOFTCAP else logit_scale, softcap, top,
        slope * share, slope * (1.0 - label_smoothing), uniform,
        HAS_SCALE, HAS_SOFTCAP, HAS_SMOOTHING, LANES, WIDTH, ACCESS,
    )  # fmt: skip


def softmax_partials(
    logits: Tensor,  # (n, V), unchanged
    labels: Tensor,  # (n,) int64; outside [0, V): the class is in another part
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    need_rest: bool = False,
    need_stats: bool = False,
) -> RowPartials:
    """What these columns add to each row's softmax, in float32."""
    n, vocab = logits.shape
    out = torch.empty(7, n, dtype=torch.float32, device=logits.device)
    launch(
        _softmax_partials_kernel,
        (n,),
        logits,
        *logits.stride(),
        labels.contiguous(),
        out,
        n,
        vocab,
        float(logit_scale),
        1.0 if softcap is None else float(softcap),
        HAS_SCALE=logit_scale != 1,
        HAS_SOFTCAP=softcap is not None,
        NEED_REST=need_rest,
        NEED_STATS=need_stats,
        **row_layout(logits, 2 if need_stats else int(softcap is not None or need_rest)),
    )
    return RowPartials(*out)


def softmax_gradient(
    logits: Tensor,  # (n, V); holds dlogits afterwards
    labels: Tensor,  # (n,) int64; outside [0, V): the class is in another part
    row_weight: Tensor | None,  # (n,) float32
    top: Tensor,  # (n,) float32
    share: Tensor,  # (n,) float32
    uniform: Tensor,  # zero-dim float32
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
) -> None:
    """Turns logits into the gradient of row_weight · ℓ, for what is known of their rows in the whole vocabulary."""
    n, vocab = logits.shape
    launch(
        _softmax_gradient_kernel,
        (n,),
        logits,
        *logits.stride(),
        labels.contiguous(),
        None if row_weight is None else row_weight.contiguous(),
        top.contiguous(),
        share.contiguous(),
        uniform,
        vocab,
        float(logit_scale),
        1.0 if softcap is None else float(softcap),
        float(label_smoothing),
        HAS_WEIGHT=row_weight is not None,
        HAS_SCALE=logit_scale != 1,
        HAS_SOFTCAP=softcap is not None,
        HAS_SMOOTHING=label_smoothing != 0,
        **row_layout(logits, 1 + (softcap is not None or label_smoothing != 0)),
    )
