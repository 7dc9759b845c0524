"""The flow path of each row, from its identity, anchor and time, and the matching loss:

x_0 = source_std · ε(seed, noise_id)        x_1 = target_scale · targets[anchor]        t = times[time_index]
x_t = (1 − t) x_0 + t x_1                   u = x_1 − x_0
e = v − u      ℓ = mean_j e²      dv = (2 / d) · coefficient · e      db = Σ_r dv
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..backend import dispatch


class FlowPath(NamedTuple):
    """Where each row lies between noise and data."""

    targets: Tensor  # (A, d), any floating dtype
    times: Tensor  # (M,)
    noise_id: Tensor  # (n,) int64
    anchor: Tensor  # (n,) int32, in [0, A)
    time_index: Tensor  # (n,) int32, in [0, M)
    seed: Tensor  # (1,) int64
    target_scale: float
    source_std: float


@dispatch
def flow_path(path: FlowPath, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x_t and u (n, d) in `dtype`, rounded once from float32."""


@dispatch
def flow_mse(
    v: Tensor,  # (n, d), predicted velocity; holds dv afterwards if there is a coefficient
    u: Tensor,  # (n, d), target velocity
    coefficient: Tensor | None = None,  # (n,) float32; None: no gradient
) -> tuple[Tensor, Tensor | None]:
    """ℓ (n,) and db (d,), in float32 (float64 for float64 v)."""
