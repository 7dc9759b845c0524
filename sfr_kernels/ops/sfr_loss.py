"""The joint SFR loss L_CE + λ L_flow: one gather of h, both losses on it, one dh, one scatter.

The rows are ordered [flow only | both | CE only], so the head sees the first rows of the gathered h and the lm_head the
last ones, without another copy. Both write into one dh: first the lm_head's product, then the head's is added to it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import reference
from ..config import SFRConfig
from ..kernels import empty_rows
from ..kernels.backend import kernels_of, resolve_backend
from ..kernels.softmax_xent import RowStats
from ..rows import SupervisedRows
from .autograd import Call
from .chunks import LogitOptions, Plan, dweight_dtype_for, empty_stats, run_chunks
from .constants import check_number, normalizer_of, scalar
from .cross_entropy import check_labels, cross_entropy, warn_of_no_rows
from .flow_loss import flow_arguments, flow_matching_loss, flow_normalizer, reference_head, run_flow
from .gradients import fake_parameter_grads, finish_gradients, head_dtype_of, parameter_grads
from .numerics import as_written, autocast_dtype, gather_rows, split_normalizer, wide_dtype
from .times import seed_tensor
from .validate import check_config, check_decoder, check_flow, check_hidden, check_memory
from .velocity_head import named_parameters, velocity_head


class SFROutput(NamedTuple):
    """loss = ce + λ · flow carries the gradient; ce and flow are detached, for logging. All three are scalars."""

    loss: Tensor
    ce: Tensor
    flow: Tensor
    stats: RowStats | None = None  # of the rows with CE


def _sfr_loss(
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
    label_smoothing: float,
    z_loss: float,
    chunk_rows: int,  # 0: the default
    accum_dtype: torch.dtype | None,
    need_stats: bool,
    debug: bool,
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
    """[loss, L_CE, L_flow, lse, predicted, entropy, correct, dh (n, H), dW, db, the head's gradients in two buffers],
    empty where not needed.

    The gradients are those of the loss, in float16 of normalizer times the loss.
    """
    need_h, need_w, need_b, need_params = need
    with as_written(hidden):
        n, flow_rows = labels.shape[0], noise_id.shape[0]
        if n == 0:
            warn_of_no_rows()
        check_labels(labels, weight.shape[0], debug)
        kernels, early, late = kernels_of(backend), *split_normalizer(normalizer, hidden.dtype)
        flow = (
            targets, times, noise_id, anchor, time_index, sequence_id, seed, num_times,
            target_scale, source_std, time_scale, hidden_scale,
        )  # fmt: skip
        h = gather_rows(hidden, rows)
        first = h.shape[0] - n
        dh = empty_rows(*h.shape, h.dtype, h.device) if need_h else None
        if need_h:
            dh[:first].zero_()  # rows without a label: only the head adds to them
        ce_weight = None if early is None else (1 / early).expand(n)
        options = LogitOptions(softcap, logit_scale, label_smoothing, z_loss)
        dw_dtype = dweight_dtype_for(n, h.shape[1], h.dtype, h.dtype, chunk_rows, accum_dtype)
        plan = Plan(labels, options, kernels, h.dtype, dw_dtype, ce_weight, chunk_rows, need_stats)
        ce = run_chunks(h[first:], weight, bias, plan, (need_h, need_w, need_b), dh[first:] if need_h else None)
        ce_loss = ce.loss.sum() if late is None else ce.loss.sum() / late
        scale = flow_weight / flow_normalizer if late is None else flow_weight * late / flow_normalizer
        row_loss, matrices, vectors = run_flow(
            kernels,
            h[:flow_rows],
            params,
            row_weight.to(normalizer.dtype) * scale if need_h or need_params else None,
            *flow,
            need_params=need_params,
            dh=dh[:flow_rows] if need_h else None,
            add_to_dh=True,
        )
        flow_loss = (row_loss * row_weight).sum() / flow_normalizer
        decoder = [h.new_empty(0) if g is None else g.contiguous() for g in (ce.dweight, ce.dbias)]
        dh = h.new_empty(0, 0) if dh is None else dh.contiguous()
        losses = ce_loss + flow_weight * flow_loss, ce_loss, flow_loss
        return [*losses, *(ce.stats or empty_stats(h)), dh, *decoder, matrices, vectors]


sfr_loss_op = torch.library.custom_op("sfr_kernels::sfr_loss", _sfr_loss, mutates_args=())


@sfr_loss_op.register_fake
def _(hidden, weight, bias, params, rows, labels, *options):
    need_h, need_w, need_b, need_params = options[-2]
    chunk_rows, accum_dtype, need_stats = options[8:11]
    wide, width, dtype = wide_dtype(hidden.dtype), hidden.shape[1], hidden.dtype
    dw_dtype = dweight_dtype_for(labels.shape[0], width, dtype, dtype, chunk_rows, accum_dtype)
    return [
        *(hidden.new_empty((), dtype=wide) for _ in range(3)),
        *empty_stats(hidden, labels.shape[0] if need_stats else 0),
        hidden.new_empty(rows.shape[0], width) if need_h else hidden.new_empty(0, 0),
        weight.new_empty(weight.shape, dtype=dw_dtype) if need_w else hidden.new_empty(0),
        hidden.new_empty(weight.shape[0], dtype=wide) if need_b else hidden.new_empty(0),
        *fake_parameter_grads(hidden, params, need_params),
    ]


def _setup_context(ctx, inputs, output):
    hidden, _, _, params, _, _, token_row, normalizer, *_, ctx.backend = inputs
    ctx.save_for_backward(split_normalizer(normalizer, hidden.dtype)[1], token_row, *output[7:])
    ctx.dtype, ctx.head_dtype = hidden.dtype, head_dtype_of(params, hidden.dtype)
    ctx.params = [(p.shape, p.dtype) for p in params]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, grads):
    if grads[0] is None:
        return None, None, None, [None] * len(ctx.params), *(None,) * 29
    late, token_row, dh, dw, db, *head = ctx.saved_tensors
    need, need_params = ctx.needs_input_grad[:3], ctx.needs_input_grad[3]
    *found, matrices, vectors = finish_gradients(
        grads[0], late, dh, token_row, [dw, db], head, ctx.dtype, ctx.head_dtype, ctx.backend
    )
    found = [g if flag else None for g, flag in zip(found, need, strict=True)]
    return *found, parameter_grads(matrices, vectors, ctx.params, need_params), *(None,) * 29


_call = Call(sfr_loss_op, _sfr_loss, _setup_context, _backward, list_at=3, returns_list=True)


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
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk_rows: int | None = None,
    accum_dtype: torch.dtype | None = None,
    return_stats: bool = False,
    debug: bool = False,
    backend: str | None = None,
) -> SFROutput:
    """L_CE + λ L_flow over the same rows, with one normalizer (None: the supervised rows of this call).

    Equal to `linear_cross_entropy` + λ · `flow_matching_loss` in value and in every gradient (DESIGN sections 1 to 3).
    softcap, logit_scale, label_smoothing, z_loss, chunk_rows, accum_dtype and debug are those of
    `linear_cross_entropy`; return_stats fills the output's `stats`, in the order of rows.rows[rows.ce_start:].
    targets, times, flow_weight, normalizer and rows.weight are constants: none may require a gradient.
    Raises TypeError or ValueError naming the argument. No rows give 0, still connected to the graph.
    """
    check_hidden(hidden)
    check_config(config)
    check_decoder(hidden, weight, bias)
    check_flow(hidden, head, rows, targets, times, seed, config)
    flow_weight = config.flow_weight if flow_weight is None else flow_weight
    check_number("flow_weight", flow_weight)
    dtype = autocast_dtype(hidden)
    backend = resolve_backend(backend, hidden.device, dtype)
    options = LogitOptions(softcap, logit_scale, label_smoothing, z_loss)
    check_memory(hidden, None, chunk_rows, accum_dtype)
    norm = normalizer_of(normalizer, rows.num_ce, hidden.device, wide_dtype(dtype))
    lam = scalar(flow_weight, hidden.device, norm.dtype)
    if backend == "reference":
        if return_stats:
            raise ValueError("return_stats is not served by backend='reference'")
        check_labels(rows.labels[rows.ce_start :], weight.shape[0], debug=True)
        params, scales = reference_head(head, hidden.dtype)
        loss, ce, flow = reference.sfr_loss(
            hidden,
            weight,
            params,
            rows,
            targets,
            times,
            seed=seed_tensor(seed, hidden.device),
            config=config,
            **scales,
            bias=bias,
            flow_weight=lam,
            normalizer=norm,
            **options.named(),
        )
        return SFROutput(*(x.to(norm.dtype) for x in (loss, ce.detach(), flow.detach())))
    flat = hidden.reshape(-1, hidden.shape[-1]).to(dtype)
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    labels = rows.labels[rows.ce_start :]
    if config.loss in ("flow", "mse"):
        params = [*named_parameters(head).values()]
        grad = torch.is_grad_enabled()
        loss, ce, flow, *others = _call(
            flat,
            weight,
            bias,
            params,
            rows.rows,
            labels,
            rows.token_row,
            norm,
            flow_normalizer(norm, rows, config, norm.dtype),
            lam,
            options.softcap,
            options.logit_scale,
            options.label_smoothing,
            options.z_loss,
            chunk_rows or 0,
            accum_dtype,
            return_stats,
            debug,
            *flow_arguments(rows, targets, times, seed, config, head),
            [
                grad and flat.requires_grad,
                grad and weight.requires_grad,
                grad and bias is not None and bias.requires_grad,
                grad and any(p.requires_grad for p in params),
            ],
            backend,
        )
        return SFROutput(loss, ce, flow, RowStats(*others[:4]) if return_stats else None)
    memory = dict(chunk_rows=chunk_rows, accum_dtype=accum_dtype, debug=debug, backend=backend)
    where = dict(rows=rows.rows[rows.ce_start :], token_row=rows.token_row - rows.ce_start)
    ce, *stats = cross_entropy(
        flat, weight, bias, labels, None, norm, options, need_stats=return_stats, **where, **memory
    )
    if config.loss == "mtp":
        flow = _mtp(flat, weight, bias, head, rows, targets, config, norm, options, memory)
    else:
        flow = flow_matching_loss(
            hidden, head, rows, targets, times, seed=seed, config=config, normalizer=norm, backend=backend
        )
    return SFROutput(ce + lam * flow, ce.detach(), flow.detach(), RowStats(*stats) if return_stats else None)


def _mtp(h, weight, bias, head, rows, targets, config, norm, options, memory) -> Tensor:
    """Multi-token prediction: the head maps h to the hidden state whose logits predict the token mtp_offset ahead."""
    n = rows.num_flow
    anchor = rows.anchor[:n]
    index, start = rows.rows[:n], h.new_zeros(1)
    v = velocity_head(memory["backend"], head, h.index_select(0, index), None, start, torch.zeros_like(anchor))
    labels, row_weight = targets[anchor.long()], rows.weight[:n]
    norm = flow_normalizer(norm, rows, config, norm.dtype)
    return cross_entropy(v, weight, bias, labels, row_weight, norm, options, **memory)[0]
