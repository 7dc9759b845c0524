"""The two halves of `softmax_xent`, for logits of which each process of a group has some columns:

    partials: top = max z      total = Σ exp(z − top)      and what else one part adds (`RowPartials`)
    gradient: dx = w s (1 − (z / cap)²) (share · exp(z − top) − (1 − ε) onehot(y) − uniform)

Between them the processes exchange the partials; top, share = (1 + 2 λ_z lse) / total and uniform = ε / V are then
those of the whole vocabulary.
"""

import torch
from torch import Tensor

from .. import RowPartials
from .scale import row_blocks


def _squash(x: Tensor, wide: torch.dtype, logit_scale: float, softcap: float | None) -> Tensor:
    z = x.to(wide) * logit_scale
    return z if softcap is None else z.div_(softcap).tanh_().mul_(softcap)


def softmax_partials(
    logits: Tensor,  # (n, V), unchanged
    labels: Tensor,  # (n,) int64; outside [0, V): the class is in another part
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    need_rest: bool = False,
    need_stats: bool = False,
) -> RowPartials:
    """What these columns add to each row's softmax, in float32 (float64 for float64 logits)."""
    n, vocab = logits.shape
    wide = torch.promote_types(logits.dtype, torch.float32)
    owned = (labels >= 0) & (labels < vocab)
    out = RowPartials(*torch.zeros(7, n, dtype=wide, device=logits.device))
    out.owned.copy_(owned)
    for block in row_blocks(logits):
        z = _squash(logits[block], wide, logit_scale, softcap)
        top, best = z.max(dim=1, keepdim=True)
        chosen = z.gather(1, labels[block].clamp(0, vocab - 1).unsqueeze(1)).squeeze(1)
        d = z.sub_(torch.where(top == -torch.inf, 0.0, top))  # where no class of this part has a probability
        e = d.exp()
        out.top[block], out.best[block], out.total[block] = top.squeeze(1), best.squeeze(1), e.sum(dim=1)
        out.chosen[block] = torch.where(owned[block], chosen, 0.0)
        if need_rest:
            out.rest[block] = d.sum(dim=1)
        if need_stats:
            out.moment[block] = torch.where(e > 0, e * d, 0.0).sum(dim=1)
    return out


def softmax_gradient(
    logits: Tensor,  # (n, V); holds dlogits afterwards
    labels: Tensor,  # (n,) int64; outside [0, V): the class is in another part
    row_weight: Tensor | None,  # (n,)
    top: Tensor,  # (n,)
    share: Tensor,  # (n,)
    uniform: Tensor,  # zero-dim
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
) -> None:
    """Turns logits into the gradient of row_weight · ℓ, for what is known of their rows in the whole vocabulary."""
    vocab = logits.shape[1]
    slope = torch.full_like(top, logit_scale) if row_weight is None else row_weight.to(top.dtype) * logit_scale
    owned = ((labels >= 0) & (labels < vocab)).to(top.dtype)
    for block in row_blocks(logits):
        z = _squash(logits[block], top.dtype, logit_scale, softcap)
        dz = torch.exp(z - top[block].unsqueeze(1)).mul_(share[block].unsqueeze(1)).sub_(uniform)
        onehot = ((label_smoothing - 1) * owned[block]).unsqueeze(1)
        dz.scatter_add_(1, labels[block].clamp(0, vocab - 1).unsqueeze(1), onehot)
        if softcap is not None:
            dz.mul_(1 - (z / softcap).square())
        logits[block] = dz.mul_(slope[block].unsqueeze(1))
