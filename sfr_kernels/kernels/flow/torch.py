"""The flow path of each row, from its identity, anchor and time:

x_0 = source_std · ε(seed, noise_id)        x_1 = target_scale · targets[anchor]
x_t = (1 − t) x_0 + t x_1                   u = x_1 − x_0

The matching loss of each row and its gradient:

e = v − u      ℓ = mean_j e²      dv = (2 / d) · coefficient · e      db = Σ_r dv
"""

import torch
from torch import Tensor

from ..philox.torch import gaussian
from . import FlowPath


def flow_path(path: FlowPath, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x_t and u (n, d) in `dtype`."""
    wide = torch.promote_types(dtype, torch.float32)
    u = path.targets.to(wide).mul(path.target_scale)[path.anchor]
    t = path.times.to(wide)[path.time_index].unsqueeze(1)
    if path.source_std == 0:
        return (u * t).to(dtype), u.to(dtype)
    x_0 = gaussian(path.seed, path.noise_id, path.targets.shape[1]).to(wide).mul_(path.source_std)
    u.sub_(x_0)
    return x_0.addcmul_(u, t).to(dtype), u.to(dtype)


def flow_mse(
    v: Tensor,  # (n, d), predicted velocity; holds dv afterwards if there is a coefficient
    u: Tensor,  # (n, d), target velocity
    coefficient: Tensor | None = None,  # (n,) float32; None: no gradient
) -> tuple[Tensor, Tensor | None]:
    """ℓ (n,) and db (d,), in float32 (float64 for float64 v)."""
    wide = torch.promote_types(v.dtype, torch.float32)
    e = v.to(wide) - u.to(wide)
    loss = torch.linalg.vector_norm(e, dim=1).square_().div_(v.shape[1])
    if coefficient is None:
        return loss, None
    factor = coefficient.to(wide).mul(2.0 / v.shape[1]).unsqueeze(1)
    dv = torch.mul(e, factor, out=v if v.dtype == wide else e)
    if dv is not v:
        v.copy_(dv)
    return loss, dv.sum(0)
