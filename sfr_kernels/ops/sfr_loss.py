"""The joint SFR loss L_CE + λ L_flow: one gather of h, both losses on it, one dh, one scatter.

The rows are ordered [flow only | both | CE only], so the head sees the first rows of the gathered h and the lm_head the
last ones, without another copy. Both write into one dh: first the lm_head's product, then the head's is added to it.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import reference
from ..config import SFRConfig
from ..rows import SupervisedRows
from .arguments import check_config, check_decoder, check_flow, check_hidden
from .chunks import LogitOptions, Plan, dweight_dtype_for, run_chunks
from .dispatch import leaves, resolve_backend
from .flow_loss import flow_arguments, flow_matching_loss, flow_normalizer, reference_head, run_flow
from .gradients import fake_parameter_grads, head_dtype_of, parameter_grads, scale_gradients
from .linear_cross_entropy import check_labels, cross_entropy
from .numerics import as_written, autocast_dtype, normalizer_of, wide_dtype
from .velocity_head import velocity_head


class SFROutput(NamedTuple):
    """loss = ce + λ · flow carries the gradient; ce and flow are detached, for logging. All are scalars."""

    loss: Tensor
    ce: Tensor
    flow: Tensor


@torch.library.custom_op("sfr_kernels::sfr_loss", mutates_args=())
def sfr_loss_op(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    params: Sequence[Tensor],  # of the velocity head
    rows: Tensor,  # (n,) int64, ordered [flow only | both | CE only]
    labels: Tensor,  # of the last rows, those with CE
    token_row: Tensor,  # (N,) int32, for backward
    normalizer: Tensor,  # zero-dim, of L_CE
    flow_normalizer: Tensor,  # zero-dim, of L_flow
    flow_weight: Tensor,  # zero-dim, λ
    softcap: float | None,
    logit_scale: float,
    targets: Tensor,
    times: Tensor | None,
    noise_id: Tensor,
    anchor: Tensor,
    row_weight: Tensor,  # of the first rows, those with flow
    time_index: Tensor | None,
    sequence_id: Tensor | None,
    seed: Tensor,
    num_times: int,
    target_scale: float,
    source_std: float,
    time_scale: float,
    hidden_scale: float,
    need: Sequence[bool],  # gradients of hidden, weight, bias, any of params
    backend: str,
) -> list[Tensor]:
    """[loss, L_CE, L_flow, dh (n, H), dW, db, the head's gradients in two buffers], empty where not needed.

    The gradients are of Σ CE + λ (normalizer / flow_normalizer) Σ_r row_weight[r] ℓ_r: backward divides all of them by
    the one normalizer.
    """
    need_h, need_w, need_b, need_params = need
    with as_written(hidden):
        check_labels(labels, weight.shape[0])
        kernels, flow_rows = leaves(backend), noise_id.shape[0]
        flow = (
            targets, times, noise_id, anchor, time_index, sequence_id, seed, num_times,
            target_scale, source_std, time_scale, hidden_scale,
        )  # fmt: skip
        h = hidden.index_select(0, rows)
        first = h.shape[0] - labels.shape[0]
        dh = torch.zeros_like(h) if need_h else None
        dw_dtype = dweight_dtype_for(labels.shape[0], h.shape[1], h.dtype, h.dtype, 0)
        plan = Plan(labels, LogitOptions(softcap, logit_scale), kernels, h.dtype, dw_dtype)
        ce = run_chunks(h[first:], weight, bias, plan, (need_h, need_w, need_b), dh[first:] if need_h else None)
        coefficient = None
        if need_h or need_params:
            coefficient = row_weight.to(normalizer.dtype) * (flow_weight * normalizer / flow_normalizer)
        row_loss, matrices, vectors = run_flow(
            kernels,
            h[:flow_rows],
            params,
            coefficient,
            *flow,
            need_params=need_params,
            dh=dh[:flow_rows] if need_h else None,
            add_to_dh=True,
        )
        ce_loss, flow_loss = ce.loss.sum() / normalizer, (row_loss * row_weight).sum() / flow_normalizer
        decoder = [h.new_empty(0) if g is None else g for g in (ce.dweight, ce.dbias)]
        dh = h.new_empty(0, 0) if dh is None else dh
        return [ce_loss + flow_weight * flow_loss, ce_loss, flow_loss, dh, *decoder, matrices, vectors]


@sfr_loss_op.register_fake
def _(hidden, weight, bias, params, rows, labels, *options):
    need_h, need_w, need_b, need_params = options[-2]
    wide, width = wide_dtype(hidden.dtype), hidden.shape[1]
    dw_dtype = dweight_dtype_for(labels.shape[0], width, hidden.dtype, hidden.dtype, 0)
    return [
        *(hidden.new_empty((), dtype=wide) for _ in range(3)),
        hidden.new_empty(rows.shape[0], width) if need_h else hidden.new_empty(0, 0),
        torch.empty_like(weight, dtype=dw_dtype) if need_w else hidden.new_empty(0),
        hidden.new_empty(weight.shape[0], dtype=wide) if need_b else hidden.new_empty(0),
        *fake_parameter_grads(hidden, params, need_params),
    ]


def _setup_context(ctx, inputs, output):
    hidden, _, _, params, _, _, token_row, normalizer, *_, ctx.backend = inputs
    ctx.save_for_backward(token_row, normalizer, *output[3:])
    ctx.dtype, ctx.head_dtype = hidden.dtype, head_dtype_of(params, hidden.dtype)
    ctx.params = [(p.shape, p.dtype) for p in params]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, grads):
    token_row, normalizer, dh, dw, db, *head = ctx.saved_tensors
    need, need_params = ctx.needs_input_grad[:3], ctx.needs_input_grad[3]
    *found, matrices, vectors = scale_gradients(
        grads[0],
        normalizer,
        dh,
        token_row if need[0] else token_row[:0],
        [dw, db],
        head,
        ctx.dtype,
        ctx.head_dtype,
        ctx.backend,
    )
    found = [g if flag else None for g, flag in zip(found, need, strict=True)]
    return *found, parameter_grads(matrices, vectors, ctx.params, need_params), *(None,) * 23


sfr_loss_op.register_autograd(_backward, setup_context=_setup_context)


def sfr_loss(
    hidden: Tensor,  # (B, L, H) or (B·L, H)
    weight: Tensor,  # (V, H), of the lm_head
    head: nn.Module | None,  # VelocityHead; None for "cka"
    rows: SupervisedRows,
    targets: Tensor,  # (A, d), unit-norm embeddings of the segments; rows.labels for "mtp"
    times: Tensor | None = None,  # (M,) float32, for rows.time_index; None draws them from the seed
    *,
    seed: int | Tensor,
    config: SFRConfig,
    bias: Tensor | None = None,  # (V,)
    flow_weight: float | Tensor | None = None,  # λ; None is config.flow_weight
    normalizer: float | Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    backend: str | None = None,
) -> SFROutput:
    """L_CE + λ L_flow over the same rows, with one normalizer (None: the supervised rows of this call).

    Equal to `linear_cross_entropy` + λ · `flow_matching_loss` in value and in every gradient (DESIGN sections 1 to 3).
    softcap and logit_scale act on the logits as in `linear_cross_entropy`.
    Raises TypeError or ValueError naming the argument. No rows give 0, still connected to the graph.
    """
    check_hidden(hidden)
    check_config(config)
    check_decoder(hidden, weight, bias)
    check_flow(hidden, head, rows, targets, times, seed, config)
    lam = _flow_weight(config.flow_weight if flow_weight is None else flow_weight)
    dtype = autocast_dtype(hidden)
    backend = resolve_backend(backend, hidden.device, dtype)
    options = LogitOptions(softcap, logit_scale)
    if backend == "reference":
        check_labels(rows.labels[rows.ce_start :], weight.shape[0])
        params, scales = reference_head(head, hidden.dtype)
        loss, ce, flow = reference.sfr_loss(
            hidden,
            weight,
            params,
            rows,
            targets,
            times,
            seed=seed,
            config=config,
            **scales,
            bias=bias,
            flow_weight=lam,
            normalizer=normalizer,
            softcap=softcap,
            logit_scale=logit_scale,
        )
        return SFROutput(loss, ce.detach(), flow.detach())
    norm = normalizer_of(normalizer, rows.num_ce, hidden.device, wide_dtype(dtype))
    flat = hidden.reshape(-1, hidden.shape[-1]).to(dtype)
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    labels = rows.labels[rows.ce_start :]
    if config.loss in ("flow", "mse"):
        params = list(head.parameters())
        grad = torch.is_grad_enabled()
        loss, ce, flow, *_ = sfr_loss_op(
            flat,
            weight,
            bias,
            params,
            rows.rows,
            labels,
            rows.token_row,
            norm,
            flow_normalizer(norm, rows, config, norm.dtype),
            lam.to(norm) if isinstance(lam, Tensor) else torch.full_like(norm, lam),
            softcap,
            logit_scale,
            *flow_arguments(rows, targets, times, seed, config, head),
            [
                grad and flat.requires_grad,
                grad and weight.requires_grad,
                grad and bias is not None and bias.requires_grad,
                grad and any(p.requires_grad for p in params),
            ],
            backend,
        )
        return SFROutput(loss, ce, flow)
    index = rows.rows[rows.ce_start :]
    ce, *_ = cross_entropy(
        flat.index_select(0, index), weight, bias, labels, None, norm, None, options, backend=backend
    )
    if config.loss == "mtp":
        flow = _mtp(flat, weight, bias, head, rows, targets, config, norm, options, backend)
    else:
        flow = flow_matching_loss(
            hidden, head, rows, targets, times, seed=seed, config=config, normalizer=norm, backend=backend
        )
    return SFROutput(ce + lam * flow, ce.detach(), flow.detach())


def _flow_weight(value: float | Tensor) -> float | Tensor:
    """λ as a finite number or a zero-dim tensor without a gradient."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"flow_weight must have one element, got shape {tuple(value.shape)}")
        return value.detach().reshape(())
    if not -math.inf < value < math.inf:
        raise ValueError(f"flow_weight must be finite, got {value}")
    return value


def _mtp(h, weight, bias, head, rows, targets, config, norm, options, backend) -> Tensor:
    """Multi-token prediction: the head maps h to the hidden state whose logits predict the token mtp_offset ahead."""
    n = rows.num_flow
    anchor = rows.anchor[:n]
    v = velocity_head(backend, head, h.index_select(0, rows.rows[:n]), None, h.new_zeros(1), torch.zeros_like(anchor))
    labels, row_weight = targets[anchor.long()], rows.weight[:n]
    norm = flow_normalizer(norm, rows, config, norm.dtype)
    return cross_entropy(v, weight, bias, labels, row_weight, norm, None, options, backend=backend)[0]
