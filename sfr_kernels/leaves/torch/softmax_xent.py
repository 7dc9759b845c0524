"""Cross-entropy of rows of logits, and its gradient written over them:

    z = cap · tanh(s x / cap)      lse = log Σ_j exp z_j
    ℓ = lse − (1 − ε) z_y − ε mean(z) + λ_z lse²
    dz = p (1 + 2 λ_z lse) − (1 − ε) onehot(y) − ε / V      dx = w s (1 − (z / cap)²) dz

Rows are taken a few at a time, so that the float32 copies stay in cache whatever the number of rows.
"""

import torch
from torch import Tensor

from .. import RowStats

_BLOCK_ELEMENTS = 1 << 20


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
    step = max(1, _BLOCK_ELEMENTS // vocab)
    for start in range(0, n, step):
        block = slice(start, start + step)
        z = logits[block].to(wide) * logit_scale
        if softcap is not None:
            z = z.div_(softcap).tanh_().mul_(softcap)
        y = labels[block].unsqueeze(1)
        top, best = z.max(dim=1, keepdim=True)
        # Relative to the maximum: a large common offset cancels before it can cost digits.
        chosen = z.gather(1, y) - top
        p = torch.exp(z - top)
        total = p.sum(dim=1, keepdim=True)
        log_total = total.log()
        row_lse = top + log_total
        row_loss = log_total - (1 - label_smoothing) * chosen
        if label_smoothing:
            row_loss -= label_smoothing * (z - top).mean(dim=1, keepdim=True)
        if z_loss:
            row_loss += z_loss * row_lse.square()
        weight = None if row_weight is None else row_weight[block].unsqueeze(1).to(wide)
        loss[block] = (row_loss if weight is None else row_loss * weight).squeeze(1)
        lse[block] = row_lse.squeeze(1)
        if need_stats:
            predicted[block] = best.squeeze(1)
            moment = torch.where(p > 0, p * (z - top), 0.0).sum(dim=1, keepdim=True)
            entropy[block] = (log_total - moment / total).squeeze(1)
        if need_grad:
            dz = p.div_(total)
            if z_loss:
                dz.mul_(1 + 2 * z_loss * row_lse)
            if label_smoothing:
                dz.sub_(label_smoothing / vocab)
            dz.scatter_add_(1, y, torch.full_like(chosen, label_smoothing - 1))
            if softcap is not None:
                dz.mul_(1 - (z / softcap).square())
            if weight is not None:
                dz.mul_(weight)
            logits[block] = dz.mul_(logit_scale) if logit_scale != 1.0 else dz
    return loss, RowStats(lse, predicted, entropy, predicted == labels) if need_stats else None
