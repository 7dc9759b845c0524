"""The joint SFR loss L_CE + λ L_flow: one gather of h, both losses on it, one dh, one scatter.

The rows are ordered [flow only | both | CE only], so the head sees the first rows of the gathered h and the lm_head the
last ones, without another copy. Both write into one dh: first the lm_head's product, then the head's is added to it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import reference
from ..config import SFRConfig
from ..kernels import empty_rows
from ..kernels.backend import resolve_backend
from ..kernels.softmax_xent import RowStats
from ..rows import SupervisedRows
from .autograd import Inputs, Need, Operator, fake_parameter_grads, finish_gradients, keep_gradients
from .chunks import LogitLoss, run_chunks
from .flow_loss import (
    Flow,
    FlowCall,
    cosine_or_cka,
    flow_loss_op,
    flow_normalizer,
    flow_of,
    reference_head,
    run_flow,
    seed_tensor,
)
from .linear_cross_entropy import (
    CrossEntropyCall,
    check_labels,
    cross_entropy,
    fake_adapter_grads,
    warn_of_no_rows,
)
from .lora import LoRA, adapters_of, low_rank, with_adapters
from .numerics import autocast_dtype, gather_rows, split_normalizer, wide_dtype, without_autocast
from .validate import (
    check_decoder,
    check_flow,
    check_flow_hidden,
    check_hidden,
    check_logit_options,
    check_lora,
    check_memory,
    check_number,
    normalizer_of,
    scalar,
)
from .velocity_head import named_parameters, velocity_head


class SFROutput(NamedTuple):
    """loss = ce + λ · flow carries the gradient; ce and flow are detached, for logging. All three are scalars."""

    loss: Tensor
    ce: Tensor
    flow: Tensor
    stats: RowStats | None = None  # of the rows with CE
    norms: Tensor | None = None  # (2,) ‖∂L_CE/∂h‖² and ‖∂(λ L_flow)/∂h‖² over all rows; of micro-batches they add up


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
    flow_hidden: Tensor | None = None,  # like hidden, of another layer: what L_flow is of; None: hidden
    bias: Tensor | None = None,  # (V,)
    lora: LoRA | Sequence[LoRA] | None = None,
    flow_weight: float | Tensor | None = None,  # λ; None is config.flow_weight, 1 for "auto"
    normalizer: float | Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk_rows: int | None = None,
    accum_dtype: torch.dtype | None = None,
    return_stats: bool = False,
    return_norms: bool = False,
    debug: bool = False,
    backend: str | None = None,
) -> SFROutput:
    """L_CE + λ L_flow over the same rows, with one normalizer (None: the supervised rows of this call).

    flow_hidden is what L_flow is of in place of hidden: an inner layer's, or hidden.detach(), which trains the head
    alone. flow_gate, head_ema, layer_index and the schedules of the config are for `attach` and do nothing here.
    Equal to `linear_cross_entropy` + λ · `flow_matching_loss` in value and in every gradient.
    lora, softcap, logit_scale, label_smoothing, z_loss, chunk_rows, accum_dtype and debug are those of
    `linear_cross_entropy`; "mtp" decodes with the adapters, too. return_stats fills the output's `stats`, in the order
    of rows.rows[rows.ce_start:].
    return_norms fills its `norms`, and changes no bit of the loss and the gradients. In 16 bit the second is that of
    the change that L_flow makes to the rounded gradient of L_CE: below 2⁻⁹ of the latter (bfloat16; float16: 2⁻¹²) it
    is rounding. hidden must require a gradient then, and flow_hidden be None: gradients at two layers do not compare.
    With lora they take another pass of L_CE.
    targets, times, flow_weight, normalizer and rows.weight are constants: none may require a gradient.
    Raises TypeError or ValueError naming the argument. No rows give 0, still connected to the graph.
    """
    check_hidden(hidden)
    check_flow(hidden, head, rows, targets, times, seed, config)
    check_decoder(hidden, weight, bias)
    check_flow_hidden(flow_hidden, hidden)
    adapters = adapters_of(lora)
    check_lora(hidden, weight, adapters)
    if return_norms and flow_hidden is not None:
        raise ValueError("return_norms has no meaning with flow_hidden: gradients at two layers do not compare")
    if return_norms and not (torch.is_grad_enabled() and hidden.requires_grad):
        raise ValueError("hidden must require a gradient, and gradients be enabled, where return_norms is asked for")
    joint = config.loss in ("flow", "mse") and flow_hidden is None
    if return_norms and (adapters or not joint) and torch.compiler.is_compiling():
        given = "lora" if adapters else f"loss={config.loss!r}"
        raise ValueError(f"return_norms is not served under torch.compile for {given}")
    flow_weight = config.first_weight if flow_weight is None else flow_weight
    check_number("flow_weight", flow_weight)
    check_logit_options(softcap, logit_scale, label_smoothing, z_loss)
    check_memory(hidden, None, chunk_rows, accum_dtype)
    dtype = autocast_dtype(hidden)
    backend = resolve_backend(backend, hidden.device, dtype)
    norm = normalizer_of(normalizer, rows.num_ce, hidden.device, wide_dtype(dtype))
    lam = scalar(flow_weight, hidden.device, norm.dtype)
    logits = LogitLoss(
        rows.labels[rows.ce_start :], softcap=softcap, logit_scale=logit_scale, label_smoothing=label_smoothing,
        z_loss=z_loss, chunk_rows=chunk_rows or 0, accum_dtype=accum_dtype, need_stats=return_stats, debug=debug,
    )  # fmt: skip
    if backend == "reference":
        if return_stats:
            raise ValueError("return_stats is not served by backend='reference'")
        check_labels(logits.labels, weight.shape[0], debug=True)
        params, scales = reference_head(head, hidden.dtype)
        loss, ce, flow = reference.sfr_loss(
            hidden, weight, params, rows, targets, times, seed=seed_tensor(seed, hidden.device), config=config,
            flow_hidden=flow_hidden, bias=bias, lora=adapters, flow_weight=lam, normalizer=norm, **scales,
            **logits.options(),
        )  # fmt: skip
        norms = _squared_norms([ce, lam * flow], hidden, norm) if return_norms else None
        return SFROutput(loss.to(norm.dtype), ce.detach().to(norm.dtype), flow.detach().to(norm.dtype), norms=norms)
    x = Inputs(
        hidden.reshape(-1, hidden.shape[-1]).to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    )
    x = with_adapters(x, adapters)
    flow_norm = flow_normalizer(norm, rows, config)
    if joint:
        x = x._replace(params=[*named_parameters(head).values()])
        path = flow_of(rows, targets, times, seed, config, head)
        joint_call = SFRCall(rows.rows, rows.token_row, norm, backend, lam, flow_norm, logits, path, return_norms)
        loss, ce, flow, norms, *stats = sfr_loss_op(x, joint_call)[:8]
        if return_norms and adapters:  # the operator does not see the way from h to low
            bias = None if x.bias is None else x.bias.detach()
            up = None if x.up is None else x.up.detach()
            fixed = x._replace(weight=x.weight.detach(), bias=bias, up=up, params=())
            again, *_ = cross_entropy(fixed, _entropy_call(rows, norm, backend, logits))
            norms = torch.cat([_squared_norms([again], x.hidden, norm), norms[1:]])
        return SFROutput(loss, ce, flow, RowStats(*stats) if return_stats else None, norms if return_norms else None)
    call = _entropy_call(rows, norm, backend, logits)
    ce, *stats = cross_entropy(x, call)
    h = x.hidden if flow_hidden is None else flow_hidden.reshape(x.hidden.shape).to(dtype)
    if config.loss == "mtp":
        flow = _mtp(x._replace(hidden=h), adapters, head, rows, targets, call._replace(normalizer=flow_norm))
    elif config.loss in ("cosine", "cka"):
        flow = cosine_or_cka(backend, h, head, rows, targets, config, flow_norm)
    else:
        path = flow_of(rows, targets, times, seed, config, head)
        flow_call = FlowCall(rows.rows[: rows.num_flow], rows.token_row, flow_norm, backend, path)
        flow = flow_loss_op(Inputs(h, params=[*named_parameters(head).values()]), flow_call)[0]
    norms = _squared_norms([ce, lam * flow], x.hidden, norm) if return_norms else None
    return SFROutput(ce + lam * flow, ce.detach(), flow.detach(), RowStats(*stats) if return_stats else None, norms)


def _entropy_call(rows: SupervisedRows, normalizer: Tensor, backend: str, logits: LogitLoss) -> CrossEntropyCall:
    token_row = rows.token_row - rows.ce_start
    return CrossEntropyCall(rows.rows[rows.ce_start :], token_row, normalizer, backend, None, False, logits)


def _squared_norms(losses: Sequence[Tensor], hidden: Tensor, normalizer: Tensor) -> Tensor:
    """Those of losses with graphs, by a backward pass of each, scaled so that float16 does not underflow."""
    found = []
    for loss in losses:
        (grad,) = torch.autograd.grad(loss, hidden, normalizer.to(loss.dtype), retain_graph=True)
        found.append(_squared_norm(grad, normalizer))
    return torch.stack(found)


def _squared_norm(grad: Tensor, scale: Tensor | None) -> Tensor:
    """‖grad / scale‖², a zero-dim tensor in float32 (float64 for float64)."""
    norm = torch.linalg.vector_norm(grad, dtype=wide_dtype(grad.dtype))
    return (norm if scale is None else norm / scale).square()


def _mtp(
    x: Inputs, adapters: Sequence[LoRA], head: Any, rows: SupervisedRows, targets: Tensor, call: CrossEntropyCall
) -> Tensor:
    """Multi-token prediction: the head maps h to hidden states side by side, of which the j-th has the logits of the
    token j + 2 ahead, j from 0. The mean over j of Σ_r weight[r] ℓ_rj / normalizer.

    Where the response of a row ends before that token, the loss has weight 0, and the label of the last one it has:
    dropping such rows would be a device sync, and a label that is in the loss anyway has a finite loss.
    """
    n, count = rows.num_flow, head.shape.output_size // x.hidden.shape[1]
    anchor, row_weight = rows.anchor[:n].long(), rows.weight[:n]
    h = x.hidden.index_select(0, rows.rows[:n])
    v = velocity_head(call.backend, head, h, None, h.new_zeros(1), torch.zeros_like(rows.anchor[:n]))
    labels, weights = [], []
    for _ in range(count):
        labels.append(targets[anchor])
        weights.append(row_weight)
        following = rows.anchor[anchor].long()
        row_weight = torch.where(following < 0, 0.0, row_weight)
        anchor = torch.where(following < 0, anchor, following)
    logits = call.logits._replace(
        labels=torch.stack(labels, dim=1).flatten(), row_weight=torch.stack(weights, dim=1).flatten(), need_stats=False
    )
    v = v.view(-1, x.hidden.shape[1])
    x = x._replace(hidden=v, low=low_rank(v, adapters) if adapters else None)
    call = call._replace(rows=None, token_row=None, normalizer=call.normalizer * count, logits=logits)
    return cross_entropy(x, call)[0]


# ---------------------------------------------------------------------------------------------------------------------
# The operator of "flow" and "mse".


class SFRCall(NamedTuple):
    """What the operator is given beside its inputs."""

    rows: Tensor  # (n,) int64, ordered [flow only | both | CE only]
    token_row: Tensor  # (N,) int32, for backward
    normalizer: Tensor  # zero-dim, of L_CE
    backend: str
    flow_weight: Tensor  # zero-dim, λ
    flow_normalizer: Tensor  # zero-dim, of L_flow
    logits: LogitLoss  # of the last rows, those with CE
    flow: Flow  # of the first rows, those with flow
    norms: bool  # whether the squared norms of both gradients are wanted


def _forward(x: Inputs, call: SFRCall, need: Need) -> list[Tensor]:
    """[loss, L_CE, L_flow, the squared norms (2,), lse, predicted, entropy, correct, dh (n, H), dW, db, (dlow (n, r)
    and dup with adapters), the head's gradients in two buffers].

    The gradients are those of the loss, in float16 of normalizer times the loss.
    """
    with without_autocast(x.hidden):
        n, flow_rows = call.logits.labels.shape[0], call.flow.noise_id.shape[0]
        if n == 0:
            warn_of_no_rows()
        check_labels(call.logits.labels, x.weight.shape[0], call.logits.debug)
        early, late = split_normalizer(call.normalizer, x.hidden.dtype)
        h = gather_rows(x.hidden, call.rows)
        first = h.shape[0] - n
        dh = empty_rows(len(h), h.shape[1], h.dtype, h.device) if need.hidden else None
        if dh is not None:
            dh[:first].zero_()  # rows without a label: only the head adds to them
        logits = call.logits._replace(row_weight=None if early is None else (1 / early).expand(n))
        low = None if x.low is None else gather_rows(x.low, call.rows[first:])
        decoder = x._replace(hidden=h[first:], low=low)
        row_loss, stats, (_, *grads) = run_chunks(
            call.backend, decoder, logits, need, logits.dweight_dtype(n, h), None if dh is None else dh[first:]
        )
        if need.low and first:
            grads[2] = F.pad(grads[2], (0, 0, first, 0))
        ce = row_loss.sum() if late is None else row_loss.sum() / late
        scale = (call.flow_weight if late is None else call.flow_weight * late) / call.flow_normalizer
        coefficient = call.flow.weight.to(call.normalizer.dtype) * scale if need.hidden or need.params else None
        before = None if dh is None or not call.norms else (dh[:flow_rows].clone(), _squared_norm(dh, late))
        row_loss, *buffers = run_flow(
            call.backend, h[:flow_rows], x.params, coefficient, call.flow, need_params=need.params,
            dh=None if dh is None else dh[:flow_rows], add_to_dh=True,
        )  # fmt: skip
        norms = ce.new_empty(0)
        if dh is not None and before is not None:
            norms = torch.stack([before[1], _squared_norm(before[0].sub_(dh[:flow_rows]), late)])
        flow = (row_loss * call.flow.weight).sum() / call.flow_normalizer
        dh = h.new_empty(0, 0) if dh is None else dh.contiguous()
        grads = [dh, *(g.contiguous() for g in grads)]
        return [ce + call.flow_weight * flow, ce, flow, norms, *stats, *grads, *buffers]


def _fake(x: Inputs, call: SFRCall, need: Need) -> list[Tensor]:
    n, wide = call.logits.labels.shape[0], wide_dtype(x.hidden.dtype)
    dh = (call.rows.shape[0], x.hidden.shape[1]) if need.hidden else (0, 0)
    dw_dtype = call.logits.dweight_dtype(n, x.hidden)
    return [
        *(x.hidden.new_empty((), dtype=wide) for _ in range(3)),
        x.hidden.new_empty(2 if call.norms else 0, dtype=wide),
        *call.logits.empty_stats(x.hidden, n),
        x.hidden.new_empty(dh),
        x.weight.new_empty(x.weight.shape, dtype=dw_dtype) if need.weight else x.hidden.new_empty(0),
        x.hidden.new_empty(x.weight.shape[0], dtype=wide) if need.bias else x.hidden.new_empty(0),
        *fake_adapter_grads(x, call.rows.shape[0], need),
        *fake_parameter_grads(x.hidden, x.params, need.params),
    ]


sfr_loss_op = Operator("sfr_loss", SFRCall, _forward, _fake, keep_gradients, finish_gradients)
