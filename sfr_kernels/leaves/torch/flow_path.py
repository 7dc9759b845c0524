"""The flow path of each row, from its identity, anchor and time:

x_0 = source_std · ε(seed, noise_id)        x_1 = target_scale · targets[anchor]
x_t = (1 − t) x_0 + t x_1
"""

import torch
from torch import Tensor

from .. import FlowPath
from .philox import gaussian


def path_ends(path: FlowPath, dtype: torch.dtype) -> tuple[Tensor | None, Tensor]:
    """x_0, None where there is no noise, and x_1, both (n, d)."""
    x_1 = path.targets.to(dtype)[path.anchor].mul_(path.target_scale)
    if path.source_std == 0:
        return None, x_1
    return gaussian(path.seed, path.noise_id, path.targets.shape[1]).to(dtype).mul_(path.source_std), x_1


def flow_path(path: FlowPath, dtype: torch.dtype) -> Tensor:
    """x_t (n, d) in `dtype`."""
    wide = torch.promote_types(dtype, torch.float32)
    x_0, x_1 = path_ends(path, wide)
    t = path.times.to(wide)[path.time_index].unsqueeze(1)
    return (x_1.mul_(t) if x_0 is None else x_0.lerp_(x_1, t)).to(dtype)
