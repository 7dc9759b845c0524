"""The flow path of each row, from its identity, anchor and time:

x_0 = source_std · ε(seed, noise_id)        x_1 = target_scale · targets[anchor]
x_t = (1 − t) x_0 + t x_1                   u = x_1 − x_0
"""

import torch
from torch import Tensor

from .. import FlowPath
from .philox import gaussian


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
