"""Whether the flow loss does anything to the model: what an attachment measures at the steps that are logged, and what
the logs make of it. Nothing of it changes a bit of the training.

`Attachment.health` (SIZE,) is that of one forward, and adds up over the micro-batches and processes of a step:

    ‖∂L_CE/∂h‖², ‖∂(λ L_flow)/∂h‖²   0 where they cannot be had
    gap, 1                           0, 0 where there is none
    Σ w ℓ (4,), Σ w (4,)             over rows with t in [0, ¼), [¼, ½), [½, ¾) and [¾, 1]; 0 but for loss="flow"

Gap and sums are of a few rows and times, which is enough for a mean over steps: all would take 1% of a small model's
step. The times have the distribution of the training's, but are no draws, so that of 64 rows each quarter has some.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional
from transformers.trainer_utils import IntervalStrategy, has_length

from ..config import SFRConfig
from ..ops import flow_matching_loss
from ..rows import SupervisedRows

QUARTERS = ("flow_loss_t00", "flow_loss_t25", "flow_loss_t50", "flow_loss_t75")  # by where in [0, 1] one begins, in %
SIZE = 4 + 2 * len(QUARTERS)  # of `health`
_ROWS = 64  # at most; and times
_STEP = 39  # between the times of two rows: odd and near 64 / φ, so that those of fewer rows are spread, too


def has_norms(config: SFRConfig, hidden: Tensor, options: dict) -> bool:
    """Whether the norms of the gradients at h can be had, with these options of the loss."""
    whole = (config.loss in ("flow", "mse") and not options.get("lora")) or not torch.compiler.is_compiling()
    return hidden.requires_grad and options.get("flow_hidden") is None and whole


def rows_config(config: SFRConfig) -> SFRConfig:
    """That of the loss of a few rows; made beforehand, since a compiler cannot trace it."""
    return replace(config, flow_normalizer="tokens")


@torch.no_grad()
def health_of(
    hidden: Tensor,  # (B, L, H), the hidden states that the head is shown
    head: Any,  # VelocityHead
    rows: SupervisedRows,
    targets: Tensor,
    seed: int | Tensor,
    norms: Tensor,  # (2,), of `sfr_loss`
    *,
    config: SFRConfig,  # of `rows_config`
    backend: str | None,
) -> Tensor:
    """`health`, in the dtype of the norms."""
    n = rows.num_flow
    count = min(n, _ROWS)
    if count < 2 or config.loss in ("mtp", "cka"):
        return functional.pad(norms, (0, SIZE - 2))
    order = torch.arange(count, device=rows.device)
    some, index = order * n // count, _STEP * order % _ROWS
    place, weight = rows.rows[some], rows.weight[some]
    few = rows.replace(
        noise_id=rows.noise_id[some], anchor=rows.anchor[some], labels=rows.labels[some], time_index=index.int(),
        num_flow=count, num_ce=0,
    )  # fmt: skip
    times, parts = None, [weight]
    if not config.is_dirac:
        times = ((torch.arange(_ROWS, dtype=torch.float32, device=rows.device) + 0.5) / _ROWS) ** config.time_power
        quarter = (len(QUARTERS) * times).long()[index]
        parts = [torch.where(quarter == q, weight, 0.0) for q in range(len(QUARTERS))]

    def total(place: Tensor, weight: Tensor) -> Tensor:
        """Σ w ℓ of the few rows, each shown the hidden state at its `place`."""
        return flow_matching_loss(
            hidden, head, few.replace(rows=place, weight=weight), targets, times, seed=seed, normalizer=1.0,
            config=config, backend=backend,
        ).to(norms)  # fmt: skip

    own = torch.stack([total(place, part) for part in parts])
    exchanged = total(place.roll(count // 2), weight)  # the states half the batch away
    gap = (exchanged - own.sum()) / weight.sum()
    found = [norms, torch.stack([gap, torch.ones_like(gap)])]
    if not config.is_dirac:
        found += [own, torch.stack(parts).sum(1).to(norms)]
    return functional.pad(torch.cat(found), (0, SIZE - sum(map(len, found))))


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
    """`flow_share`, `flow_gap` and the losses of QUARTERS of a step: of the sums over its forwards on all processes,
    without what has none."""
    sums = torch.stack([*health]).sum(0, dtype=torch.float32)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(sums)
    ce, flow, gap, gaps, *quarters = sums.tolist()
    values = {"flow_share": math.sqrt(flow / ce)} if ce > 0 else {}
    if gaps:
        values["flow_gap"] = gap / gaps
    losses, weights = quarters[: len(QUARTERS)], quarters[len(QUARTERS) :]
    return values | {name: x / w for name, x, w in zip(QUARTERS, losses, weights, strict=True) if w}
