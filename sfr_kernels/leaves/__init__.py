"""The leaf kernels: one package a backend, the same four signatures in each."""

from typing import NamedTuple

from torch import Tensor


class RowStats(NamedTuple):
    """Per-row statistics of the logits."""

    lse: Tensor  # (n,) float32, log-sum-exp
    predicted: Tensor  # (n,) int64, argmax
    entropy: Tensor  # (n,) float32, nats
