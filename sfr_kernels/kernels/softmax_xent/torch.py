"""In torch operations on blocks of rows."""

import torch
from torch import Tensor

from .. import row_blocks
from . import RowPartials, RowStats


def softmax_xent(
    logits: Tensor, labels: Tensor, row_weight: Tensor | None = None, *,
    logit_scale: float = 1.0, softcap: float | None = None, label_smoothing: float = 0.0, z_loss: float = 0.0,
    need_grad: bool = True, need_stats: bool = False,
) -> tuple[Tensor, RowStats | None]:  # fmt: skip
    n, vocab = logits.shape
    wide = torch.promote_types(logits.dtype, torch.float32)
    loss, lse = torch.empty(2, n, dtype=wide, device=logits.device)
    predicted = torch.empty(n if need_stats else 0, dtype=torch.int64, device=logits.device)
    entropy = loss.new_empty(predicted.shape)
    in_place = need_grad and logits.dtype == wide
    for block in row_blocks(logits, elements=1 << 19):  # which stay in cache from one operation to the next
        z = logits[block] if in_place else logits[block].to(wide, copy=True)
        tanh_slope = None
        if softcap is not None:
            z.mul_(logit_scale / softcap).tanh_()
            tanh_slope = 1 - z.square() if need_grad else None
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
            if tanh_slope is not None:
                dz.mul_(tanh_slope)
            if not (in_place and dz is z):
                logits[block] = dz
    return loss, RowStats(lse, predicted, entropy, predicted == labels) if need_stats else None


def _z_of(x: Tensor, wide: torch.dtype, logit_scale: float, softcap: float | None) -> Tensor:
    z = x.to(wide) * logit_scale
    return z if softcap is None else z.div_(softcap).tanh_().mul_(softcap)


def softmax_partials(
    logits: Tensor, labels: Tensor, *,
    logit_scale: float = 1.0, softcap: float | None = None, need_rest: bool = False, need_stats: bool = False,
) -> RowPartials:  # fmt: skip
    n, vocab = logits.shape
    wide = torch.promote_types(logits.dtype, torch.float32)
    owned = (labels >= 0) & (labels < vocab)
    out = RowPartials(*torch.zeros(7, n, dtype=wide, device=logits.device))
    out.owned.copy_(owned)
    for block in row_blocks(logits):
        z = _z_of(logits[block], wide, logit_scale, softcap)
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
    logits: Tensor, labels: Tensor, row_weight: Tensor | None, top: Tensor, share: Tensor, uniform: Tensor, *,
    logit_scale: float = 1.0, softcap: float | None = None, label_smoothing: float = 0.0,
) -> None:  # fmt: skip
    vocab = logits.shape[1]
    slope = torch.full_like(top, logit_scale) if row_weight is None else row_weight.to(top.dtype) * logit_scale
    owned = ((labels >= 0) & (labels < vocab)).to(top.dtype)
    for block in row_blocks(logits):
        z = _z_of(logits[block], top.dtype, logit_scale, softcap)
        dz = torch.exp(z - top[block].unsqueeze(1)).mul_(share[block].unsqueeze(1)).sub_(uniform)
        onehot = ((label_smoothing - 1) * owned[block]).unsqueeze(1)
        dz.scatter_add_(1, labels[block].clamp(0, vocab - 1).unsqueeze(1), onehot)
        if softcap is not None:
            dz.mul_(1 - (z / softcap).square())
        logits[block] = dz.mul_(slope[block].unsqueeze(1))
