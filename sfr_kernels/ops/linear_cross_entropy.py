"""Cross-entropy of logits = hidden · weightᵀ + bias over the supervised rows: the public function."""

import torch
import torch.distributed as dist
from torch import Tensor

from .. import reference
from ..kernels.backend import resolve_backend
from ..kernels.softmax_xent import RowStats
from ..rows import IGNORE_INDEX, SupervisedRows
from .chunks import LogitOptions
from .constants import INTEGER, NUMBERS, check_constant, check_tensor, normalizer_of
from .cross_entropy import check_labels, cross_entropy, supervised_rows
from .numerics import autocast_dtype, wide_dtype
from .validate import check_decoder, check_hidden, check_memory, check_rows
from .vocab_parallel import VocabShard


def linear_cross_entropy(
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
    labels: Tensor | SupervisedRows,  # (...) integers
    *,
    bias: Tensor | None = None,  # (V,)
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

    Formula: `reference.linear_cross_entropy`. Differentiable in hidden, weight and bias, once.

    labels          classes, or `SupervisedRows`, which know the number of rows: without them a GPU is waited for once.
    shift           position p predicts labels[..., p + shift]; True is 1. `SupervisedRows` are shifted as they are.
    reduction       "mean": Σ_r w_r ℓ_r / normalizer (default: the number of supervised rows, or with class_weight the
                    sum of those of their classes); "sum": the sum; "none": w_r ℓ_r like hidden without its last
                    dimension, 0 where ignored. float32, float64 for float64.
    row_weight      w, a constant, floating point, integer or bool; like labels, at the positions that predict.
    class_weight    the `weight` of torch's cross_entropy, a constant: a factor of w for each class. Not with
                    label_smoothing or process_group.
    z_loss          λ_z of λ_z · log-sum-exp².
    logits_dtype    of the logits, else that of hidden.
    chunk_rows      rows of logits held at once, else `chunks.chunk_rows_for`.
    accum_dtype     of dW where it is a sum over chunks, else float32. With weight's dtype and small chunks the memory
                    beyond the gradients is one chunk of logits; each chunk then rounds dW once more.
    return_stats    also gives log-sum-exp, argmax, entropy and correctness of each supervised row, in the order of the
                    flattened labels, or of the rows.
    process_group   the group over which the vocabulary is spread: weight and bias hold the classes from `vocab_start`
                    on. All else must be the same in every process, and so are then the loss and hidden's gradient,
                    which is the whole one.
    debug           wait for the check of the labels. Without it, a label outside [0, V) is a ValueError on the CPU and
                    a failing assertion on a GPU (with process_group: a NaN).

    Under autocast, hidden and weight are cast as torch's linear casts them. No supervised row gives 0, still connected
    to the graph, and a warning, once. Raises TypeError or ValueError naming the argument.
    """
    check_hidden(hidden)
    check_decoder(hidden, weight, bias)
    _check(hidden, labels, row_weight, shift, ignore_index, reduction, normalizer)
    check_memory(hidden, logits_dtype, chunk_rows, accum_dtype)
    options = LogitOptions(softcap, logit_scale, label_smoothing, z_loss)
    shard = _shard(process_group, vocab_start, debug)
    _check_class_weight(class_weight, weight, options, shard)
    dtype, shape = autocast_dtype(hidden), hidden.shape[:-1]
    wide = wide_dtype(dtype)
    backend = resolve_backend(backend, hidden.device, dtype)

    hidden = hidden.reshape(-1, hidden.shape[-1]).to(dtype)
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    row_weight = None if row_weight is None else row_weight.detach().reshape(-1).to(wide)
    rows, token_row, ignored = None, None, None
    if isinstance(labels, SupervisedRows):
        rows, token_row = labels.rows[labels.ce_start :], labels.token_row - labels.ce_start
        labels, count = labels.labels[labels.ce_start :], labels.num_ce
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
    if dtype == torch.float16 and reduction != "none" and row_weight is not None and row_weight.numel():
        # gradients of rows of weight one, which fit, and are divided by the rest in float32
        most = row_weight.abs().amax()
        most = torch.where(most == 0, 1.0, most)
        row_weight, norm = row_weight / most, norm / most
    if backend == "reference":
        if return_stats or shard is not None:
            raise ValueError("return_stats and process_group are not served by backend='reference'")
        return _reference(hidden, weight, bias, labels, row_weight, norm, rows, options, reduction, shape)
    loss, *stats = cross_entropy(
        hidden,
        weight,
        bias,
        labels,
        row_weight,
        norm,
        options,
        rows=rows,
        token_row=token_row,
        ignore_index=ignored,
        per_row=reduction == "none",
        logits_dtype=logits_dtype,
        chunk_rows=chunk_rows,
        accum_dtype=accum_dtype,
        need_stats=return_stats,
        debug=debug,
        shard=shard,
        backend=backend,
    )
    loss = loss.view(shape) if reduction == "none" else loss
    return (loss, RowStats(*stats)) if return_stats else loss


def _shifted(labels: Tensor, shift: int, ignore_index: int) -> Tensor:
    """labels[..., p + shift] at p; none at the last ones."""
    return torch.nn.functional.pad(labels[..., shift:], (0, min(shift, labels.shape[-1])), value=ignore_index)


def _class_weights(class_weight: Tensor, labels: Tensor, ignore_index: int | None) -> Tensor:
    """The weight of each label's class, 0 where it is ignored. Those that are no class are left to `check_labels`."""
    weights = class_weight[labels.clamp(0, class_weight.shape[0] - 1)]
    return weights if ignore_index is None else torch.where(labels == ignore_index, 0.0, weights)


def _check(hidden, labels, row_weight, shift, ignore_index, reduction, normalizer) -> None:
    if not isinstance(shift, int):
        raise TypeError(f"shift must be a bool or an int, got {shift!r}")
    if shift < 0:
        raise ValueError(f"shift must be at least 0, got {shift}")
    if isinstance(labels, SupervisedRows):
        check_rows(labels, hidden)
        if shift:
            raise ValueError("shift has no meaning with SupervisedRows, whose labels are those of the next tokens")
    else:
        check_tensor("labels", labels, INTEGER)
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an int, got {ignore_index!r}")
    if row_weight is not None:
        check_tensor("row_weight", row_weight, NUMBERS)
        check_constant("row_weight", row_weight)
    for name, value in (("labels", labels), ("row_weight", row_weight)):
        if not isinstance(value, Tensor):
            continue
        if value.shape != hidden.shape[:-1]:
            raise ValueError(f"{name} must be {tuple(hidden.shape[:-1])} like hidden, got {tuple(value.shape)}")
        if value.device != hidden.device:
            raise ValueError(f"{name} is on {value.device}, hidden on {hidden.device}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be mean, sum or none, got {reduction!r}")
    if reduction != "mean" and normalizer is not None:
        raise ValueError(f"normalizer divides the mean: it has no meaning with reduction={reduction!r}")


def _check_class_weight(class_weight, weight: Tensor, options: LogitOptions, shard: VocabShard | None) -> None:
    if class_weight is None:
        return
    if options.label_smoothing or shard is not None:
        other = "process_group" if shard is not None else "label_smoothing"
        raise ValueError(f"class_weight is not served together with {other}")
    check_tensor("class_weight", class_weight)
    check_constant("class_weight", class_weight)
    if class_weight.shape != weight.shape[:1]:
        raise ValueError(f"class_weight must be (V,) = ({weight.shape[0]},), got {tuple(class_weight.shape)}")
    if class_weight.device != weight.device:
        raise ValueError(f"class_weight is on {class_weight.device}, weight on {weight.device}")


def _shard(process_group: "dist.ProcessGroup | None", vocab_start: int, debug: bool) -> VocabShard | None:
    if isinstance(vocab_start, bool) or not isinstance(vocab_start, int) or vocab_start < 0:
        raise ValueError(f"vocab_start must be an int, at least 0, got {vocab_start!r}")
    if process_group is None:
        if vocab_start:
            raise ValueError("vocab_start needs the process_group over which the vocabulary is spread")
        return None
    if not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(f"process_group must be a torch.distributed process group, got {type(process_group).__name__}")
    return VocabShard(process_group.group_name, vocab_start, debug)


def _reference(hidden, weight, bias, labels, row_weight, norm, rows, options, reduction, shape) -> Tensor:
    check_labels(labels, weight.shape[0], debug=True)
    with torch.autocast(hidden.device.type, enabled=False):
        losses = reference.linear_cross_entropy(
            hidden[rows], weight, labels, bias=bias, row_weight=row_weight, ignore_index=-1, **options.named()
        )
    if reduction != "none":
        return losses.sum() / norm
    return losses.new_zeros(hidden.shape[0]).index_copy(0, rows, losses).view(shape)
