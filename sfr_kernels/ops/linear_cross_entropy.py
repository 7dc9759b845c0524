"""Cross-entropy of logits = hidden · weightᵀ + bias over the supervised rows, a bounded chunk at a time.

Supervised rows are gathered and go through the chunk loop (chunks.py), so the forward pass leaves the gradients of
Σ_r w_r ℓ_r behind, and backward only scales them by upstream / normalizer, in float32 and out of place.
`reduction="none"` has an upstream gradient per row, known in backward only: there the chunks are run again, each row
weighted by its own.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from ..leaves import RowStats
from ..rows import IGNORE_INDEX
from .arguments import check_decoder, check_hidden
from .chunks import LinearCrossEntropyResult, LogitOptions, Plan, dweight_dtype_for, run_chunks
from .dispatch import leaves, resolve_backend
from .gradients import scale_gradients
from .numerics import as_written, autocast_dtype, normalizer_of, wide_dtype


@torch.library.custom_op("sfr_kernels::linear_cross_entropy", mutates_args=())
def linear_cross_entropy_op(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (N,) int64
    row_weight: Tensor | None,  # (N,)
    normalizer: Tensor,  # zero-dim
    ignore_index: int | None,  # None: every row is supervised, and nobody has to look
    per_row: bool,  # the losses are wanted one by one
    softcap: float | None,
    logit_scale: float,
    label_smoothing: float,
    z_loss: float,
    logits_dtype: torch.dtype,
    chunk_rows: int,
    need_stats: bool,
    need: Sequence[bool],  # gradients of hidden, weight, bias
    backend: str,
) -> list[Tensor]:
    """[loss, lse, predicted, entropy, token_row, dh (n, H), dW, db], empty where there is nothing to give.

    loss is a scalar, or (N,) with `per_row`; there backward runs the chunks again, and no gradient is made here.
    """
    with as_written(hidden):
        h, labels, row_weight, token_row = _gather(hidden, labels, row_weight, ignore_index)
        options = LogitOptions(softcap, logit_scale, label_smoothing, z_loss)
        dw_dtype = dweight_dtype_for(*hidden.shape, h.dtype, logits_dtype, chunk_rows)
        plan = Plan(labels, options, leaves(backend), logits_dtype, dw_dtype, row_weight, chunk_rows, need_stats)
        check_labels(labels, weight.shape[0])
        out = run_chunks(h, weight, bias, plan, (False,) * 3 if per_row else tuple(need))
        if per_row:
            loss = out.loss / normalizer
            loss = _spread(loss, token_row) if token_row.numel() else loss
        else:
            loss = out.loss.sum() / normalizer
        stats = out.stats or RowStats(out.loss.new_empty(0), labels.new_empty(0), out.loss.new_empty(0))
        return [loss, *stats, token_row, *_given(out, h)]


def _gather(hidden, labels, row_weight, ignore_index):
    """The supervised rows of each, and where each token's row is; the latter empty if all are supervised."""
    if ignore_index is None:
        return hidden, labels, row_weight, labels.new_empty(0, dtype=torch.int32)
    mask = labels != ignore_index
    index = mask.nonzero().squeeze(1)
    token_row = torch.where(mask, mask.cumsum(0, dtype=torch.int32) - 1, -1).int()
    row_weight = None if row_weight is None else row_weight[index]
    return hidden.index_select(0, index), labels[index], row_weight, token_row


def _given(out: LinearCrossEntropyResult, h: Tensor) -> list[Tensor]:
    """dh, dW and db as an op returns them: empty for those that were not asked for."""
    empty = (0, 0), (0,), (0,)
    grads = (out.dhidden, out.dweight, out.dbias)
    return [h.new_empty(shape) if g is None else g for g, shape in zip(grads, empty, strict=True)]


def _spread(rows: Tensor, token_row: Tensor) -> Tensor:
    """(N,) values of rows at their tokens, 0 elsewhere."""
    if rows.shape[0] == 0:
        return rows.new_zeros(token_row.shape)
    return torch.where(token_row >= 0, rows[token_row.clamp(min=0)], 0.0)


@linear_cross_entropy_op.register_fake
def _(hidden, weight, bias, labels, row_weight, normalizer, ignore_index, per_row, *options):
    *_, logits_dtype, chunk_rows, need_stats, need, _ = options
    wide = wide_dtype(hidden.dtype)
    n = tokens = hidden.shape[0]
    need = [flag and not per_row for flag in need]
    if ignore_index is not None and (need_stats or need[0]):
        n = torch.library.get_ctx().new_dynamic_size()
    stats = n if need_stats else 0
    dw_dtype = dweight_dtype_for(*hidden.shape, hidden.dtype, logits_dtype, chunk_rows)
    dh = hidden.new_empty(n, hidden.shape[1]) if need[0] else hidden.new_empty(0, 0)
    return [
        hidden.new_empty(tokens if per_row else (), dtype=wide),
        *(hidden.new_empty(stats, dtype=t) for t in (wide, torch.int64, wide)),
        hidden.new_empty(0 if ignore_index is None else tokens, dtype=torch.int32),
        dh,
        torch.empty_like(weight, dtype=dw_dtype) if need[1] else hidden.new_empty(0),
        hidden.new_empty(weight.shape[0], dtype=wide) if need[2] else hidden.new_empty(0),
    ]


@torch.library.custom_op("sfr_kernels::linear_cross_entropy_backward", mutates_args=())
def linear_cross_entropy_backward(
    upstream: Tensor,  # (N,)
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    row_weight: Tensor | None,
    normalizer: Tensor,
    ignore_index: int | None,
    softcap: float | None,
    logit_scale: float,
    label_smoothing: float,
    z_loss: float,
    logits_dtype: torch.dtype,
    chunk_rows: int,
    need: Sequence[bool],
    backend: str,
) -> list[Tensor]:
    """[dhidden, dW, db] of losses that were wanted one by one."""
    with as_written(hidden):
        row_weight = upstream.to(normalizer.dtype) * (1 if row_weight is None else row_weight)
        h, labels, row_weight, token_row = _gather(hidden, labels, row_weight, ignore_index)
        options = LogitOptions(softcap, logit_scale, label_smoothing, z_loss)
        dw_dtype = dweight_dtype_for(*hidden.shape, h.dtype, logits_dtype, chunk_rows)
        plan = Plan(labels, options, leaves(backend), logits_dtype, dw_dtype, row_weight, chunk_rows)
        dh, *decoder = _given(run_chunks(h, weight, bias, plan, tuple(need)), h)
        token_row = token_row if need[0] else token_row[:0]
        one, dtype = torch.ones_like(normalizer), hidden.dtype  # the rows have the upstream gradient already
        return scale_gradients(one, normalizer, dh, token_row, decoder, [], dtype, dtype, backend)


@linear_cross_entropy_backward.register_fake
def _(upstream, hidden, weight, bias, labels, row_weight, normalizer, ignore_index, *options):
    need = options[-2]
    shapes = [
        hidden.shape if need[0] else (0, 0),
        weight.shape if need[1] else (0,),
        weight.shape[:1] if need[2] else (0,),
    ]
    return [hidden.new_empty(shape) for shape in shapes]


def _setup_context(ctx, inputs, output):
    hidden, weight, bias, labels, row_weight, normalizer, ignore_index, ctx.per_row, *options = inputs
    *options, _, _, ctx.backend = options
    ctx.options, ctx.dtype = (ignore_index, *options), hidden.dtype
    if ctx.per_row:
        ctx.save_for_backward(hidden, weight, bias, labels, row_weight, normalizer)
    else:
        ctx.save_for_backward(normalizer, *output[4:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, grads):
    upstream, need = grads[0], ctx.needs_input_grad[:3]
    if ctx.per_row:
        found = linear_cross_entropy_backward(upstream, *ctx.saved_tensors, *ctx.options, list(need), ctx.backend)
    else:
        normalizer, token_row, dh, *decoder = ctx.saved_tensors
        if not need[0]:
            token_row = token_row[:0]
        found = scale_gradients(upstream, normalizer, dh, token_row, decoder, [], ctx.dtype, ctx.dtype, ctx.backend)
    return *(g if flag else None for g, flag in zip(found, need, strict=True)), *(None,) * 14


linear_cross_entropy_op.register_autograd(_backward, setup_context=_setup_context)


def linear_cross_entropy(
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
    labels: Tensor,  # (...) integers
    *,
    bias: Tensor | None = None,  # (V,)
    shift: bool = False,
    ignore_index: int = IGNORE_INDEX,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    row_weight: Tensor | None = None,  # (...)
    softcap: float | None = None,
    logit_scale: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    logits_dtype: torch.dtype | None = None,
    chunk_rows: int | None = None,
    return_stats: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, RowStats]:
    """Cross-entropy of a linear layer's logits; rows with `labels == ignore_index` cost nothing.

    Formula: `reference.linear_cross_entropy`. With `shift`, position p predicts labels[..., p + 1].
    reduction "mean": Σ_r w_r ℓ_r / normalizer (default: the number of supervised rows); "sum": the sum; "none": w_r ℓ_r
    like labels, 0 where ignored (with `shift`, at the position that predicts). Losses are float32 or float64.
    `return_stats` adds log-sum-exp, argmax and entropy of every supervised row, in the order of the flattened labels.
    Under autocast, hidden and weight are cast as torch's linear casts them.
    Raises TypeError or ValueError naming the argument; labels outside [0, V) are a ValueError.
    """
    check_hidden(hidden)
    check_decoder(hidden, weight, bias)
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"labels must be an integer tensor, got {getattr(labels, 'dtype', type(labels).__name__)}")
    for name, value in (("labels", labels), ("row_weight", row_weight)):
        if value is None:
            continue
        if value.shape != hidden.shape[:-1]:
            raise ValueError(f"{name} must be {tuple(hidden.shape[:-1])} like hidden, got {tuple(value.shape)}")
        if value.device != hidden.device:
            raise ValueError(f"{name} is on {value.device}, hidden on {hidden.device}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be mean, sum or none, got {reduction!r}")
    if reduction != "mean" and normalizer is not None:
        raise ValueError(f"normalizer divides the mean: it has no meaning with reduction={reduction!r}")
    if logits_dtype is not None and not logits_dtype.is_floating_point:
        raise ValueError(f"logits_dtype must be a floating-point dtype, got {logits_dtype}")
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, got {chunk_rows}")
    options = LogitOptions(softcap, logit_scale, label_smoothing, z_loss)
    dtype = autocast_dtype(hidden)
    backend = resolve_backend(backend, hidden.device, dtype)

    shape, hidden = labels.shape, hidden.reshape(-1, hidden.shape[-1]).to(dtype)
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    if shift:
        following = torch.full_like(labels, ignore_index)
        following[..., :-1] = labels[..., 1:]
        labels = following
    labels = labels.reshape(-1).long()
    row_weight = None if row_weight is None else row_weight.detach().reshape(-1)
    if reduction != "mean":
        normalizer = 1
    elif normalizer is None:
        normalizer = (labels != ignore_index).sum()
    norm = normalizer_of(normalizer, 0, hidden.device, wide_dtype(dtype))
    if backend == "reference":
        if return_stats:
            raise ValueError("return_stats is not served by backend='reference'")
        return _reference(hidden, weight, bias, labels, row_weight, norm, ignore_index, options, reduction, shape)
    loss, *stats = cross_entropy(
        hidden,
        weight,
        bias,
        labels,
        row_weight,
        norm,
        ignore_index,
        options,
        per_row=reduction == "none",
        logits_dtype=logits_dtype,
        chunk_rows=chunk_rows or 0,
        need_stats=return_stats,
        backend=backend,
    )
    loss = loss.view(shape) if reduction == "none" else loss
    return (loss, RowStats(*stats)) if return_stats else loss


def cross_entropy(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,
    labels: Tensor,  # (N,)
    row_weight: Tensor | None,
    normalizer: Tensor,
    ignore_index: int | None,  # None: every row is supervised
    options: LogitOptions,
    *,
    per_row: bool = False,
    logits_dtype: torch.dtype | None = None,
    chunk_rows: int = 0,
    need_stats: bool = False,
    backend: str,
) -> list[Tensor]:
    """[loss, lse, predicted, entropy], differentiable in hidden, weight and bias, which share one dtype."""
    need = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (hidden, weight, bias)]
    return linear_cross_entropy_op(
        hidden,
        weight,
        bias,
        labels,
        row_weight,
        normalizer,
        ignore_index,
        per_row,
        options.softcap,
        options.logit_scale,
        options.label_smoothing,
        options.z_loss,
        logits_dtype or hidden.dtype,
        chunk_rows,
        need_stats,
        need,
        backend,
    )[:4]


def _reference(hidden, weight, bias, labels, row_weight, norm, ignore_index, options, reduction, shape) -> Tensor:
    index = (labels != ignore_index).nonzero().squeeze(1)
    row_weight = None if row_weight is None else row_weight[index]
    check_labels(labels[index], weight.shape[0])
    with torch.autocast(hidden.device.type, enabled=False):
        rows = reference.linear_cross_entropy(
            hidden[index], weight, labels[index], bias=bias, row_weight=row_weight, ignore_index=-1, **vars(options)
        )
    if reduction != "none":
        return rows.sum() / norm
    return rows.new_zeros(labels.shape).index_copy(0, index, rows).view(shape)


def check_labels(labels: Tensor, vocab: int) -> None:
    """Labels of supervised rows must be classes. On a GPU the check is an assertion on the device: no wait."""
    valid = ((labels >= 0) & (labels < vocab)).all()
    if labels.is_cuda:
        torch._assert_async(valid, f"labels must be in [0, {vocab}) or ignore_index")
    elif not valid:
        wrong = labels[(labels < 0) | (labels >= vocab)][0].item()
        raise ValueError(f"labels must be in [0, {vocab}), the vocabulary of weight, or ignore_index; got {wrong}")
