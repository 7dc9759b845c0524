"""The joint SFR loss L_CE + λ L_flow: one gather of h, both losses on it, one dh, one scatter.

The rows are ordered [flow only | both | CE only], so the head sees the first rows of the gathered h and the lm_head the
last ones, without another copy. Both write into one dh: first the lm_head's product, then the head's is added to it.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .. import reference
from ..config import SFRConfig
from ..rows import SupervisedRows
from .dispatch import leaves, resolve_backend
from .flow_loss import (
    FlowInputs,
    check_config,
    check_flow,
    flow_matching_loss,
    flow_normalizer,
    reference_head,
    run_flow,
)
from .linear_cross_entropy import (
    LogitOptions,
    Plan,
    check_decoder,
    check_labels,
    linear_cross_entropy,
    run_chunks,
    scatter_rows,
)
from .numerics import autocast_dtype, check_hidden, normalizer_of, scaled, wide_dtype
from .velocity_head import scaled_grads, velocity_head


class SFROutput(NamedTuple):
    """loss = ce + λ · flow carries the gradient; ce and flow are detached, for logging. All are scalars."""

    loss: Tensor
    ce: Tensor
    flow: Tensor


class _SFRLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, normalizer, ratio, flow_norm, lam, rows, flow, plan, shape, *params):
        h = hidden.index_select(0, rows.rows)
        need = tuple(plan.grad_enabled and flag for flag in ctx.needs_input_grad)
        dh = torch.zeros_like(h) if need[0] else None
        ce = run_chunks(h[rows.ce_start :], weight, bias, plan, need[:3], None if dh is None else dh[rows.ce_start :])
        need_flow = need[0] or any(need[11:])
        # λ L_flow shares the factor upstream / normalizer of backward: what is left of its own goes into the rows.
        coefficient = flow.weight.to(ratio.dtype) * ratio if need_flow else None
        row_loss, grads = run_flow(
            plan.leaves,
            flow,
            h[: rows.num_flow],
            params,
            shape,
            coefficient,
            None if dh is None else dh[: rows.num_flow],
        )
        ctx.index, ctx.shape = rows.rows, hidden.shape
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype, [p.dtype for p in params]
        ctx.save_for_backward(normalizer, dh, ce.dweight, ce.dbias, *(grads or ()))
        ce_loss, flow_loss = ce.loss.sum() / normalizer, (row_loss * flow.weight).sum() / flow_norm
        ctx.mark_non_differentiable(ce_loss, flow_loss)
        return ce_loss + lam * flow_loss, ce_loss, flow_loss

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, *_):
        normalizer, dh, dw, db, *grads = ctx.saved_tensors
        factor = upstream / normalizer
        if dh is not None:
            dh = scatter_rows(scaled(dh, factor, dh.dtype), ctx.index, ctx.shape)
        dw = None if dw is None else scaled(dw, factor, ctx.dtypes[0])
        db = None if db is None else scaled(db, factor, ctx.dtypes[1])
        return dh, dw, db, *(None,) * 8, *scaled_grads(grads, ctx.dtypes[2], factor, ctx.needs_input_grad[11:])


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
    lam = config.flow_weight if flow_weight is None else flow_weight
    if isinstance(lam, Tensor):
        if lam.numel() != 1:
            raise ValueError(f"flow_weight must have one element, got shape {tuple(lam.shape)}")
        lam = lam.detach().reshape(())
    elif not math.isfinite(lam):
        raise ValueError(f"flow_weight must be finite, got {lam}")
    backend = resolve_backend(backend, hidden.device)
    check_labels(rows.labels[rows.ce_start :], weight.shape[0])
    norm = normalizer_of(normalizer, rows.num_ce, hidden.device, wide_dtype(autocast_dtype(hidden)))
    if backend == "reference":
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
    if config.loss in ("flow", "mse"):
        return _joint(
            hidden,
            weight,
            bias,
            head,
            rows,
            targets,
            times,
            seed,
            config,
            lam,
            norm,
            LogitOptions(softcap, logit_scale),
            backend,
        )
    decoder = dict(bias=bias, softcap=softcap, logit_scale=logit_scale, backend=backend)
    h = hidden.reshape(-1, hidden.shape[-1])
    ce = linear_cross_entropy(
        h[rows.rows[rows.ce_start :]], weight, rows.labels[rows.ce_start :], normalizer=norm, **decoder
    )
    if config.loss == "mtp":
        flow = _mtp(h, weight, head, rows, targets, config, norm, decoder)
    else:
        flow = flow_matching_loss(
            hidden, head, rows, targets, times, seed=seed, config=config, normalizer=norm, backend=backend
        )
    return SFROutput(ce + lam * flow, ce.detach(), flow.detach())


def _joint(hidden, weight, bias, head, rows, targets, times, seed, config, lam, norm, options, backend) -> SFROutput:
    flow_norm = flow_normalizer(norm, rows, config, norm.dtype)
    dtype = autocast_dtype(hidden)
    flat = hidden.reshape(-1, hidden.shape[-1]).to(dtype)
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        flow = FlowInputs.of(rows, targets, times, seed, config)
        plan = Plan(
            rows.labels[rows.ce_start :],
            options,
            None,
            dtype,
            None,
            leaves(backend),
            grad_enabled=torch.is_grad_enabled(),
        )
        return SFROutput(
            *_SFRLoss.apply(
                flat,
                weight,
                bias,
                norm,
                lam * norm / flow_norm,
                flow_norm,
                lam,
                rows,
                flow,
                plan,
                head.shape,
                *head.parameters(),
            )
        )


def _mtp(h, weight, head, rows, targets, config, norm, decoder) -> Tensor:
    """Multi-token prediction: the head maps h to the hidden state whose logits predict the token mtp_offset ahead."""
    n = rows.num_flow
    norm = flow_normalizer(norm, rows, config, norm.dtype)
    index = torch.zeros(n, dtype=torch.int32, device=h.device)
    module = leaves(decoder["backend"])
    v = velocity_head(module, head, h.index_select(0, rows.rows[:n]), None, h.new_zeros(1), index)
    return linear_cross_entropy(
        v, weight.to(v.dtype), targets[rows.anchor[:n].long()], row_weight=rows.weight[:n], normalizer=norm, **decoder
    )
