"""In torch operations on whole tensors."""

import torch
from torch import Tensor

from ..philox.torch import gaussian
from . import FlowPath


def flow_path(path: FlowPath, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(dtype, torch.float32)
    u = path.targets.to(wide).mul(path.target_scale)[path.anchor]
    t = path.times.to(wide)[path.time_index].unsqueeze(1)
    if path.source_std == 0:
        return (u * t).to(dtype), u.to(dtype)
    x_0 = gaussian(path.seed, path.noise_id, path.targets.shape[1]).to(wide).mul_(path.source_std)
    u.sub_(x_0)
    return x_0.addcmul_(u, t).to(dtype), u.to(dtype)


def flow_mse(v: Tensor, u: Tensor, coefficient: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
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
