"""The training features of the published recipe: the gate of the flow loss's gradient into h, and the head's EMA.

The others are elsewhere: a phase of the head alone is `head.fit_head`, the ramp and the schedule of λ are
`callbacks.schedule_at`.
"""

import math
import weakref
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

_DECAY, _RATIO = 0.99, 1.5
_NARROW = (
    "head_ema needs the velocity head in float32, got {dtype}, which rounds away what a step of the average changes: "
    "model.sfr.head.float() before the optimizer is made (the hidden states may have 16 bits)"
)
COPIES = (
    "head_ema cannot be served: the optimizer steps on copies of the velocity head's parameters (DeepSpeed's ZeRO, "
    "FSDP with flat parameters), which would undo the average. Use DDP or fully_shard, or SFRConfig(head_ema=0)"
)


class FlowGate:
    """Whether L_flow reaches the hidden states: `open`, or closed, where they are detached for it and the head alone
    learns. Decided after each optimizer step, for the next one, from L_flow ℓ of that step:

        average ← ℓ after the first step, then 0.99 · average + 0.01 · ℓ
        open    ← not ℓ < average / 1.5, or not ℓ < rule where the rule is a number

    Before the first step it is open. An ℓ that is not finite changes nothing.
    """

    def __init__(self, rule: float | Literal["average"]):
        self.rule, self.open = rule, True  # a bool, of which a compiler makes two graphs; of a loss, one for each value
        self.average = self.last = math.nan
        self.driven = False  # by anyone, which `guard` asks

    def __repr__(self) -> str:
        return f"FlowGate({self.rule!r}: open={self.open}, average={self.average:g}, last={self.last:g})"

    def update(self, loss: Tensor) -> None:
        """Decides for the next step. loss: zero-dim, L_flow of the step on this process, of which the mean over all
        processes is taken; with the sync that this takes."""
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise TypeError(f"loss must be a tensor with the flow loss of the step, got {loss!r}")
        loss, self.driven = loss.detach().float().reshape(1), True
        if dist.is_available() and dist.is_initialized():
            loss = loss / dist.get_world_size()
            dist.all_reduce(loss)
        if math.isfinite(last := loss.item()):
            first = math.isnan(self.average)
            self.restore([last if first else _DECAY * self.average + (1 - _DECAY) * last, last])

    def state(self) -> list[float]:
        """[running average, last loss], NaN before the first step."""
        return [self.average, self.last]

    def restore(self, state: Sequence[float]) -> None:
        """What `state` gave, of a run that goes on."""
        self.average, self.last = state
        self.open = not self.last < (self.average / _RATIO if self.rule == "average" else self.rule)


class HeadEMA:
    """Replaces the head by decay · before + (1 − decay) · after around each optimizer step. The head is its own average
    then, so there is no other state."""

    def __init__(self) -> None:
        self._before: weakref.WeakKeyDictionary[Optimizer, list] = weakref.WeakKeyDictionary()

    @torch.no_grad()
    def before(self, optimizer: Optimizer, head: Iterable[Tensor]) -> None:
        """Keeps what the optimizer holds of the head. Of optimizers within one another the outermost does."""
        self._before.pop(optimizer, None)
        kept = {id(p) for pairs in self._before.values() for p, _ in pairs}
        held = _held(optimizer) - kept
        mine = [p for p in head if id(p) in held]
        for p in mine:
            _check_served(p)
        self._before[optimizer] = [(p, _local(p).clone()) for p in mine]

    @torch.no_grad()
    def after(self, optimizer: Optimizer, decay: float) -> None:
        if pairs := self._before.pop(optimizer, None):
            now, before = zip(*((_local(p), kept) for p, kept in pairs), strict=True)
            torch._foreach_lerp_(now, before, decay)


def _local(p: Tensor) -> Tensor:
    """The values that this process holds."""
    return p.to_local() if isinstance(p, DTensor) else p.detach()


def _held(optimizer: Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def _check_served(p: Tensor) -> None:
    """RuntimeError for a parameter that cannot be averaged in place."""
    if hasattr(p, "ds_id"):
        raise RuntimeError(COPIES)
    if p.dtype not in (torch.float32, torch.float64):
        raise RuntimeError(_NARROW.format(dtype=p.dtype))


def check_averaged(optimizer: Optimizer, head: Iterable[Tensor]) -> None:
    """RuntimeError if `HeadEMA` cannot average what this optimizer makes of the head."""
    held = _held(optimizer)
    for p in head:
        if id(p) not in held:
            raise RuntimeError(COPIES)
        _check_served(p)
