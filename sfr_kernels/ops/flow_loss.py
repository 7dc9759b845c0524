"""The flow loss L_flow = Σ_r weight[r] ℓ_r / normalizer, for every kind of loss that needs no decoder.

"flow" and "mse" go the short way: path, head, loss, and the head's backward in one op, so that after forward only
gradients are alive; backward scales them by the upstream one.
"cosine" is the head under autograd; "cka" has no head.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import reference
from ..config import SFRConfig
from ..kernels.backend import kernels_of, resolve_backend
from ..kernels.flow import FlowPath
from ..rows import SupervisedRows
from .autograd import Call
from .cka import cka_loss
from .constants import check_number, normalizer_of
from .gradients import (
    fake_parameter_grads,
    finish_gradients,
    head_dtype_of,
    matrix_views,
    new_matrices,
    new_vectors,
    parameter_grads,
)
from .numerics import aligned, as_written, autocast_dtype, gather_rows, split_normalizer, wide_dtype
from .times import draw_times, seed_tensor, sequence_ids
from .validate import check_config, check_flow, check_hidden
from .velocity_head import HeadWeights, head_backward, head_forward, named_parameters, velocity_head


def flow_arguments(
    rows: SupervisedRows,
    targets: Tensor,
    times: Tensor | None,
    seed: int | Tensor,
    config: SFRConfig,
    head: nn.Module,
) -> tuple:
    """What the flow rows of a call give to `run_flow`, in its order, in types that an op can take."""
    n, index, sequence_id, num_times = rows.num_flow, rows.time_index, None, 0
    if config.is_dirac:
        times = index = None
    elif times is not None:
        num_times = times.shape[0]
    elif config.time_sampling == "sequence":
        sequence_id, num_times = sequence_ids(rows), rows.shape[0]
    else:
        index, num_times = None, config.num_times
    return (
        targets,
        times,
        rows.noise_id[:n],
        rows.anchor[:n],
        rows.weight[:n],
        None if index is None else index[:n],
        sequence_id,
        seed_tensor(seed, rows.device),
        num_times,
        config.scale_for(head.shape.target_size),
        0.0 if config.is_dirac else config.source_std,
        head.shape.time_scale,
        head.shape.hidden_scale,
    )


def run_flow(
    kernels,
    h: Tensor,  # (n, H)
    params: Sequence[Tensor],
    coefficient: Tensor | None,  # (n,) scale of each row's gradient; None: the loss alone
    targets: Tensor,  # (A, d)
    times: Tensor | None,  # (M,)
    noise_id: Tensor,  # (n,) int64
    anchor: Tensor,  # (n,) int32
    time_index: Tensor | None,  # (n,) int32
    sequence_id: Tensor | None,  # (B,) int64
    seed: Tensor,  # (1,) int64
    num_times: int,  # 0: the head sees x_t = 0 at t = 0
    target_scale: float,
    source_std: float,
    time_scale: float,
    hidden_scale: float,
    *,
    need_params: bool = True,
    dh: Tensor | None = None,  # as in `head_backward`
    add_to_dh: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Row losses ℓ (n,), and the parameters' gradients of Σ_r coefficient[r] ℓ_r in two buffers."""
    check_finite(targets)
    if times is None:
        times, time_index = draw_times(kernels, noise_id, time_index, sequence_id, seed, num_times)
    path = FlowPath(aligned(targets), times, noise_id, anchor, time_index, seed, target_scale, source_std)
    if coefficient is not None and num_times and _serves(kernels, h, params, targets, times.shape[0]):
        shapes = [p.shape for p in params] if need_params else []
        matrices, vectors = new_matrices(shapes, h), new_vectors(shapes, h)
        loss = kernels.flow_loss(
            h,
            params,
            path,
            coefficient,
            time_scale,
            hidden_scale,
            matrices=matrix_views(matrices, shapes),
            vectors=vectors if need_params else None,
            dh=dh,
            add_to_dh=add_to_dh,
        )
        return loss, matrices, vectors
    x_t, u = kernels.flow_path(path, h.dtype)
    x_t = aligned(x_t) if num_times else None
    weights = HeadWeights(params, time_scale, hidden_scale, h.dtype)
    saved = head_forward(kernels, weights, h, x_t, times, time_index)
    if coefficient is None:
        loss, _ = kernels.flow_mse(saved.outputs[-1], u)
        return loss, h.new_empty(0), loss.new_empty(0)
    loss, db = kernels.flow_mse(saved.outputs[-1], u, coefficient)
    grads = head_backward(
        kernels,
        weights,
        saved,
        h,
        x_t,
        db,
        time_index,
        need_params=need_params,
        dh=dh,
        add_to_dh=add_to_dh,
        overwrite=True,
    )
    return loss, *grads


def _serves(kernels, *arguments) -> bool:
    """Whether a backend has the whole of it as one call."""
    serves = getattr(kernels, "serves_flow_loss", None)
    return serves is not None and serves(*arguments)


def check_finite(targets: Tensor) -> None:
    """On the CPU, where looking costs nothing; on a GPU a NaN goes on into the loss, which shows it without a wait."""
    if targets.device.type == "cpu" and not torch.isfinite(targets).all():
        raise ValueError("targets contain NaN or infinite values")


def _flow_loss(
    hidden: Tensor,  # (N, H)
    params: Sequence[Tensor],
    rows: Tensor,  # (n,) int64, the flow rows among the N tokens
    token_row: Tensor,  # (N,) int32, for backward
    normalizer: Tensor,  # zero-dim
    targets: Tensor,
    times: Tensor | None,
    noise_id: Tensor,
    anchor: Tensor,
    weight: Tensor,  # (n,) float32
    time_index: Tensor | None,
    sequence_id: Tensor | None,
    seed: Tensor,
    num_times: int,
    target_scale: float,
    source_std: float,
    time_scale: float,
    hidden_scale: float,
    need_hidden: bool,
    need_params: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss, and its gradients (in float16 those of normalizer times the loss), empty where not needed: dh (n, H),
    the parameters' two buffers."""
    with as_written(hidden):
        early, _ = split_normalizer(normalizer, hidden.dtype)
        coefficient = weight if early is None else weight.to(early.dtype) / early
        flow = (
            targets, times, noise_id, anchor, time_index, sequence_id, seed, num_times,
            target_scale, source_std, time_scale, hidden_scale,
        )  # fmt: skip
        h = gather_rows(hidden, rows)
        loss, matrices, vectors = run_flow(
            kernels_of(backend),
            h,
            params,
            coefficient if need_hidden or need_params else None,
            *flow,
            need_params=need_params,
            dh=h if need_hidden else None,  # the last to read h writes over it
        )
        total = (loss * weight).sum() / normalizer
        return total, h.contiguous() if need_hidden else h.new_empty(0, 0), matrices, vectors


flow_loss_op = torch.library.custom_op("sfr_kernels::flow_loss", _flow_loss, mutates_args=())


@flow_loss_op.register_fake
def _(hidden, params, rows, token_row, normalizer, targets, times, noise_id, anchor, weight, *options):
    *_, need_hidden, need_params, _ = options
    dh = hidden.new_empty(rows.shape[0], hidden.shape[1]) if need_hidden else hidden.new_empty(0, 0)
    loss = hidden.new_empty((), dtype=wide_dtype(hidden.dtype))
    return loss, dh, *fake_parameter_grads(hidden, params, need_params)


def _setup_context(ctx, inputs, output):
    hidden, params, _, token_row, normalizer, *_, ctx.backend = inputs
    ctx.save_for_backward(split_normalizer(normalizer, hidden.dtype)[1], token_row, *output[1:])
    ctx.dtype, ctx.head_dtype = hidden.dtype, head_dtype_of(params, hidden.dtype)
    ctx.params = [(p.shape, p.dtype) for p in params]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, upstream, *_):
    if upstream is None:
        return None, [None] * len(ctx.params), *(None,) * 19
    late, token_row, dh, *head = ctx.saved_tensors
    need_h, need = ctx.needs_input_grad[:2]
    scales = upstream, late
    dhidden, *head = finish_gradients(*scales, dh, token_row, [], head, ctx.dtype, ctx.head_dtype, ctx.backend)
    return dhidden if need_h else None, parameter_grads(*head, ctx.params, need), *(None,) * 19


_call = Call(flow_loss_op, _flow_loss, _setup_context, _backward, list_at=1)


def flow_matching_loss(
    hidden: Tensor,  # (B, L, H) or (B·L, H)
    head: nn.Module | None,  # VelocityHead; None for "cka"
    rows: SupervisedRows,
    targets: Tensor,  # (A, d), unit-norm embeddings of the segments
    times: Tensor | None = None,  # (M,) float32, for rows.time_index; None draws them from the seed
    *,
    seed: int | Tensor,
    config: SFRConfig,
    normalizer: float | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """L_flow, a float32 scalar (float64 for float64 hidden): DESIGN section 1; gradients: section 2.

    Differentiable in hidden and the head's parameters, which may be float32 beside 16-bit hidden states.
    seed: an int, or a one-element int64 tensor on the device. normalizer: None is the supervised rows of this call;
    `config.flow_normalizer="weights"` overrides it. No rows give 0, still connected to the graph. targets, times,
    normalizer and rows.weight are constants: none may require a gradient.
    Raises TypeError or ValueError naming the argument; "mtp" needs the decoder and is served by `sfr_loss`.
    """
    check_hidden(hidden)
    check_config(config)
    if config.loss == "mtp":
        raise ValueError("loss='mtp' decodes with the lm_head: call sfr_loss")
    check_flow(hidden, head, rows, targets, times, seed, config)
    backend = resolve_backend(backend, hidden.device, autocast_dtype(hidden))
    dtype = autocast_dtype(hidden)
    norm = flow_normalizer(normalizer, rows, config, wide_dtype(dtype))
    if (backend == "reference" or config.loss in ("cosine", "cka")) and not torch.compiler.is_compiling():
        check_finite(targets)
    if backend == "reference":
        params, scales = reference_head(head, hidden.dtype)
        seed = seed_tensor(seed, hidden.device)
        return reference.flow_matching_loss(
            hidden, params, rows, targets, times, seed=seed, config=config, normalizer=norm, **scales
        ).to(norm.dtype)
    flat = hidden.reshape(-1, hidden.shape[-1]).to(dtype)
    if config.loss == "cka":
        with torch.autocast(hidden.device.type, enabled=False):
            n, published = rows.num_flow, config.target_rule == "published"
            loss = cka_loss(flat.index_select(0, rows.rows[:n]), targets, rows.anchor[:n].long(), published)
            return loss if config.flow_normalizer == "weights" else loss * (n / norm)
    index = rows.rows[: rows.num_flow]
    if config.loss == "cosine":
        return _cosine(backend, head, flat.index_select(0, index), targets, rows, config) / norm
    flow = flow_arguments(rows, targets, times, seed, config, head)
    params, grad = [*named_parameters(head).values()], torch.is_grad_enabled()
    need_params = grad and any(p.requires_grad for p in params)
    return _call(flat, params, index, rows.token_row, norm, *flow, grad and flat.requires_grad, need_params, backend)[0]


def _cosine(backend, head, h, targets, rows, config) -> Tensor:
    """Σ_r weight[r] (1 − cos(head(0, 0, h), x_1))"""
    n = rows.num_flow
    v = velocity_head(backend, head, h, None, h.new_zeros(1), torch.zeros_like(rows.anchor[:n]))
    with torch.autocast(h.device.type, enabled=False):
        wide = wide_dtype(v.dtype)
        x_1 = config.scale_for(head.shape.target_size) * targets.to(wide)[rows.anchor[:n]]
        return (rows.weight[:n] * (1 - torch.cosine_similarity(v.to(wide), x_1, dim=1))).sum()


def reference_head(head: nn.Module | None, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The head as the reference takes it: parameters by name, and its scales."""
    if head is None:
        return {}, {"time_scale": 1.0}
    shape = head.shape
    params = {name: p.to(dtype) for name, p in named_parameters(head).items()}
    return params, {"time_scale": shape.time_scale, "hidden_scale": shape.hidden_scale}


def flow_normalizer(normalizer, rows: SupervisedRows, config: SFRConfig, dtype: torch.dtype) -> Tensor:
    """What L_flow is divided by, as a zero-dim tensor."""
    if config.flow_normalizer == "weights":
        if normalizer is not None:
            check_number("normalizer", normalizer, least=0)
        return rows.weight[: rows.num_flow].sum(dtype=dtype).clamp(min=1.0)
    return normalizer_of(normalizer, rows.num_ce, rows.device, dtype)
