"""The velocity head over the kernels, forward and backward by hand (DESIGN sections 1 and 2).

    a = SiLU(LN(W_x x_t + W_h s h + (W_τ τ(t) + b)))    the bracket has one row per distinct time, not per token
    a = a + SiLU(LN(W_i a + b_i))                       num_layers − 2 times
    v = W_o a + b_o

Products run in the dtype of `hidden`, to which the parameters are cast. Nothing is concatenated: the products with h
and with x_t add up in one buffer, and each gradient is written where it belongs in the gradient of the joint weight.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..kernels import empty_rows
from ..kernels.backend import kernels_of, resolve_backend
from .autograd import Call
from .constants import check_tensor
from .gradients import fake_parameter_grads, matrix_views, new_matrices, parameter_grads, product_dtype
from .numerics import aligned, as_written, autocast_dtype, linear, product, product_into, wide_dtype, wide_product


@dataclass(frozen=True)
class HeadShape:
    """What the parameters do not say by themselves."""

    hidden_size: int
    target_size: int
    width: int
    num_blocks: int
    time_scale: float
    hidden_scale: float


class HeadWeights:
    """The head's parameters, `VelocityHead.parameters()` in order, ready for the products."""

    def __init__(self, params: Sequence[Tensor], time_scale: float, hidden_scale: float, dtype: torch.dtype):
        self.shapes = [p.shape for p in params]
        gains = {k for k in range(6, len(params) - 2) if k % 4 >= 2}  # γ and β, of which no product is made
        flat = [p if k in gains else p.to(dtype) for k, p in enumerate(params)]
        flat = [aligned(p) if p.dim() == 2 and k != 4 else p for k, p in enumerate(flat)]  # of w_in, its parts below
        self.time_scale, self.hidden_scale, self.dtype = time_scale, hidden_scale, dtype
        self.w1, self.b1, self.w2, self.b2, w_in, self.b_in, self.gamma_in, self.beta_in = flat[:8]
        self.size = self.w2.shape[0]  # d
        self.w_x, self.w_tau, self.w_h = map(aligned, self.columns(w_in))
        self.blocks = [flat[k : k + 4] for k in range(8, len(flat) - 2, 4)]
        self.w_out, self.b_out = flat[-2:]

    def columns(self, w_in: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The parts of (D, d + d + H) that meet x_t, τ and h."""
        d = self.size
        return w_in[:, :d], w_in[:, d : 2 * d], w_in[:, 2 * d :]


@dataclass
class HeadActivations:
    """What forward kernels for backward, which takes it apart."""

    time: list[Tensor]  # sinusoid (M, d), pre-activation and activation (M, 4d), τ (M, d)
    normed: list[tuple[Tensor, Tensor, Tensor]]  # per normed layer: y (n, D), mean and rstd (n,)
    outputs: list[Tensor]  # per normed layer: a (n, D); at last v (n, d), whose place dv takes

    def flatten(self) -> list[Tensor]:
        return [*self.time, *(t for layer in self.normed for t in layer), *self.outputs]

    @classmethod
    def unflatten(cls, flat: Sequence[Tensor]) -> "HeadActivations":
        layers = (len(flat) - 5) // 4
        stop = 4 + 3 * layers
        return cls(list(flat[:4]), [tuple(flat[k : k + 3]) for k in range(4, stop, 3)], list(flat[stop:]))


def head_forward(
    kernels,
    weights: HeadWeights,
    h: Tensor,  # (n, H)
    x_t: Tensor | None,  # (n, d); None is x_t = 0
    times: Tensor,  # (M,)
    time_index: Tensor,  # (n,) int32
) -> HeadActivations:
    """v (n, d), the last of the outputs, and all that backward needs."""
    w = weights
    s = aligned(kernels.sinusoid(times, w.size, w.time_scale, w.dtype))
    z = linear(s, w.w1, w.b1)
    silu = aligned(F.silu(z))
    tau = linear(silu, w.w2, w.b2)
    table = wide_product(tau, w.w_tau.T).add_(w.b_in)

    y = empty_rows(h.shape[0], w.w_h.shape[0], h.dtype, h.device)
    torch.addmm(y, h, w.w_h.T, beta=0, alpha=w.hidden_scale, out=y)
    if x_t is not None:
        y.addmm_(x_t, w.w_x.T)
    a, mean, rstd = kernels.norm_act(y, w.gamma_in, w.beta_in, row_bias=table, row_index=time_index)
    saved = HeadActivations([s, z, silu, tau], [(y, mean, rstd)], [aligned(a)])
    for weight, bias, gamma, beta in w.blocks:
        y = linear(saved.outputs[-1], weight, bias)
        a, mean, rstd = kernels.norm_act(y, gamma, beta, residual=saved.outputs[-1])
        saved.normed.append((y, mean, rstd))
        saved.outputs.append(aligned(a))
    saved.outputs.append(linear(saved.outputs[-1], w.w_out, w.b_out))
    return saved


def head_backward(
    kernels,
    weights: HeadWeights,
    saved: HeadActivations,  # with dv for v; emptied on the way, so that what is used up is freed
    h: Tensor,  # (n, H)
    x_t: Tensor | None,  # (n, d)
    db_out: Tensor,  # (d,), Σ dv
    time_index: Tensor,  # (n,) int32
    *,
    need_params: bool = True,
    dh: Tensor | None = None,  # (n, H), where the gradient of h goes, may be h itself; None if it is not needed
    add_to_dh: bool = False,  # add to what dh holds
    overwrite: bool = False,  # dy may take the place of y in `saved`
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
        dy, dgamma, dbeta, dbias = kernels.norm_act_backward(
            da, y, gamma, beta, mean, rstd, dy=y if overwrite else None
        )
        dy = aligned(dy)
        a = saved.outputs.pop()
        if need_params:
            product_into(d_weight, dy.T, a)
        tail = [dbias[0], dgamma, dbeta, *tail]
        da.addmm_(dy, weight)
    y, mean, rstd = saved.normed.pop()
    num_times = saved.time[0].shape[0]
    dy, dgamma, dbeta, dtable = kernels.norm_act_backward(
        da,
        y,
        w.gamma_in,
        w.beta_in,
        mean,
        rstd,
        row_index=time_index if num_times > 1 else None,  # one time: the sum over all rows
        num_bias=num_times,
        dy=y if overwrite else None,
    )
    dy = aligned(dy)
    vectors = h.new_empty(0, dtype=wide_dtype(w.dtype))
    if need_params:
        d_x, d_tau, d_h = w.columns(d_w_in)
        d_time = _time_backward(kernels, w, saved.time, dtable, d_w1, d_w2, d_tau)
        if x_t is None:
            d_x.zero_()
        else:
            product_into(d_x, dy.T, x_t)
        product_into(d_h, dy.T, h, alpha=w.hidden_scale)
        vectors = torch.cat([*d_time, dgamma, dbeta, *tail])
    if dh is not None:
        torch.addmm(dh, dy, w.w_h, beta=int(add_to_dh), alpha=w.hidden_scale, out=dh)
    return matrices, vectors


def _time_backward(
    kernels,
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
    parts = aligned(kernels.split(dtable, m, dtype))
    times = len(parts) // m
    s, silu, tau = (
        aligned(torch.cat([t.to(dtype)] * times)) if times > 1 else aligned(t.to(dtype)) for t in (s, silu, tau)
    )
    product_into(d_tau, parts.T, tau)
    parts = aligned(kernels.split(wide_product(parts, w_tau).contiguous(), m, dtype))
    db2 = parts.sum(0, dtype=wide)
    product_into(d_w2, parts.T, silu)
    parts = aligned(kernels.split(wide_product(parts, w_2).contiguous(), m, dtype, z.contiguous()))
    product_into(d_w1, parts.T, s)
    return parts.sum(0, dtype=wide), db2, dtable.sum(0)


def _velocity_head(
    h: Tensor,  # (n, H)
    x_t: Tensor | None,  # (n, d); None is x_t = 0
    times: Tensor,  # (M,)
    time_index: Tensor,  # (n,) int32
    params: Sequence[Tensor],
    time_scale: float,
    hidden_scale: float,
    need_grad: bool,
    backend: str,
) -> list[Tensor]:
    """[v (n, d)], and where a gradient is needed the other activations behind it."""
    with as_written(h):
        weights = HeadWeights(params, time_scale, hidden_scale, h.dtype)
        x_t = None if x_t is None else aligned(x_t)
        saved = head_forward(kernels_of(backend), weights, aligned(h), x_t, times, time_index)
        v = saved.outputs.pop()
        return [v, *saved.flatten()] if need_grad else [v]


velocity_head_op = torch.library.custom_op("sfr_kernels::velocity_head", _velocity_head, mutates_args=())


@velocity_head_op.register_fake
def _(h, x_t, times, time_index, params, time_scale, hidden_scale, need_grad, backend):
    n, m, width, (d, inner) = h.shape[0], times.shape[0], params[4].shape[0], params[2].shape
    wide = wide_dtype(h.dtype)

    def room(rows: int, width: int) -> Tensor:
        return empty_rows(rows, width, h.dtype, h.device)

    v = room(n, d)
    if not need_grad:
        return [v]
    layers = 1 + (len(params) - 10) // 4
    time = [room(m, size) for size in (d, inner, inner, d)]
    stats = [h.new_empty(n, dtype=wide) for _ in range(2)]
    normed = [t for _ in range(layers) for t in (room(n, width), *map(torch.empty_like, stats))]
    return [v, *time, *normed, *(room(n, width) for _ in range(layers))]


@torch.library.custom_op("sfr_kernels::velocity_head_backward", mutates_args=())
def velocity_head_backward(
    dv: Tensor,  # (n, d)
    h: Tensor,
    x_t: Tensor | None,
    time_index: Tensor,
    params: Sequence[Tensor],
    saved: Sequence[Tensor],
    time_scale: float,
    hidden_scale: float,
    need_hidden: bool,
    need_params: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """dh, and the parameters' gradients in the matrices' and the vectors' buffer; empty where not needed."""
    with as_written(h):
        weights = HeadWeights(params, time_scale, hidden_scale, h.dtype)
        dv, h, x_t = aligned(dv.contiguous()), aligned(h), None if x_t is None else aligned(x_t)
        activations = HeadActivations.unflatten([*saved, dv])
        dh = empty_rows(*h.shape, h.dtype, h.device) if need_hidden else None
        matrices, vectors = head_backward(
            kernels_of(backend),
            weights,
            activations,
            h,
            x_t,
            dv.sum(0, dtype=wide_dtype(dv.dtype)),
            time_index,
            need_params=need_params,
            dh=dh,
        )
        return h.new_empty(0, 0) if dh is None else dh.contiguous(), matrices, vectors


@velocity_head_backward.register_fake
def _(dv, h, x_t, time_index, params, saved, time_scale, hidden_scale, need_hidden, need_params, backend):
    dh = h.new_empty(h.shape) if need_hidden else h.new_empty(0, 0)
    return dh, *fake_parameter_grads(h, params, need_params)


def _setup_context(ctx, inputs, output):
    h, x_t, _, time_index, params, *ctx.scales, _, ctx.backend = inputs
    ctx.num_params = len(params)
    ctx.save_for_backward(h, x_t, time_index, *params, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, grads):
    if grads[0] is None:
        return *(None,) * 4, [None] * ctx.num_params, *(None,) * 4
    h, x_t, time_index, *rest = ctx.saved_tensors
    params, saved = rest[: ctx.num_params], rest[ctx.num_params :]
    need_h, need = ctx.needs_input_grad[0], ctx.needs_input_grad[4]
    dh, matrices, vectors = velocity_head_backward(
        grads[0], h, x_t, time_index, params, saved, *ctx.scales, need_h, any(need), ctx.backend
    )
    d_params = parameter_grads(matrices, vectors, [(p.shape, p.dtype) for p in params], need)
    return dh if need_h else None, None, None, None, d_params, None, None, None, None


_call = Call(velocity_head_op, _velocity_head, _setup_context, _backward, list_at=4, returns_list=True)


def named_parameters(head: torch.nn.Module) -> dict[str, Tensor]:
    """Those of a VelocityHead, in order; TypeError for codes of a quantized one."""
    named = dict(head.named_parameters())
    for name, p in named.items():
        check_tensor(f"head.{name}", p)
    return named


def velocity_head(
    backend: str,
    head: torch.nn.Module,  # a VelocityHead
    h: Tensor,  # (n, H)
    x_t: Tensor | None,  # (n, d); None is x_t = 0
    times: Tensor,  # (M,)
    time_index: Tensor,  # (n,) int32
) -> Tensor:
    """v (n, d), differentiable in h and the parameters; not in x_t."""
    dtype, params = autocast_dtype(h), [*named_parameters(head).values()]
    h = h.to(dtype)
    need_grad = torch.is_grad_enabled() and (h.requires_grad or any(p.requires_grad for p in params))
    shape = head.shape
    return _call(
        h,
        None if x_t is None else x_t.to(dtype),
        times,
        time_index,
        params,
        shape.time_scale,
        shape.hidden_scale,
        need_grad,
        backend,
    )[0].contiguous()


def evaluate_head(head: torch.nn.Module, h: Tensor, x_t: Tensor, times: Tensor, time_index: Tensor) -> Tensor:
    """`velocity_head` on the backend of the environment and the device."""
    dtype = autocast_dtype(h)
    backend = resolve_backend(None, h.device, dtype)
    if backend == "reference":
        params = {name: p.to(dtype) for name, p in named_parameters(head).items()}
        h, x_t, t = h.to(dtype), x_t.to(dtype), times.to(dtype)[time_index]
        return reference.velocity(params, x_t, t, h, head.shape.time_scale, head.shape.hidden_scale)
    return velocity_head(backend, head, h, x_t, times, time_index)
