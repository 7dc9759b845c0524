"""The flow path of each row, from its identity, anchor and time:

x_0 = source_std · ε(seed, noise_id)        x_1 = target_scale · targets[anchor]
x_t = (1 − t) x_0 + t x_1                   u = x_1 − x_0
"""

import torch
from torch import Tensor

from .philox import gaussian


def flow_path(
    targets: Tensor,  # (A, d), any floating dtype
    times: Tensor,  # (M,)
    noise_id: Tensor,  # (n,) int64
    anchor: Tensor,  # (n,) int32, in [0, A)
    time_index: Tensor,  # (n,) int32, in [0, M)
    seed: int | Tensor,
    *,
    target_scale: float,
    source_std: float,
    dtype: torch.dtype,  # of x_t
) -> tuple[Tensor, Tensor]:
    """x_t (n, d) in `dtype`, and the target velocity u (n, d) in float32 (float64 for a float64 `dtype`)."""
    wide = torch.promote_types(dtype, torch.float32)
    u = targets.to(wide)[anchor].mul_(target_scale)  # x_1
    if source_std == 0:
        x_t = u * times.to(wide)[time_index].unsqueeze(1)
    else:
        x_0 = gaussian(seed, noise_id, targets.shape[1]).to(wide).mul_(source_std)
        x_t = torch.lerp(x_0, u, times.to(wide)[time_index].unsqueeze(1))
        u.sub_(x_0)
    return x_t.to(dtype), u
