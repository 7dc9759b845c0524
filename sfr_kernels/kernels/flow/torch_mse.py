"""The matching loss of each row and its gradient:

e = v − u      ℓ = mean_j e²      dv = (2 / d) · coefficient · e      db = Σ_r dv
"""

import torch
from torch import Tensor


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
