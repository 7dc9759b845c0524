"""The leaf kernels: one package a backend, the same signatures in each, and the types that they share."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from .room import ACCESS_BYTES, empty_rows

__all__ = ["ACCESS_BYTES", "FlowPath", "RowPartials", "RowStats", "empty_rows"]


class RowStats(NamedTuple):
    """Per-row statistics of the logits."""

    lse: Tensor  # (n,) float32, log-sum-exp
    predicted: Tensor  # (n,) int64, argmax
    entropy: Tensor  # (n,) float32, nats
    correct: Tensor  # (n,) bool, predicted == label


class RowPartials(NamedTuple):
    """What one part of the vocabulary adds to each row's softmax, for labels that may lie in another part.

    All (n,) float32 (float64 for float64 logits), `rest` and `moment` zero where they were not asked for.
    """

    top: Tensor  # the largest logit z
    total: Tensor  # Σ exp(z − top)
    chosen: Tensor  # z of the label, 0 if it is not in this part
    owned: Tensor  # 1 if it is, else 0
    rest: Tensor  # Σ (z − top)
    moment: Tensor  # Σ exp(z − top) (z − top)
    best: Tensor  # where z is largest


@dataclass(frozen=True)
class FlowPath:
    """Where each row lies between noise and data:

    x_0 = source_std · ε(seed, noise_id)        x_1 = target_scale · targets[anchor]        t = times[time_index]
    x_t = (1 − t) x_0 + t x_1                   u = x_1 − x_0
    """

    targets: Tensor  # (A, d), any floating dtype
    times: Tensor  # (M,)
    noise_id: Tensor  # (n,) int64
    anchor: Tensor  # (n,) int32, in [0, A)
    time_index: Tensor  # (n,) int32, in [0, M)
    seed: Tensor  # (1,) int64
    target_scale: float
    source_std: float
