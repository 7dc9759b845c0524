"""The matching loss of each row and its gradient, in one read:

e = v − u      ℓ = mean_j e²      dv = (2 / d) · coefficient · e      db = Σ_r dv
"""

import torch
from torch import Tensor


def flow_mse(
    v: Tensor,  # (n, d), predicted velocity
    u: Tensor,  # (n, d), target velocity
    coefficient: Tensor | None = None,  # (n,) float32; None: no gradient
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """ℓ (n,) in float32, dv (n, d) in v's dtype, db (d,) in float32."""
    e = v.to(torch.promote_types(v.dtype, torch.float32)) - u
    loss = e.square().mean(dim=1)
    if coefficient is None:
        return loss, None, None
    dv = e.mul_(coefficient.to(e.dtype).mul(2.0 / v.shape[1]).unsqueeze(1))
    return loss, dv.to(v.dtype), dv.sum(0)
