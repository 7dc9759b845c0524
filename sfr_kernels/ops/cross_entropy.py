"""The operator behind `linear_cross_entropy`, and its backward.

Supervised rows are gathered and go through the chunk loop (chunks.py), so the forward pass kernels the gradients of the
loss behind, and backward only scales them. A loss for each row has an upstream gradient for each row, known in backward
only: there the chunks are run again, each row weighted by its own.
"""

import functools
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.backend import kernels_of
from .autograd import Call
from .chunks import LinearCrossEntropyResult, LogitOptions, Plan, dweight_dtype_for, empty_stats, run_chunks
from .gradients import finish_gradients, scale_in_place
from .numerics import as_written, gather_rows, split_normalizer, wide_dtype
from .vocab_parallel import VocabShard


def _linear_cross_entropy(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (n,) int64 of the supervised rows, or (N,) with ignore_index
    row_weight: Tensor | None,  # like labels
    rows: Tensor | None,  # (n,) int64, where the supervised rows are; None: they are to be found, or all N
    token_row: Tensor | None,  # (N,) int32, with rows: the row of each token, negative where it has none
    normalizer: Tensor,  # zero-dim
    ignore_index: int | None,  # None: every label counts, and nobody has to look
    per_row: bool,  # the losses are wanted one by one, normalizer 1
    softcap: float | None,
    logit_scale: float,
    label_smoothing: float,
    z_loss: float,
    logits_dtype: torch.dtype,
    chunk_rows: int,  # 0: the default
    accum_dtype: torch.dtype | None,
    need_stats: bool,
    debug: bool,
    group: str,  # name of the process group over which the vocabulary is spread; empty: there is none
    vocab_start: int,
    need: Sequence[bool],  # gradients of hidden, weight, bias
    backend: str,
) -> list[Tensor]:
    """[loss, lse, predicted, entropy, correct, token_row, dh (n, H), dW, db], empty where there is nothing to give.

    loss is a scalar, or (N,) with `per_row`; there backward runs the chunks again, and no gradient is made here.
    token_row is given where it was found here.
    """
    with as_written(hidden):
        found = hidden, labels, row_weight, rows, token_row, ignore_index
        h, labels, row_weight, token_row = _gather(*found)
        n = labels.shape[0]
        if n == 0:
            warn_of_no_rows()
        shard = VocabShard(group, vocab_start, debug) if group else None
        if shard is None:
            check_labels(labels, weight.shape[0], debug)
        early, late = split_normalizer(normalizer, h.dtype)
        if early is not None:
            row_weight = (1 / early).expand(n) if row_weight is None else row_weight.to(early.dtype) / early
        options = LogitOptions(softcap, logit_scale, label_smoothing, z_loss)
        most = hidden.shape[0] if ignore_index is not None else n
        dw_dtype = dweight_dtype_for(most, h.shape[1], h.dtype, logits_dtype, chunk_rows, accum_dtype)
        plan = Plan(
            labels, options, kernels_of(backend), logits_dtype, dw_dtype, row_weight, chunk_rows, need_stats, shard
        )
        need = (False,) * 3 if per_row else tuple(need)
        # the last to read a copy of h writes over it
        out = run_chunks(h, weight, bias, plan, need, dh=h if h is not hidden else None)
        if per_row:
            loss = out.loss if token_row is None else _spread(out.loss, token_row)
        else:
            loss = out.loss.sum() if late is None else out.loss.sum() / late
        empty = labels.new_empty(0, dtype=torch.int32)
        found = token_row if rows is None and token_row is not None else empty
        return [loss, *(out.stats or empty_stats(h)), found, *_given(out, h)]


def _gather(hidden, labels, row_weight, rows, token_row, ignore_index):
    """The supervised rows of hidden, labels and row_weight, and the row of each token; None if all are supervised."""
    if rows is None and ignore_index is None:
        return hidden, labels, row_weight, None
    if rows is None:
        rows, token_row = supervised_rows(labels, ignore_index)
        labels = labels.index_select(0, rows)
        row_weight = None if row_weight is None else row_weight.index_select(0, rows)
    return gather_rows(hidden, rows), labels, row_weight, token_row


def supervised_rows(labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Where labels (N,) are not ignored, and the row of each token, −1 where it is. On a GPU this waits for a count."""
    mask = labels != ignore_index
    rows = mask.nonzero().squeeze(1)
    return rows, torch.where(mask, mask.cumsum(0, dtype=torch.int32) - 1, -1).int()


def _given(out: LinearCrossEntropyResult, h: Tensor) -> list[Tensor]:
    """dh, dW and db as an op returns them: empty for those that were not asked for."""
    empty = (0, 0), (0,), (0,)
    grads = (out.dhidden, out.dweight, out.dbias)
    return [h.new_empty(shape) if g is None else g.contiguous() for g, shape in zip(grads, empty, strict=True)]


def _spread(rows: Tensor, token_row: Tensor) -> Tensor:
    """(N,) values of rows at their tokens, 0 elsewhere."""
    if rows.shape[0] == 0:
        return rows.new_zeros(token_row.shape)
    return torch.where(token_row >= 0, rows[token_row.clamp(min=0)], 0.0)


linear_cross_entropy_op = torch.library.custom_op(
    "sfr_kernels::linear_cross_entropy", _linear_cross_entropy, mutates_args=()
)


@linear_cross_entropy_op.register_fake
def _(hidden, weight, bias, labels, row_weight, rows, token_row, normalizer, ignore_index, per_row, *options):
    *_, logits_dtype, chunk_rows, accum_dtype, need_stats, _, _, _, need, _ = options
    wide = wide_dtype(hidden.dtype)
    n, tokens = labels.shape[0], hidden.shape[0]
    dw_dtype = dweight_dtype_for(n, hidden.shape[1], hidden.dtype, logits_dtype, chunk_rows, accum_dtype)
    need = [flag and not per_row for flag in need]
    if ignore_index is not None and (need_stats or need[0]):
        n = torch.library.get_ctx().new_dynamic_size()
    return [
        hidden.new_empty(tokens if per_row else (), dtype=wide),
        *empty_stats(hidden, n if need_stats else 0),
        hidden.new_empty(0 if ignore_index is None else tokens, dtype=torch.int32),
        hidden.new_empty(n, hidden.shape[1]) if need[0] else hidden.new_empty(0, 0),
        weight.new_empty(weight.shape, dtype=dw_dtype) if need[1] else hidden.new_empty(0),
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
    rows: Tensor | None,
    token_row: Tensor | None,
    ignore_index: int | None,
    softcap: float | None,
    logit_scale: float,
    label_smoothing: float,
    z_loss: float,
    logits_dtype: torch.dtype,
    chunk_rows: int,
    accum_dtype: torch.dtype | None,
    group: str,
    vocab_start: int,
    need: Sequence[bool],
    backend: str,
) -> list[Tensor]:
    """[dhidden, dW, db] of losses that were wanted one by one."""
    with as_written(hidden):
        upstream = upstream.to(wide_dtype(hidden.dtype))
        given = upstream if rows is None else upstream.index_select(0, rows)
        row_weight = given if row_weight is None else given * row_weight
        h, labels, row_weight, token_row = _gather(hidden, labels, row_weight, rows, token_row, ignore_index)
        options = LogitOptions(softcap, logit_scale, label_smoothing, z_loss)
        most = hidden.shape[0] if ignore_index is not None else labels.shape[0]
        dw_dtype = dweight_dtype_for(most, h.shape[1], h.dtype, logits_dtype, chunk_rows, accum_dtype)
        shard = VocabShard(group, vocab_start) if group else None
        plan = Plan(labels, options, kernels_of(backend), logits_dtype, dw_dtype, row_weight, chunk_rows, shard=shard)
        out = run_chunks(h, weight, bias, plan, tuple(need), dh=h if h is not hidden else None)
        dh, *decoder = _given(out, h)
        if token_row is None or not need[0]:
            token_row = labels.new_empty(0, dtype=torch.int32)
        # the rows had their upstream gradients in their weights: what is left is to change dtypes and places
        one, dtype = upstream.new_ones(()), hidden.dtype
        return scale_in_place(plan.kernels, one, dh, token_row, decoder, [], dtype, dtype)


@linear_cross_entropy_backward.register_fake
def _(upstream, hidden, weight, bias, *options):
    need = options[-2]
    shapes = [
        hidden.shape if need[0] else (0, 0),
        weight.shape if need[1] else (0,),
        weight.shape[:1] if need[2] else (0,),
    ]
    return [hidden.new_empty(shape) for shape in shapes]


def _setup_context(ctx, inputs, output):
    *tensors, normalizer, ignore_index, ctx.per_row = inputs[:10]
    *options, accum_dtype, _, _, group, vocab_start, _, ctx.backend = inputs[10:]
    hidden, token_row = tensors[0], tensors[6]
    ctx.options, ctx.dtype = (ignore_index, *options, accum_dtype, group, vocab_start), hidden.dtype
    if ctx.per_row:
        ctx.save_for_backward(*tensors)
    else:
        _, late = split_normalizer(normalizer, hidden.dtype)
        ctx.save_for_backward(late, output[5] if token_row is None else token_row, *output[6:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, grads):
    upstream, need = grads[0], ctx.needs_input_grad[:3]
    if upstream is None:
        return (None,) * 23
    if ctx.per_row:
        found = linear_cross_entropy_backward(upstream, *ctx.saved_tensors, *ctx.options, list(need), ctx.backend)
    else:
        late, token_row, dh, *decoder = ctx.saved_tensors
        found = finish_gradients(upstream, late, dh, token_row, decoder, [], ctx.dtype, ctx.dtype, ctx.backend)
    return *(g if flag else None for g, flag in zip(found, need, strict=True)), *(None,) * 20


_call = Call(linear_cross_entropy_op, _linear_cross_entropy, _setup_context, _backward, returns_list=True)


def cross_entropy(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,
    labels: Tensor,  # (n,), or (N,) where rows is None
    row_weight: Tensor | None,  # like labels
    normalizer: Tensor,
    options: LogitOptions,
    *,
    rows: Tensor | None = None,  # (n,) the supervised rows; None: all, but for labels that are ignore_index
    token_row: Tensor | None = None,  # (N,) int32, with rows
    ignore_index: int | None = None,
    per_row: bool = False,
    logits_dtype: torch.dtype | None = None,
    chunk_rows: int | None = None,
    accum_dtype: torch.dtype | None = None,
    need_stats: bool = False,
    debug: bool = False,
    shard: VocabShard | None = None,
    backend: str,
) -> list[Tensor]:
    """[loss, lse, predicted, entropy, correct], differentiable in hidden, weight and bias, which share one dtype."""
    need = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (hidden, weight, bias)]
    return _call(
        hidden,
        weight,
        bias,
        labels,
        row_weight,
        rows,
        token_row,
        normalizer,
        ignore_index,
        per_row,
        options.softcap,
        options.logit_scale,
        options.label_smoothing,
        options.z_loss,
        logits_dtype or hidden.dtype,
        chunk_rows or 0,
        accum_dtype,
        need_stats,
        debug,
        "" if shard is None else shard.group_name,
        0 if shard is None else shard.start,
        need,
        backend,
    )[:5]


def check_labels(labels: Tensor, vocab: int, debug: bool) -> None:
    """Labels of supervised rows must be classes. On a GPU the check is an assertion on the device, which nobody waits
    for, unless `debug`."""
    valid = ((labels >= 0) & (labels < vocab)).all()
    if labels.is_cuda and not debug:
        torch._assert_async(valid, f"labels must be in [0, {vocab}) or ignore_index")
    elif not valid:
        wrong = labels[(labels < 0) | (labels >= vocab)][0].item()
        raise ValueError(f"labels must be in [0, {vocab}), the vocabulary of weight, or ignore_index; got {wrong}")


@functools.cache
def warn_of_no_rows() -> None:
    """Once in the life of the process: in a long run it may be true of many batches."""
    text = "no label is supervised: the loss of this batch is 0 and so are its gradients (said once)"
    warnings.warn(text, RuntimeWarning, stacklevel=2)
