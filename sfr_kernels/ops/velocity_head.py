"""The velocity head over the leaves, forward and backward by hand (DESIGN sections 1 and 2).

    a = SiLU(LN(W_x x_t + W_h s h + (W_τ τ(t) + b)))    the bracket has one row per distinct time, not per token
    a = a + SiLU(LN(W_i a + b_i))                       num_layers − 2 times
    v = W_o a + b_o

Products run in the dtype of `hidden`, to which the parameters are cast; the time path, M rows of it, in float32.
Gradients of parameters come back in float32 or in the dtype of the products, whichever they were made in.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import reference
from .dispatch import leaves, resolve_backend
from .numerics import autocast_dtype, scaled, wide_dtype


@dataclass(frozen=True)
class HeadShape:
    """What the parameters do not say by themselves."""

    hidden_size: int
    target_size: int
    width: int
    num_blocks: int
    time_scale: float
    hidden_scale: float


@dataclass
class HeadWeights:
    """The head's parameters, `VelocityHead.parameters()` in order, ready for the products."""

    flat: list[Tensor]
    shape: HeadShape
    dtype: torch.dtype

    def __post_init__(self):
        self.w1, self.b1, self.w2, self.b2 = (p.detach().to(wide_dtype(self.dtype)) for p in self.flat[:4])
        rest = [p.detach() for p in self.flat[4:]]
        w_in, self.b_in, self.gamma_in, self.beta_in = rest[:4]
        d = self.shape.target_size
        self.w_x = w_in[:, :d].to(self.dtype)
        self.w_h = (w_in[:, 2 * d :] * self.shape.hidden_scale).to(self.dtype)
        self.w_tau = w_in[:, d : 2 * d].to(wide_dtype(self.dtype))
        self.blocks = [
            (rest[k].to(self.dtype), rest[k + 1].to(self.dtype), rest[k + 2], rest[k + 3])
            for k in range(4, 4 + 4 * self.shape.num_blocks, 4)
        ]
        self.w_out, self.b_out = (p.to(self.dtype) for p in rest[-2:])


@dataclass
class HeadActivations:
    """What forward leaves for backward."""

    inputs: list[Tensor]  # per normed layer: its input a, (n, D); the first is h, (n, H)
    normed: list[tuple[Tensor, Tensor, Tensor]]  # per normed layer: y (n, D), mean and rstd (n,)
    a: Tensor  # (n, D), input of the output layer
    x_t: Tensor | None  # (n, d)
    time: tuple[Tensor, ...]  # sinusoid, pre-activation, activation and τ, each (M, d)


def sinusoid(times: Tensor, size: int, time_scale: float) -> Tensor:
    """(M, size) in the dtype of `times`; DESIGN section 1, τ(t)."""
    half = size // 2
    exponent = torch.arange(half, dtype=times.dtype, device=times.device) / max(half - 1, 1)
    angle = torch.outer(times * time_scale, torch.pow(10000.0, -exponent))
    out = times.new_zeros(times.shape[0], size)
    torch.sin(angle, out=out[:, :half])
    torch.cos(angle, out=out[:, half : 2 * half])
    return out


def head_forward(
    leaves,
    weights: HeadWeights,
    h: Tensor,  # (n, H)
    x_t: Tensor | None,  # (n, d); None is x_t = 0
    times: Tensor,  # (M,)
    time_index: Tensor,  # (n,) int32
) -> tuple[Tensor, HeadActivations]:
    """v (n, d) and what backward needs."""
    w = weights
    s = sinusoid(times.to(w.w1.dtype), w.shape.target_size, w.shape.time_scale)
    z = torch.addmm(w.b1, s, w.w1.T)
    silu = F.silu(z)
    tau = torch.addmm(w.b2, silu, w.w2.T)
    table = torch.addmm(w.b_in.to(tau.dtype), tau, w.w_tau.T)

    y = h @ w.w_h.T
    if x_t is not None:
        y.addmm_(x_t, w.w_x.T)
    a, mean, rstd = leaves.norm_act(y, w.gamma_in, w.beta_in, row_bias=table, row_index=time_index)
    inputs, normed = [h], [(y, mean, rstd)]
    for weight, bias, gamma, beta in w.blocks:
        y = torch.addmm(bias, a, weight.T)
        out, mean, rstd = leaves.norm_act(y, gamma, beta, residual=a)
        inputs.append(a)
        normed.append((y, mean, rstd))
        a = out
    return torch.addmm(w.b_out, a, w.w_out.T), HeadActivations(inputs, normed, a, x_t, (s, z, silu, tau))


def head_backward(
    leaves,
    weights: HeadWeights,
    saved: HeadActivations,
    dv: Tensor,  # (n, d)
    db_out: Tensor,  # (d,), Σ dv
    time_index: Tensor,  # (n,) int32
    dh: Tensor | None,  # (n, H), to which the gradient of h is added; None if it is not needed
) -> list[Tensor]:
    """Gradients of the parameters, in the order of `weights.flat`."""
    w = weights
    da = dv @ w.w_out
    tail = [dv.T @ saved.a, db_out]
    for block in range(len(w.blocks) - 1, -1, -1):
        weight, _, gamma, beta = w.blocks[block]
        y, mean, rstd = saved.normed[block + 1]
        dy, dgamma, dbeta, dbias = leaves.norm_act_backward(da, y, gamma, beta, mean, rstd)
        tail = [dy.T @ saved.inputs[block + 1], dbias[0], dgamma, dbeta, *tail]
        da = torch.addmm(da, dy, weight)
    y, mean, rstd = saved.normed[0]
    dy, dgamma, dbeta, dtable = leaves.norm_act_backward(
        da, y, w.gamma_in, w.beta_in, mean, rstd, row_index=time_index, num_bias=saved.time[0].shape[0]
    )
    s, z, silu, tau = saved.time
    dw_tau, dtau = dtable.T @ tau, dtable @ w.w_tau
    sigma = torch.sigmoid(z)
    dz = (dtau @ w.w2) * sigma * (1 + z * (1 - sigma))
    time_grads = [dz.T @ s, dz.sum(0), dtau.T @ silu, dtau.sum(0)]

    h, x_t = saved.inputs[0], saved.x_t
    dw_h = (dy.T @ h).mul_(w.shape.hidden_scale)
    dw_x = torch.zeros_like(w.w_x) if x_t is None else dy.T @ x_t
    dw_in = torch.cat([g.to(dw_tau.dtype) for g in (dw_x, dw_tau, dw_h)], dim=1)
    if dh is not None:
        dh.addmm_(dy, w.w_h)
    return [*time_grads, dw_in, dtable.sum(0), dgamma, dbeta, *tail]


class _VelocityHead(torch.autograd.Function):
    """The head alone, with an upstream gradient for v: what cosine and mtp are built on."""

    @staticmethod
    def forward(ctx, h, x_t, times, time_index, leaves, shape, *params):
        weights = HeadWeights(list(params), shape, h.dtype)
        v, ctx.saved = head_forward(leaves, weights, h, x_t, times, time_index)
        ctx.leaves, ctx.shape = leaves, shape
        ctx.save_for_backward(time_index, h, *params)
        return v

    @staticmethod
    @once_differentiable
    def backward(ctx, dv):
        time_index, h, *params = ctx.saved_tensors
        weights = HeadWeights(params, ctx.shape, h.dtype)
        dv = dv.contiguous()
        dh = torch.zeros_like(h) if ctx.needs_input_grad[0] else None
        grads = head_backward(ctx.leaves, weights, ctx.saved, dv, dv.sum(0, dtype=wide_dtype(dv.dtype)), time_index, dh)
        return dh, None, None, None, None, None, *(g.to(p.dtype) for g, p in zip(grads, params, strict=True))


def velocity_head(
    leaves,
    head: torch.nn.Module,  # a VelocityHead
    h: Tensor,  # (n, H)
    x_t: Tensor | None,  # (n, d); None is x_t = 0
    times: Tensor,  # (M,)
    time_index: Tensor,  # (n,) int32
) -> Tensor:
    """v (n, d), differentiable in h and the parameters; not in x_t."""
    dtype = autocast_dtype(h)
    with torch.autocast(h.device.type, enabled=False):
        x_t = None if x_t is None else x_t.to(dtype)
        return _VelocityHead.apply(h.to(dtype), x_t, times, time_index, leaves, head.shape, *head.parameters())


def evaluate_head(head: torch.nn.Module, h: Tensor, x_t: Tensor, times: Tensor, time_index: Tensor) -> Tensor:
    """`velocity_head` on the backend of the environment and the device."""
    backend = resolve_backend(None, h.device)
    if backend == "reference":
        params = {name: p.to(h.dtype) for name, p in head.named_parameters()}
        t = times.to(h.dtype)[time_index]
        return reference.velocity(params, x_t, t, h, head.shape.time_scale, head.shape.hidden_scale)
    return velocity_head(leaves(backend), head, h, x_t, times, time_index)


def scaled_grads(grads: list[Tensor], dtypes: list[torch.dtype], factor: Tensor, need: tuple[bool, ...]) -> list:
    """The parameters' gradients times `factor`, in the parameters' dtypes; None where not needed."""
    if not any(need):
        return [None] * len(need)
    return [scaled(g, factor, t) if n else None for g, t, n in zip(grads, dtypes, need, strict=True)]
