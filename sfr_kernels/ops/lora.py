"""Low-rank adapters of the decoder (LoRA, arXiv 2106.09685): what they add to the logits, Σ s · (drop(h) Aᵀ) Bᵀ.

The part of rank r, low = s · drop(h) Aᵀ, is small, and autograd differentiates it: that has A's gradient, the scale and
dropout. The operators take it as one more input beside h, and B beside W; several adapters lie side by side along r.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .autograd import Inputs


class LoRA(NamedTuple):
    """An adapter of the decoder: its logits are scale · (dropout(hidden) downᵀ) upᵀ."""

    down: Tensor  # (r, H), PEFT's lora_A
    up: Tensor  # (V, r), PEFT's lora_B
    scale: float = 1.0  # PEFT's scaling
    dropout: float = 0.0  # probability, of entries of hidden: of every token, by torch's generator; 0 in evaluation


def adapters_of(lora: LoRA | Sequence[LoRA] | None) -> Sequence[LoRA]:
    return () if lora is None else (lora,) if isinstance(lora, LoRA) else lora


def low_rank(hidden: Tensor, adapters: Sequence[LoRA]) -> Tensor:  # (N, H) → (N, r)
    """What `up_of` is multiplied with; differentiable."""
    parts = [
        F.linear(F.dropout(hidden, a.dropout) if a.dropout else hidden, a.down.to(hidden.dtype)) * a.scale
        for a in adapters
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def with_adapters(x: Inputs, adapters: Sequence[LoRA]) -> Inputs:
    """The inputs of an operator with those of the adapters; the same where there are none."""
    if not adapters:
        return x
    parts = [a.up.to(x.hidden.dtype) for a in adapters]
    up = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    return x._replace(low=low_rank(x.hidden, adapters), up=up)
