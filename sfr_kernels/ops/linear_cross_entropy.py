"""Cross-entropy of a linear layer's logits over the supervised rows: the public function and its operator.

The supervised rows are gathered and go through the chunk loop (chunks.py), which computes the gradients together with
the loss; backward only scales them. With reduction="none" every row has its own upstream gradient, known in backward
only: there the operator runs again, with the upstream gradients as row weights.
"""

import functools
import warnings
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypedDict, Unpack, overload

import torch
import torch.distributed as dist
from torch import Tensor

from .. import reference
from ..kernels.backend import resolve_backend
from ..kernels.softmax_xent import RowStats
from ..rows import IGNORE_INDEX, SupervisedRows
from .autograd import Inputs, Need, Operator, finish, finish_gradients, keep_gradients, pack, saved_gradients, unpack
from .chunks import LogitLoss, run_chunks
from .lora import LoRA, adapters_of, with_adapters
from .numerics import autocast_dtype, gather_rows, split_normalizer, wide_dtype, without_autocast
from .validate import (
    check_class_weight,
    check_decoder,
    check_hidden,
    check_logit_options,
    check_lora,
    check_memory,
    check_reduction,
    check_supervision,
    normalizer_of,
)


class CrossEntropyOptions(TypedDict, total=False):
    """The options of `linear_cross_entropy`, for type checkers."""

    bias: Tensor | None
    lora: LoRA | Sequence[LoRA] | None
    shift: bool | int
    ignore_index: int
    reduction: str
    normalizer: float | Tensor | None
    row_weight: Tensor | None
    class_weight: Tensor | None
    softcap: float | None
    logit_scale: float
    label_smoothing: float
    z_loss: float
    logits_dtype: torch.dtype | None
    chunk_rows: int | None
    accum_dtype: torch.dtype | None
    process_group: "dist.ProcessGroup | None"
    vocab_start: int
    debug: bool
    backend: str | None


Labels = Tensor | SupervisedRows


@overload
def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Labels, *, return_stats: Literal[False] = False,
    **options: Unpack[CrossEntropyOptions],
) -> Tensor: ...  # fmt: skip
@overload
def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Labels, *, return_stats: Literal[True],
    **options: Unpack[CrossEntropyOptions],
) -> tuple[Tensor, RowStats]: ...  # fmt: skip
def linear_cross_entropy(
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
    labels: Labels,  # (...) integers
    *,
    bias: Tensor | None = None,  # (V,)
    lora: LoRA | Sequence[LoRA] | None = None,
    shift: bool | int = False,
    ignore_index: int = IGNORE_INDEX,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    row_weight: Tensor | None = None,  # (...)
    class_weight: Tensor | None = None,  # (V,)
    softcap: float | None = None,
    logit_scale: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    logits_dtype: torch.dtype | None = None,
    chunk_rows: int | None = None,
    accum_dtype: torch.dtype | None = None,
    return_stats: bool = False,
    process_group: "dist.ProcessGroup | None" = None,
    vocab_start: int = 0,
    debug: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, RowStats]:
    """Cross-entropy of a linear layer's logits; rows with `labels == ignore_index` cost nothing.

    Formula: `reference.linear_cross_entropy`. Differentiable in hidden, weight, bias and adapters, once.

    labels          classes, or `SupervisedRows`, which know the number of rows; counting bare labels costs one
                    device sync.
    lora            adapters of the linear layer, one or several: their logits are added to its own, chunk by chunk.
    shift           position p predicts labels[..., p + shift]; True is 1. `SupervisedRows` are shifted as they are.
    reduction       "mean": Σ_r w_r ℓ_r / normalizer (default: the number of supervised rows, or with class_weight the
                    sum of those of their classes); "sum": the sum; "none": w_r ℓ_r like hidden without its last
                    dimension, 0 where ignored. float32, float64 for float64.
    row_weight      w, a constant, floating point, integer or bool; like labels, at the positions that predict.
    class_weight    the `weight` of torch's cross_entropy, a constant: a factor of w for each class. Not with
                    label_smoothing or process_group.
    z_loss          λ_z of λ_z · log-sum-exp².
    logits_dtype    dtype of the logits; None is that of hidden.
    chunk_rows      rows of logits held at once, else `chunks.chunk_rows_for`.
    accum_dtype     dtype in which dW is summed over chunks; None is float32. With weight's dtype and small chunks the
                    memory beyond the gradients is one chunk of logits; each chunk then rounds dW once more.
    return_stats    also gives log-sum-exp, argmax, entropy and correctness of each supervised row, in the order of the
                    flattened labels, or of the rows.
    process_group   the group over which the vocabulary is spread: weight, bias and lora's `up` hold the classes from
                    `vocab_start` on. All else must be the same in every process, and so are then the loss and the
                    gradients of hidden and lora's `down`, which are the whole ones.
    debug           checks the labels at once, a device sync. Without it, a label outside [0, V) is a ValueError on
                    the CPU and a failing assertion on a GPU (with process_group: a NaN).

    Under autocast, hidden and weight are cast as torch's linear casts them. No supervised row gives 0, still connected
    to the graph, and a warning, once. Raises TypeError or ValueError naming the argument.
    """
    check_hidden(hidden)
    check_decoder(hidden, weight, bias)
    adapters = adapters_of(lora)
    check_lora(hidden, weight, adapters)
    check_supervision(hidden, labels, row_weight, ignore_index)
    check_reduction(labels, shift, reduction, normalizer)
    check_memory(hidden, logits_dtype, chunk_rows, accum_dtype)
    check_logit_options(softcap, logit_scale, label_smoothing, z_loss)
    group = _group_name(process_group, vocab_start)
    if group and any(a.dropout for a in adapters):
        raise ValueError("lora.dropout must be 0 with process_group: each process would drop other entries of hidden")
    check_class_weight(class_weight, weight, label_smoothing, group)
    dtype, shape = autocast_dtype(hidden), hidden.shape[:-1]
    wide = wide_dtype(dtype)
    backend = resolve_backend(backend, hidden.device, dtype)

    x = Inputs(
        hidden.reshape(-1, hidden.shape[-1]).to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    )
    row_weight = None if row_weight is None else row_weight.detach().reshape(-1).to(wide)
    rows: Any = None
    count: Any
    token_row, ignored = None, None
    if isinstance(labels, SupervisedRows):
        start, count = labels.ce_start, labels.num_ce
        rows, token_row, labels = labels.rows[start:], labels.token_row - start, labels.labels[start:]
    else:
        labels = _shifted(labels.long(), int(shift), ignore_index).reshape(-1)  # an unsigned type has no ignore_index
        if torch.compiler.is_compiling() and backend != "reference":  # a traced graph cannot count: the operator does
            ignored, count = ignore_index, (labels != ignore_index).sum()
        else:
            rows, token_row = supervised_rows(labels, ignore_index)
            labels, count = labels.index_select(0, rows), rows.shape[0]
    if row_weight is not None and rows is not None:
        row_weight = row_weight.index_select(0, rows)
    if class_weight is not None:
        of_class = _class_weights(class_weight.detach().to(wide), labels, ignored)
        row_weight, count = of_class if row_weight is None else row_weight * of_class, of_class.sum()
    norm = normalizer_of(normalizer if reduction == "mean" else 1, count, hidden.device, wide)
    per_row = reduction == "none"
    if dtype == torch.float16 and not per_row and row_weight is not None and row_weight.numel():
        # float16 holds gradients of rows of weight one; what is divided out here is applied in float32
        most = row_weight.abs().amax()
        most = torch.where(most == 0, 1.0, most)
        row_weight, norm = row_weight / most, norm / most
    logits = LogitLoss(
        labels, row_weight, softcap=softcap, logit_scale=logit_scale, label_smoothing=label_smoothing, z_loss=z_loss,
        logits_dtype=logits_dtype, chunk_rows=chunk_rows or 0, accum_dtype=accum_dtype, need_stats=return_stats,
        debug=debug, group=group, vocab_start=vocab_start,
    )  # fmt: skip
    if backend == "reference":
        if return_stats or group:
            raise ValueError("return_stats and process_group are not served by backend='reference'")
        loss = _reference(x, adapters, logits, rows)
        if per_row:
            return loss.new_zeros(x.hidden.shape[0]).index_copy(0, rows, loss).view(shape)
        return loss.sum() / norm
    x = with_adapters(x, adapters)
    loss, *stats = cross_entropy(x, CrossEntropyCall(rows, token_row, norm, backend, ignored, per_row, logits))
    loss = loss.view(shape) if per_row else loss
    return (loss, RowStats(*stats)) if return_stats else loss


def _shifted(labels: Tensor, shift: int, ignore_index: int) -> Tensor:
    """labels[..., p + shift] at p; none at the last ones."""
    return torch.nn.functional.pad(labels[..., shift:], (0, min(shift, labels.shape[-1])), value=ignore_index)


def _class_weights(class_weight: Tensor, labels: Tensor, ignore_index: int | None) -> Tensor:
    """The weight of each label's class, 0 where it is ignored. Those that are no class are left to `check_labels`."""
    weights = class_weight[labels.clamp(0, class_weight.shape[0] - 1)]
    return weights if ignore_index is None else torch.where(labels == ignore_index, 0.0, weights)


def _group_name(process_group: "dist.ProcessGroup | None", vocab_start: int) -> str:
    if isinstance(vocab_start, bool) or not isinstance(vocab_start, int) or vocab_start < 0:
        raise ValueError(f"vocab_start must be an int, at least 0, got {vocab_start!r}")
    if process_group is None:
        if vocab_start:
            raise ValueError("vocab_start needs the process_group over which the vocabulary is spread")
        return ""
    if not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(f"process_group must be a torch.distributed process group, got {type(process_group).__name__}")
    return process_group.group_name


def _reference(x: Inputs, adapters: Sequence[LoRA], logits: LogitLoss, rows: Tensor) -> Tensor:
    """The row losses."""
    check_labels(logits.labels, x.weight.shape[0], debug=True)
    dtype = x.hidden.dtype
    adapters = [a._replace(down=a.down.to(dtype), up=a.up.to(dtype)) for a in adapters]
    with torch.autocast(x.hidden.device.type, enabled=False):
        return reference.linear_cross_entropy(
            x.hidden[rows], x.weight, logits.labels, bias=x.bias, lora=adapters, row_weight=logits.row_weight,
            ignore_index=-1, **logits.options(),
        )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The operator.


class CrossEntropyCall(NamedTuple):
    """What `cross_entropy` is given beside its inputs."""

    rows: Tensor | None  # (n,) int64, where the supervised rows are; None: they are to be found, or all N
    token_row: Tensor | None  # (N,) int32, with rows: the row of each token, negative where it has none
    normalizer: Tensor  # zero-dim
    backend: str
    ignore_index: int | None  # None: every label is supervised
    per_row: bool  # reduction="none": one loss a row, normalizer 1
    logits: LogitLoss  # labels and row_weight (n,); or (N,) with ignore_index
    checked: bool = False  # the labels are known to be classes


def _forward(x: Inputs, call: CrossEntropyCall, need: Need) -> list[Tensor]:
    """[loss, lse, predicted, entropy, correct, (token_row where it was not given), dh (n, H), dW, db, (dlow (n, r),
    dup with adapters)].

    loss is a scalar, or (N,) with `per_row`, where the gradients are left to backward.
    """
    with without_autocast(x.hidden):
        tokens, hidden = x.hidden.shape[0], x.hidden
        x, logits, token_row = _gather(x, call)
        h, n, row_weight = x.hidden, logits.labels.shape[0], logits.row_weight
        if n == 0:
            warn_of_no_rows()
        if not (logits.group or call.checked):
            check_labels(logits.labels, x.weight.shape[0], logits.debug)
        early, late = split_normalizer(call.normalizer, h.dtype)
        if early is not None:
            row_weight = (1 / early).expand(n) if row_weight is None else row_weight.to(early.dtype) / early
        dw_dtype = logits.dweight_dtype(tokens if call.ignore_index is not None else n, h)
        need = Need() if call.per_row else need
        # h is a copy: its gradient may overwrite it
        logits, dh = logits._replace(row_weight=row_weight), h if h is not hidden else None
        loss, stats, grads = run_chunks(call.backend, x, logits, need, dw_dtype, dh)
        if not call.per_row:
            loss = loss.sum() if late is None else loss.sum() / late
        elif token_row is not None:
            loss = _spread(loss, token_row)
        found = []
        if call.token_row is None:
            found = [loss.new_empty(0, dtype=torch.int32) if token_row is None else token_row]
        return [loss, *stats, *found, *(g.contiguous() for g in grads)]


def _fake(x: Inputs, call: CrossEntropyCall, need: Need) -> list[Tensor]:
    (tokens, width), wide = x.hidden.shape, wide_dtype(x.hidden.dtype)
    n: Any = call.logits.labels.shape[0]
    dw_dtype = call.logits.dweight_dtype(n, x.hidden)
    need = Need() if call.per_row else need
    if call.ignore_index is not None and (call.logits.need_stats or need.hidden or need.low):
        n = torch.library.get_ctx().new_dynamic_size()
    found = []
    if call.token_row is None:
        found = [x.hidden.new_empty(0 if call.ignore_index is None else tokens, dtype=torch.int32)]
    return [
        x.hidden.new_empty(tokens if call.per_row else (), dtype=wide),
        *call.logits.empty_stats(x.hidden, n),
        *found,
        x.hidden.new_empty((n, width) if need.hidden else (0, 0)),
        x.weight.new_empty(x.weight.shape, dtype=dw_dtype) if need.weight else x.hidden.new_empty(0),
        x.hidden.new_empty(x.weight.shape[0], dtype=wide) if need.bias else x.hidden.new_empty(0),
        *fake_adapter_grads(x, n, need),
    ]


def fake_adapter_grads(x: Inputs, n: int, need: Need) -> list[Tensor]:
    """Tensors like the gradients dlow of n rows, and dup; none without adapters."""
    if x.up is None:
        return []
    rank, wide = x.up.shape[1], wide_dtype(x.up.dtype)
    return [
        x.up.new_empty((n, rank) if need.low else (0, 0)),
        x.hidden.new_empty(x.up.shape, dtype=wide) if need.up else x.hidden.new_empty(0),
    ]


def _gather(x: Inputs, call: CrossEntropyCall) -> tuple[Inputs, LogitLoss, Tensor | None]:
    """The supervised rows of hidden, low, labels and row_weight, and the row of each token; None if all are
    supervised."""
    rows, token_row, logits = call.rows, call.token_row, call.logits
    if rows is None:
        if call.ignore_index is None:
            return x, logits, None
        rows, token_row = supervised_rows(logits.labels, call.ignore_index)
        weight = None if logits.row_weight is None else logits.row_weight.index_select(0, rows)
        logits = logits._replace(labels=logits.labels.index_select(0, rows), row_weight=weight)
    low = None if x.low is None else gather_rows(x.low, rows)
    return x._replace(hidden=gather_rows(x.hidden, rows), low=low), logits, token_row


def supervised_rows(labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Where labels (N,) are not ignored, and the row of each token, −1 where it is. The count is a device sync."""
    mask = labels != ignore_index
    rows = mask.nonzero().squeeze(1)
    return rows, torch.where(mask, mask.cumsum(0, dtype=torch.int32) - 1, -1).int()


def _spread(rows: Tensor, token_row: Tensor) -> Tensor:
    """(N,) values of rows at their tokens, 0 elsewhere."""
    if rows.shape[0] == 0:
        return rows.new_zeros(token_row.shape)
    return torch.where(token_row >= 0, rows[token_row.clamp(min=0)], 0.0)


def _save(ctx, x: Inputs, call: CrossEntropyCall, output) -> None:
    ctx.per_row = call.per_row
    if call.per_row:
        tensors: list[Tensor] = []
        ctx.call = call
        if type(call.normalizer) is not Tensor:  # traced: what backward reads must be in the graph
            ctx.call = None
            tensors, *ctx.packed = pack(call)
        ctx.save_for_backward(*x[:-1], *tensors)
    else:
        keep_gradients(ctx, x, call, output)


def _backward(ctx, upstream: Tensor, need: Need) -> Inputs:
    if not ctx.per_row:
        return finish_gradients(ctx, upstream, need)
    hidden, weight, bias, low, up, *tensors = ctx.saved_tensors
    x = Inputs(hidden, weight, bias, low, up)
    call = ctx.call or unpack(CrossEntropyCall, tensors, *ctx.packed)
    upstream = upstream.to(wide_dtype(hidden.dtype))
    row_weight = upstream if call.rows is None else upstream.index_select(0, call.rows)
    if call.logits.row_weight is not None:
        row_weight = row_weight * call.logits.row_weight
    one = upstream.new_ones(())
    logits = call.logits._replace(row_weight=row_weight, need_stats=False, debug=False)
    call = call._replace(per_row=False, normalizer=one, logits=logits, checked=True)
    again = _forward if ctx.call else linear_cross_entropy_op.through_dispatcher
    output = again(x, call, need._replace(params=False))
    # with factor 1: the gradients only change dtype and place
    return finish(*saved_gradients(x, call, output), one, need, fresh=True)


linear_cross_entropy_op = Operator("linear_cross_entropy", CrossEntropyCall, _forward, _fake, _save, _backward)


def cross_entropy(x: Inputs, call: CrossEntropyCall) -> Sequence[Tensor]:
    """[loss, lse, predicted, entropy, correct], differentiable in the inputs."""
    return linear_cross_entropy_op(x, call)[:5]


def check_labels(labels: Tensor, vocab: int, debug: bool) -> None:
    """Labels of supervised rows must be classes. On a GPU the check is an assertion on the device, which avoids a
    device sync, unless `debug`."""
    valid = ((labels >= 0) & (labels < vocab)).all()
    if labels.is_cuda and not debug:
        torch._assert_async(valid, f"labels must be in [0, {vocab}) or ignore_index")
    elif not valid:
        wrong = labels[(labels < 0) | (labels >= vocab)][0].item()
        raise ValueError(f"labels must be in [0, {vocab}), the vocabulary of weight, or ignore_index; got {wrong}")


@functools.cache
def warn_of_no_rows() -> None:
    """Once a process: in a long run it may be true of many batches."""
    text = "no label is supervised: the loss of this batch is 0 and so are its gradients (said once)"
    warnings.warn(text, RuntimeWarning, stacklevel=2)
