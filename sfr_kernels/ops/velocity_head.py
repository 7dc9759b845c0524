"""The velocity head over the kernels, forward and backward by hand (formulas: `reference.py`).

    a = SiLU(LN(W_x x_t + W_h s h + (W_τ τ(t) + b)))    the bracket has one row per distinct time, not per token
    a = a + SiLU(LN(W_i a + b_i))                       num_layers − 2 times
    v = W_o a + b_o

h comes normalised, if it is. Products run in the dtype of `hidden`, to which the parameters are cast. Nothing is
concatenated: the products with h and with x_t add up in one buffer, and each gradient is written where it belongs in
the gradient of the joint weight.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..kernels import empty_rows
from ..kernels.backend import resolve_backend
from ..kernels.norm_act import norm_act, norm_act_backward
from ..kernels.scale import split
from ..kernels.times import sinusoid
from .autograd import (
    Inputs,
    Need,
    Operator,
    fake_parameter_grads,
    matrix_views,
    new_matrices,
    pack,
    parameter_grads,
    product_dtype,
    unpack,
)
from .numerics import (
    aligned,
    autocast_dtype,
    linear,
    product,
    product_into,
    rms_norm,
    wide_dtype,
    wide_product,
    without_autocast,
)
from .validate import check_tensor


class HeadCall(NamedTuple):
    """What the head is given beside h and its parameters."""

    x_t: Tensor | None  # (n, d); None is x_t = 0
    times: Tensor  # (M,)
    time_index: Tensor  # (n,) int32
    time_scale: float
    hidden_scale: float
    backend: str


class HeadWeights:
    """The head's parameters, `VelocityHead.parameters()` in order, ready for the products."""

    def __init__(self, params: Sequence[Tensor], dtype: torch.dtype):
        self.shapes = [p.shape for p in params]
        gains = {k for k in range(6, len(params) - 2) if k % 4 >= 2}  # γ and β, of which no product is made
        flat = [p if k in gains else p.to(dtype) for k, p in enumerate(params)]
        flat = [aligned(p) if p.dim() == 2 and k != 4 else p for k, p in enumerate(flat)]  # of w_in, its parts below
        self.dtype = dtype
        self.w1, self.b1, self.w2, self.b2, w_in, self.b_in, self.gamma_in, self.beta_in = flat[:8]
        self.size = self.w2.shape[0]  # d, of x_t and τ; v has as many columns as w_out rows
        self.w_x, self.w_tau, self.w_h = map(aligned, self.columns(w_in))
        self.blocks = [flat[k : k + 4] for k in range(8, len(flat) - 2, 4)]
        self.w_out, self.b_out = flat[-2:]

    def columns(self, w_in: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The parts of (D, d + d + H) that meet x_t, τ and h."""
        d = self.size
        return w_in[:, :d], w_in[:, d : 2 * d], w_in[:, 2 * d :]


@dataclass
class HeadActivations:
    """What forward leaves for backward, which takes it apart."""

    time: list[Tensor]  # sinusoid (M, d), pre-activation and activation (M, 4d), τ (M, d)
    normed: list[tuple[Tensor, Tensor, Tensor]]  # per normed layer: y (n, D), mean and rstd (n,)
    outputs: list[Tensor]  # per normed layer: a (n, D); at last v (n, E), whose place dv takes
    overwrite: bool = False  # backward may write dy over y

    def flatten(self) -> list[Tensor]:
        return [*self.time, *(t for layer in self.normed for t in layer), *self.outputs]

    @classmethod
    def unflatten(cls, flat: Sequence[Tensor]) -> "HeadActivations":
        layers = (len(flat) - 5) // 4
        stop = 4 + 3 * layers
        return cls(list(flat[:4]), [tuple(flat[k : k + 3]) for k in range(4, stop, 3)], list(flat[stop:]))


def head_forward(call: HeadCall, weights: HeadWeights, h: Tensor) -> HeadActivations:  # h (n, H)
    """v (n, E), the last of the outputs, and all that backward needs. E: the output size, d but for "mtp"."""
    w = weights
    s = aligned(sinusoid(call.backend, call.times, w.size, call.time_scale, w.dtype))
    z = linear(s, w.w1, w.b1)
    silu = aligned(F.silu(z))
    tau = linear(silu, w.w2, w.b2)
    table = wide_product(tau, w.w_tau.T).add_(w.b_in)

    y = empty_rows(h.shape[0], w.w_h.shape[0], h.dtype, h.device)
    torch.addmm(y, h, w.w_h.T, beta=0, alpha=call.hidden_scale, out=y)
    if call.x_t is not None:
        y.addmm_(call.x_t, w.w_x.T)
    a, mean, rstd = norm_act(call.backend, y, w.gamma_in, w.beta_in, row_bias=table, row_index=call.time_index)
    saved = HeadActivations([s, z, silu, tau], [(y, mean, rstd)], [aligned(a)])
    for weight, bias, gamma, beta in w.blocks:
        y = linear(saved.outputs[-1], weight, bias)
        a, mean, rstd = norm_act(call.backend, y, gamma, beta, residual=saved.outputs[-1])
        saved.normed.append((y, mean, rstd))
        saved.outputs.append(aligned(a))
    saved.outputs.append(linear(saved.outputs[-1], w.w_out, w.b_out))
    return saved


def head_backward(
    call: HeadCall,
    weights: HeadWeights,
    saved: HeadActivations,  # with dv in place of v; emptied on the way, to free what is used up
    h: Tensor,  # (n, H)
    db_out: Tensor,  # (E,), Σ dv
    *,
    need_params: bool = True,
    dh: Tensor | None = None,  # (n, H), where the gradient of h goes, may be h itself; None if it is not needed
    add_to_dh: bool = False,  # add to what dh holds
) -> tuple[Tensor, Tensor]:
    """The gradients of the parameters: the matrices' buffer and the vectors', empty if not needed."""
    w = weights
    matrices = new_matrices(w.shapes, h) if need_params else h.new_empty(0)
    count = sum(len(s) == 2 for s in w.shapes)
    views = matrix_views(matrices, w.shapes) if need_params else [None] * count
    d_w1, d_w2, d_w_in, *d_blocks, d_out = views
    dv, a = saved.outputs.pop(), saved.outputs.pop()
    if need_params:
        product_into(d_out, dv.T, a)
    del a
    tail = [db_out]
    da = product(dv, w.w_out)
    del dv
    for (weight, _, gamma, beta), d_weight in zip(reversed(w.blocks), reversed(d_blocks), strict=True):
        y, mean, rstd = saved.normed.pop()
        dy, dgamma, dbeta, dbias = norm_act_backward(
            call.backend, da, y, gamma, beta, mean, rstd, dy=y if saved.overwrite else None
        )
        dy = aligned(dy)
        a = saved.outputs.pop()
        if need_params:
            product_into(d_weight, dy.T, a)
        tail = [dbias[0], dgamma, dbeta, *tail]
        da.addmm_(dy, weight)
    y, mean, rstd = saved.normed.pop()
    num_times = saved.time[0].shape[0]
    dy, dgamma, dbeta, dtable = norm_act_backward(
        call.backend, da, y, w.gamma_in, w.beta_in, mean, rstd,
        row_index=call.time_index if num_times > 1 else None,  # one time: the sum over all rows
        num_bias=num_times, dy=y if saved.overwrite else None,
    )  # fmt: skip
    dy = aligned(dy)
    vectors = h.new_empty(0, dtype=wide_dtype(w.dtype))
    if need_params:
        d_x, d_tau, d_h = w.columns(d_w_in)
        d_time = _time_backward(call.backend, w, saved.time, dtable, d_w1, d_w2, d_tau)
        if call.x_t is None:
            d_x.zero_()
        else:
            product_into(d_x, dy.T, call.x_t)
        product_into(d_h, dy.T, h, alpha=call.hidden_scale)
        vectors = torch.cat([*d_time, dgamma, dbeta, *tail])
    if dh is not None:
        torch.addmm(dh, dy, w.w_h, beta=int(add_to_dh), alpha=call.hidden_scale, out=dh)
    return matrices, vectors


def _time_backward(
    backend: str,
    w: HeadWeights,
    time: Sequence[Tensor],
    dtable: Tensor,  # (M, D) float32
    d_w1: Tensor,  # (4d, d), where its gradient goes; the others alike
    d_w2: Tensor,  # (d, 4d)
    d_tau: Tensor,  # (D, d)
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward of the table of row biases; the gradients of b_1, b_2 and b.

    A row of dtable is a sum over many tokens. Rounded to 16 bit it would be worse than the sums of a product over all
    tokens, which is what this path replaces; so it goes on in two parts of bfloat16. In float16, where it may be too
    large for either, it goes on in float32.
    """
    s, z, silu, tau = time
    m, wide, dtype = dtable.shape[0], dtable.dtype, product_dtype(w.dtype)
    w_tau, w_2 = (aligned(x.to(dtype)) for x in (w.w_tau, w.w2))
    parts = aligned(split(backend, dtable, m, dtype))
    times = len(parts) // m
    s, silu, tau = (
        aligned(torch.cat([t.to(dtype)] * times)) if times > 1 else aligned(t.to(dtype)) for t in (s, silu, tau)
    )
    product_into(d_tau, parts.T, tau)
    parts = aligned(split(backend, wide_product(parts, w_tau).contiguous(), m, dtype))
    db2 = parts.sum(0, dtype=wide)
    product_into(d_w2, parts.T, silu)
    parts = aligned(split(backend, wide_product(parts, w_2).contiguous(), m, dtype, z.contiguous()))
    product_into(d_w1, parts.T, s)
    return parts.sum(0, dtype=wide), db2, dtable.sum(0)


def _forward(x: Inputs, call: HeadCall, need: Need) -> list[Tensor]:
    """[v (n, E)], and where a gradient is needed the other activations behind it."""
    with without_autocast(x.hidden):
        call = call._replace(x_t=None if call.x_t is None else aligned(call.x_t))
        saved = head_forward(call, HeadWeights(x.params, x.hidden.dtype), aligned(x.hidden))
        v = saved.outputs.pop()
        return [v, *saved.flatten()] if need.hidden or need.params else [v]


def _fake(x: Inputs, call: HeadCall, need: Need) -> list[Tensor]:
    (n, _), m, params = x.hidden.shape, call.times.shape[0], x.params
    width, (d, inner), outputs = params[4].shape[0], params[2].shape, params[-1].shape[0]

    def rows(n: int, width: int) -> Tensor:
        return empty_rows(n, width, x.hidden.dtype, x.hidden.device)

    v = rows(n, outputs)
    if not (need.hidden or need.params):
        return [v]
    layers = 1 + (len(params) - 10) // 4
    time = [rows(m, size) for size in (d, inner, inner, d)]
    stats = [x.hidden.new_empty(n, dtype=wide_dtype(x.hidden.dtype)) for _ in range(2)]
    normed = [t for _ in range(layers) for t in (rows(n, width), *map(torch.empty_like, stats))]
    return [v, *time, *normed, *(rows(n, width) for _ in range(layers))]


def _head_gradients(
    dv: Tensor,  # (n, E)
    h: Tensor,
    params: Sequence[Tensor],
    saved: Sequence[Tensor],
    tensors: Sequence[Tensor],  # these four: a HeadCall
    floats: Sequence[float],
    integers: Sequence[int],
    text: str,
    need_hidden: bool,
    need_params: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dh, and the parameters' gradients in the matrices' and the vectors' buffer; empty where not needed."""
    with without_autocast(h):
        call = unpack(HeadCall, tensors, floats, integers, text)
        call = call._replace(x_t=None if call.x_t is None else aligned(call.x_t))
        weights, dv, h = HeadWeights(params, h.dtype), aligned(dv.contiguous()), aligned(h)
        activations = HeadActivations.unflatten([*saved, dv])
        dh = empty_rows(*h.shape, h.dtype, h.device) if need_hidden else None
        db = dv.sum(0, dtype=wide_dtype(dv.dtype))
        buffers = head_backward(call, weights, activations, h, db, need_params=need_params, dh=dh)
        return h.new_empty(0, 0) if dh is None else dh.contiguous(), *buffers


velocity_head_backward_op = torch.library.custom_op(
    "sfr_kernels::velocity_head_backward", _head_gradients, mutates_args=()
)


@velocity_head_backward_op.register_fake
def _(dv, h, params, saved, tensors, floats, integers, text, need_hidden, need_params):
    dh = h.new_empty(h.shape) if need_hidden else h.new_empty(0, 0)
    return dh, *fake_parameter_grads(h, params, need_params)


def _save(ctx, x: Inputs, call: HeadCall, output: Sequence[Tensor]) -> None:
    tensors, *ctx.packed = pack(call)
    ctx.num_params, ctx.num_tensors_of_call = len(x.params), len(tensors)
    ctx.save_for_backward(x.hidden, *x.params, *tensors, *output[1:])


def _backward(ctx, dv: Tensor, need: Need) -> Inputs:
    h, *rest = ctx.saved_tensors
    params, rest = rest[: ctx.num_params], rest[ctx.num_params :]
    tensors, saved = rest[: ctx.num_tensors_of_call], rest[ctx.num_tensors_of_call :]
    gradients = _head_gradients if type(dv) is Tensor else velocity_head_backward_op  # traced
    dh, *buffers = gradients(dv, h, params, saved, tensors, *ctx.packed, need.hidden, any(need.params))
    shapes = [(p.shape, p.dtype) for p in params]
    return Inputs(dh, params=parameter_grads(buffers, shapes, need.params))


velocity_head_op = Operator("velocity_head", HeadCall, _forward, _fake, _save, _backward)


def named_parameters(head: Any) -> dict[str, Tensor]:
    """The parameters of a VelocityHead, in order; TypeError for one that is quantized to integer or float8 codes."""
    named = dict(head.named_parameters())
    for name, p in named.items():
        check_tensor(f"head.{name}", p)
    return named


def velocity_head(
    backend: str,
    head: Any,  # a VelocityHead
    h: Tensor,  # (n, H)
    x_t: Tensor | None,  # (n, d); None is x_t = 0
    times: Tensor,  # (M,)
    time_index: Tensor,  # (n,) int32
) -> Tensor:
    """v (n, E), differentiable in h and the parameters; not in x_t."""
    dtype, shape = autocast_dtype(h), head.shape
    h = h.to(dtype)
    if shape.hidden_norm == "rms":
        h, _ = rms_norm(h)
    x_t = None if x_t is None else x_t.to(dtype)
    call = HeadCall(x_t, times, time_index, shape.time_scale, shape.hidden_scale, backend)
    return velocity_head_op(Inputs(h, params=[*named_parameters(head).values()]), call)[0].contiguous()


def evaluate_head(head: torch.nn.Module, h: Tensor, x_t: Tensor, times: Tensor, time_index: Tensor) -> Tensor:
    """`velocity_head` on the backend of the environment and the device."""
    dtype = autocast_dtype(h)
    backend = resolve_backend(None, h.device, dtype)
    if backend == "reference":
        params = {name: p.to(dtype) for name, p in named_parameters(head).items()}
        h, x_t, t = h.to(dtype), x_t.to(dtype), times.to(dtype)[time_index]
        shape = head.shape
        return reference.velocity(params, x_t, t, h, shape.time_scale, shape.hidden_scale, shape.hidden_norm)
    return velocity_head(backend, head, h, x_t, times, time_index)
