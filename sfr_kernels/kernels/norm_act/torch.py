"""In torch's own LayerNorm and SiLU."""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import EPS


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def norm_act(
    y: Tensor, gamma: Tensor, beta: Tensor, *,
    row_bias: Tensor | None = None, row_index: Tensor | None = None, residual: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    wide = _wide(y)
    if row_bias is not None:
        wide = torch.add(wide, row_bias[row_index], out=wide if wide is y else None)
        if wide is not y:
            y.copy_(wide)
    z, mean, rstd = torch.native_layer_norm(wide, gamma.shape, gamma.to(wide.dtype), beta.to(wide.dtype), EPS)
    out = F.silu(z, inplace=True)
    if residual is not None:
        out.add_(residual)
    return out.to(y.dtype), mean.squeeze(1), rstd.squeeze(1)


def norm_act_backward(
    dout: Tensor, y: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, rstd: Tensor, *,
    row_index: Tensor | None = None, num_bias: int = 1, dy: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    wide, shape = _wide(y), gamma.shape
    gamma, beta, mean, rstd = gamma.to(wide.dtype), beta.to(wide.dtype), mean.unsqueeze(1), rstd.unsqueeze(1)
    z, _, _ = torch.native_layer_norm(wide, shape, gamma, beta, EPS)
    dz = torch.ops.aten.silu_backward(_wide(dout), z)
    wide, dgamma, dbeta = torch.ops.aten.native_layer_norm_backward(
        dz, wide, shape, mean, rstd, gamma, beta, [True, True, True]
    )
    if row_index is None:
        dbias = wide.sum(0, keepdim=True)
    else:
        # in float64: one after the other, as index_add_ adds, hundreds of rows would cost a digit of float32
        dbias = torch.zeros(num_bias, wide.shape[1], dtype=torch.float64, device=wide.device)
        if wide.is_cuda:  # sorts, where index_add_ would add in any order
            dbias.index_put_((row_index.long(),), wide.double(), accumulate=True)
        else:
            dbias.index_add_(0, row_index, wide.double())
        dbias = dbias.to(wide.dtype)
    dy = wide.to(y.dtype) if dy is None else dy.copy_(wide)
    return dy, dgamma, dbeta, dbias
