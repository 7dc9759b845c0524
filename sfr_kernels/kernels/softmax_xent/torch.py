"""Cross-entropy of rows of logits, and its gradient written over them:

    z = cap · tanh(s x / cap)      lse = log Σ_j exp z_j
    ℓ = lse − (1 − ε) z_y − ε mean(z) + λ_z lse²
    dz = p (1 + 2 λ_z lse) − (1 − ε) onehot(y) − ε / V      dx = w s (1 − (z / cap)²) dz

Rows are taken a few at a time, so that they stay in cache from one operation to the next.
"""

import torch
from torch import Tensor

from .. import RowStats
from .scale import row_blocks

_BLOCK_ELEMENTS = 1 << 19


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
    """row_weight · ℓ (n,) in float32 (float64 for float64 logits), and the statistics if asked for."""
    n, vocab = logits.shape
    wide = torch.promote_types(logits.dtype, torch.float32)
    loss, lse = torch.empty(2, n, dtype=wide, device=logits.device)
    predicted = torch.empty(n if need_stats else 0, dtype=torch.int64, device=logits.device)
    entropy = loss.new_empty(predicted.shape)
    in_place = need_grad and logits.dtype == wide
    for block in row_blocks(logits, _BLOCK_ELEMENTS):
        z = logits[block] if in_place else logits[block].to(wide, copy=True)
        bend = None
        if softcap is not None:
            z.mul_(logit_scale / softcap).tanh_()
            bend = 1 - z.square() if need_grad else None
            z.mul_(softcap)
        elif logit_scale != 1:
            z.mul_(logit_scale)
        y = labels[block].unsqueeze(1)
        if need_stats:
            top, best = z.max(dim=1, keepdim=True)
            predicted[block] = best.squeeze(1)
        else:
            top = z.amax(dim=1, keepdim=True)
        # Relative to the maximum: a large common offset cancels before it can cost digits.
        d = z.sub_(top)
        chosen = d.gather(1, y)
        rest = d.mean(dim=1, keepdim=True) if label_smoothing else None
        e = d.exp() if need_stats else d.exp_()
        total = e.sum(dim=1, keepdim=True)
        log_total = total.log()
        row_lse = top + log_total
        row_loss = log_total - (1 - label_smoothing) * chosen
        if label_smoothing:
            row_loss -= label_smoothing * rest
        if z_loss:
            row_loss += z_loss * row_lse.square()
        weight = torch.ones_like(total) if row_weight is None else row_weight[block].unsqueeze(1).to(wide)
        loss[block] = (row_loss * weight).squeeze(1)
        lse[block] = row_lse.squeeze(1)
        if need_stats:
            moment = d.mul_(e).nan_to_num_(0.0).sum(dim=1, keepdim=True)  # −∞ · 0 is NaN
            entropy[block] = (log_total - moment / total).squeeze(1)
        if need_grad:
            slope = weight * logit_scale
            dz = e.mul_(slope / total * (1 + 2 * z_loss * row_lse))
            if label_smoothing:
                dz.sub_(slope * (label_smoothing / vocab))
            dz.scatter_add_(1, y, (label_smoothing - 1) * slope)
            if bend is not None:
                dz.mul_(bend)
            if not (in_place and dz is z):
                logits[block] = dz
    return loss, RowStats(lse, predicted, entropy, predicted == labels) if need_stats else None
