"""Cross-entropy of logits whose columns are spread over a process group (tensor-parallel lm_head).

Every process has the same rows and all labels, and the columns from `start` on. Per chunk of rows the processes
exchange eight numbers a row, from which each finds log-sum-exp, loss and statistics of the whole vocabulary, in one
order and so with the same bits; after the last chunk they sum dh, in float32.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels.softmax_xent import RowPartials, RowStats, softmax_gradient, softmax_partials


@dataclass(frozen=True)
class VocabShard:
    """Which part of the vocabulary this process has."""

    group_name: str
    start: int  # the class of its first column
    debug: bool = False  # check the labels at once, a device sync

    @property
    def group(self) -> "dist.ProcessGroup":
        return dist.distributed_c10d._resolve_process_group(self.group_name)

    def gather(self, x: Tensor) -> Tensor:
        """(world, *x.shape), those of every process in order of rank."""
        group = self.group
        out = x.new_empty(dist.get_world_size(group), *x.shape)
        dist.all_gather(list(out.unbind(0)), x.contiguous(), group=group)
        return out

    def sum(self, x: Tensor) -> Tensor:
        """x summed over the group, in place."""
        dist.all_reduce(x, group=self.group)
        return x


def sharded_softmax_xent(
    backend: str,
    shard: VocabShard,
    logits: Tensor,  # (n, V of this process); holds dlogits afterwards if need_grad
    labels: Tensor,  # (n,) int64, classes of the whole vocabulary
    row_weight: Tensor | None = None,  # (n,)
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    need_grad: bool = True,
    need_stats: bool = False,
) -> tuple[Tensor, RowStats | None]:
    """`softmax_xent` over all columns. A label that not exactly one process has is a ValueError on the CPU and under
    `debug`, else a NaN."""
    local = labels - shard.start
    z = dict(logit_scale=logit_scale, softcap=softcap)
    part = softmax_partials(backend, logits, local, **z, need_rest=label_smoothing != 0, need_stats=need_stats)
    columns = torch.full_like(part.top, logits.shape[1])
    *parts, columns = shard.gather(torch.stack([*part[:-1], part.best + shard.start, columns])).unbind(1)
    parts = RowPartials(*parts)  # (world, n) each

    top, where = parts.top.max(dim=0)
    below = parts.top - top
    carry = below.exp()
    total = (parts.total * carry).sum(0)
    log_total, vocab = total.log(), columns[:, :1].sum()
    lse = top + log_total
    loss = log_total - (1 - label_smoothing) * (_label_logit(parts, labels, shard.debug) - top)
    if label_smoothing:
        loss -= label_smoothing / vocab * (parts.rest + columns * below).sum(0)
    if z_loss:
        loss += z_loss * lse.square()
    if row_weight is not None:
        loss *= row_weight
    stats = None
    if need_stats:
        predicted = parts.best.gather(0, where.unsqueeze(0)).squeeze(0).long()
        moment = torch.where(carry > 0, (parts.moment + parts.total * below) * carry, 0.0).sum(0)
        stats = RowStats(lse, predicted, log_total - moment / total, predicted == labels)
    if need_grad:
        share, uniform = (1 + 2 * z_loss * lse) / total, label_smoothing / vocab
        softmax_gradient(backend, logits, local, row_weight, top, share, uniform, **z, label_smoothing=label_smoothing)
    return loss, stats


def _label_logit(parts: RowPartials, labels: Tensor, debug: bool) -> Tensor:
    """The label's logit, which one process has."""
    owners = parts.owned.sum(0)
    if (labels.is_cpu or debug) and (owners != 1).any():
        row = int((owners != 1).nonzero()[0])
        raise ValueError(
            f"labels must be classes that exactly one process has: {labels[row].item()} is on {int(owners[row])} "
            "(check labels and every process's vocab_start)"
        )
    return torch.where(owners == 1, parts.chosen.sum(0), float("nan"))
