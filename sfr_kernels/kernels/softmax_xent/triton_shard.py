"""The two halves of `softmax_xent`, for logits of which each process of a group has some columns:

    partials: top = max z      total = Σ exp(z − top)      and what else one part adds (`RowPartials`)
    gradient: dx = w s (1 − (z / cap)²) (share · exp(z − top) − (1 − ε) onehot(y) − uniform)

Between them the processes exchange the partials; top, share = (1 + 2 λ_z lse) / total and uniform = ε / V are then
those of the whole vocabulary. Each is one of the two passes of softmax_xent.py.
"""

import torch
import triton.language as tl
from torch import Tensor

from .. import RowPartials
from .launch import kernel, launch
from .softmax_xent import row_layout, row_sums, squash, write_gradient


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
