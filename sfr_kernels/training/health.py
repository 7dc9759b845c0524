"""Whether the flow loss does anything to the model: what an attachment measures at the steps that are logged, and what
the logs make of it. Nothing of it changes a bit of the training.

`Attachment.health` (4,) is that of one forward: the squared norms of ∂L_CE/∂h and ∂(λ L_flow)/∂h, the gap, and whether
there is one. They add up over the micro-batches of a step: the gap is a sum of as many. Norms that cannot be had are 0.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers.trainer_utils import IntervalStrategy, has_length

from ..config import SFRConfig
from ..ops import flow_matching_loss
from ..rows import SupervisedRows

SIZE = 4  # of `health`
_ROWS = 64  # whose loss is compared with that at another row's hidden state; and times


def has_norms(config: SFRConfig, hidden: Tensor) -> bool:
    """Whether the norms of the gradients at h can be had."""
    whole = config.loss in ("flow", "mse") or not torch.compiler.is_compiling()
    return hidden.requires_grad and whole


def gap_config(config: SFRConfig) -> SFRConfig:
    """That of the gap; made beforehand, since a compiler cannot trace it."""
    return replace(config, num_times=_ROWS, flow_normalizer="tokens")


@torch.no_grad()
def health_of(
    hidden: Tensor,  # (B, L, H), the hidden states that the head is shown
    head: Any,  # VelocityHead
    rows: SupervisedRows,
    targets: Tensor,
    seed: int | Tensor,
    norms: Tensor | None,  # (2,), of `sfr_loss`
    *,
    config: SFRConfig,  # of `gap_config`
    backend: str | None,
) -> Tensor:
    """`health`, in float32 at least."""
    norms = hidden.new_zeros(2, dtype=torch.float32) if norms is None else norms
    return torch.cat([norms, _gap(hidden, head, rows, targets, seed, config, backend).to(norms)])


def _gap(hidden, head, rows, targets, seed, config, backend) -> Tensor:
    """(2,): the weighted mean of ℓ where each row is given another one's hidden state, minus that of ℓ, and 1; zeros
    where there is none. Over a few rows and times, which is enough for a mean over steps: all of them would take 1% of
    a small model's step."""
    n = rows.num_flow
    count = min(n, _ROWS)
    if count < 2 or config.loss in ("mtp", "cka"):
        return hidden.new_zeros(2, dtype=torch.float32)
    some = torch.arange(count, device=rows.device) * n // count
    twice, weight, place = some.repeat(2), rows.weight[some], rows.rows[some]
    pairs = rows.replace(  # ℓ of each with weight −w, and with the state half the batch away with weight w
        rows=torch.cat([place, place.roll(count // 2)]), weight=torch.cat([-weight, weight]),
        noise_id=rows.noise_id[twice], anchor=rows.anchor[twice], labels=rows.labels[twice],
        time_index=None if rows.time_index is None else rows.time_index[twice], num_flow=2 * count, num_ce=0,
    )  # fmt: skip
    gap = flow_matching_loss(
        hidden, head, pairs, targets, seed=seed, normalizer=weight.sum(), backend=backend, config=config
    )
    return torch.stack([gap, torch.ones_like(gap)]).float()


def will_log(args, state, batches) -> bool:
    """Whether Trainer logs the step that begins; `batches` is its loader. Of a stream, whose end is not known, the only
    end of an epoch is that of the run."""
    step = state.global_step + 1
    if step == 1 and args.logging_first_step:
        return True
    if args.logging_strategy == IntervalStrategy.EPOCH:
        per_epoch = -(-len(batches) // args.gradient_accumulation_steps) if has_length(batches) else state.max_steps
        return step % per_epoch == 0 or step == state.max_steps
    return args.logging_strategy == IntervalStrategy.STEPS and step % state.logging_steps == 0


def health_values(health: Sequence[Tensor]) -> dict[str, float]:
    """`flow_share` and `flow_gap` of a step: the sums over its forwards on all processes, without what has none."""
    sums = torch.stack([*health]).sum(0, dtype=torch.float32)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(sums)
    ce, flow, gap, gaps = sums.tolist()
    values = {"flow_share": math.sqrt(flow / ce)} if ce > 0 else {}
    return values | ({"flow_gap": gap / gaps} if gaps else {})
