"""The matching loss of each row and its gradient, the target velocity made again rather than kept:

u = x_1 − x_0      e = v − u      ℓ = mean_j e²      dv = (2 / d) · coefficient · e      db = Σ_r dv
"""

import torch
from torch import Tensor

from .. import FlowPath
from .flow_path import path_ends


def flow_mse(
    v: Tensor,  # (n, d), predicted velocity; holds dv afterwards if there is a coefficient
    path: FlowPath,
    coefficient: Tensor | None = None,  # (n,) float32; None: no gradient
) -> tuple[Tensor, Tensor | None]:
    """ℓ (n,) and db (d,), in float32 (float64 for float64 v)."""
    x_0, x_1 = path_ends(path, torch.promote_types(v.dtype, torch.float32))
    e = x_1.sub_(v) if x_0 is None else x_1.sub_(x_0).sub_(v)  # −e
    loss = e.square().mean(dim=1)
    if coefficient is None:
        return loss, None
    dv = e.mul_(coefficient.to(e.dtype).mul(-2.0 / v.shape[1]).unsqueeze(1))
    v.copy_(dv)
    return loss, dv.sum(0)
