"""Cross-entropy of logits = hidden · weightᵀ + bias over the supervised rows, a bounded chunk at a time.

Supervised rows are gathered; per chunk of rows the logits are made in one reused buffer, turned into their gradient in
place, and multiplied out at once: dh = dz W, dW += dzᵀ h. So the forward pass leaves the gradients of Σ_r w_r ℓ_r
behind, and backward only scales them by upstream / normalizer, in float32 and out of place. `reduction="none"` has an
upstream gradient per row, known in backward only: there the chunks are run again, each row weighted by its own.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import reference
from ..leaves import RowStats
from ..rows import IGNORE_INDEX
from .dispatch import leaves, resolve_backend
from .numerics import accumulate_product, autocast_dtype, check_hidden, normalizer_of, scaled, wide_dtype

_VOCAB_BLOCK = 4096


@dataclass(frozen=True)
class LogitOptions:
    """How logits become a loss; the same for every row."""

    softcap: float | None = None
    logit_scale: float = 1.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def __post_init__(self):
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap must be positive, got {self.softcap}")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {self.label_smoothing}")
        if not (self.z_loss >= 0 and math.isfinite(self.z_loss)):
            raise ValueError(f"z_loss must be finite and not negative, got {self.z_loss}")
        if not math.isfinite(self.logit_scale):
            raise ValueError(f"logit_scale must be finite, got {self.logit_scale}")


@dataclass(frozen=True)
class Plan:
    """Everything about a call that is not a differentiable tensor."""

    labels: Tensor  # (n,)
    options: LogitOptions
    row_weight: Tensor | None  # (n,)
    logits_dtype: torch.dtype
    chunk_rows: int | None
    leaves: object
    need_stats: bool = False
    per_row: bool = False
    grad_enabled: bool = True


def chunk_rows_for(n: int, hidden_size: int, dtype: torch.dtype, trained_head: bool) -> int:
    """Rows of logits held at once.

    Trained head: all of them while they take no more than the float32 dW accumulator that one chunk makes needless
    (n · itemsize ≤ 4 H), else equal chunks of about H rows. Frozen head: chunks of at most H / 2 rows. Never below
    1024: small products waste the machine.
    """
    if trained_head and n * dtype.itemsize <= 4 * hidden_size:
        return max(n, 1)
    most = max(1024, hidden_size if trained_head else hidden_size // 2)
    chunks = max(1, -(-n // most))
    return max(1, -(-n // chunks))


@dataclass
class LinearCrossEntropyResult:
    """Row losses and the gradients of their sum; a gradient is None where it was not asked for."""

    loss: Tensor  # (n,) float32
    stats: RowStats | None
    dhidden: Tensor | None  # (n, H)
    dweight: Tensor | None  # (V, H), float32 where it was accumulated
    dbias: Tensor | None  # (V,) float32


def _logits(h: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """h Wᵀ + b in `out`, whose dtype may be wider than that of the factors; rounded once, bias included."""
    if out.dtype == h.dtype:
        return torch.mm(h, weight.T, out=out) if bias is None else torch.addmm(bias, h, weight.T, out=out)
    if h.is_cuda:
        torch.mm(h, weight.T, out_dtype=out.dtype, out=out)
    else:
        wide = h.to(out.dtype)
        for start in range(0, weight.shape[0], _VOCAB_BLOCK):
            block = slice(start, start + _VOCAB_BLOCK)
            out[:, block] = wide @ weight[block].to(out.dtype).T
    return out if bias is None else out.add_(bias)


def run_chunks(
    h: Tensor,  # (n, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    plan: Plan,
    need: tuple[bool, bool, bool],  # gradients of h, weight, bias
    dh: Tensor | None = None,  # (n, H), where to write the gradient of h
) -> LinearCrossEntropyResult:
    """The chunk loop: row losses, and the gradients of Σ_r row_weight[r] ℓ_r."""
    n, hidden_size = h.shape
    need_h, need_w, need_b = need
    rows = plan.chunk_rows or chunk_rows_for(n, hidden_size, plan.logits_dtype, need_w)
    rows = max(1, min(rows, n))
    wide = wide_dtype(h.dtype)
    # One chunk needs no accumulator, but fp16 has no room for a sum over thousands of rows.
    one_product = rows >= n and h.dtype != torch.float16
    buffer = h.new_empty(rows, weight.shape[0], dtype=plan.logits_dtype)
    loss = h.new_empty(n, dtype=wide)
    if need_h and dh is None:
        dh = torch.empty_like(h)
    dw = torch.zeros_like(weight, dtype=weight.dtype if one_product else wide) if need_w else None
    db = h.new_zeros(weight.shape[0], dtype=wide) if need_b else None
    stats = []
    for start in range(0, n, rows):
        chunk = slice(start, min(start + rows, n))
        x = _logits(h[chunk], weight, bias, buffer[: chunk.stop - start])
        loss[chunk], row_stats = plan.leaves.softmax_xent(
            x,
            plan.labels[chunk],
            None if plan.row_weight is None else plan.row_weight[chunk],
            logit_scale=plan.options.logit_scale,
            softcap=plan.options.softcap,
            label_smoothing=plan.options.label_smoothing,
            z_loss=plan.options.z_loss,
            need_grad=any(need),
            need_stats=plan.need_stats,
        )
        stats.append(row_stats)
        if any(need):
            dz = x.to(h.dtype)
            if need_h:
                torch.mm(dz, weight, out=dh[chunk])
            if need_w:
                accumulate_product(dw, dz.T, h[chunk])
            if need_b:
                db += x.sum(0, dtype=wide)
    if plan.need_stats:
        empty = RowStats(loss.new_empty(0), plan.labels.new_empty(0), loss.new_empty(0))
        stats = RowStats(*(torch.cat(column) for column in zip(*(stats or [empty]), strict=True)))
    return LinearCrossEntropyResult(loss, stats if plan.need_stats else None, dh, dw, db)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, normalizer, index, plan):
        h = hidden.index_select(0, index)
        need = tuple(plan.grad_enabled and not plan.per_row and flag for flag in ctx.needs_input_grad[:3])
        out = run_chunks(h, weight, bias, plan, need)
        ctx.plan, ctx.shape = plan, hidden.shape
        if plan.per_row:
            ctx.save_for_backward(hidden, weight, bias, normalizer, index)
            loss = out.loss / normalizer
        else:
            ctx.save_for_backward(out.dhidden, out.dweight, out.dbias, normalizer, index)
            ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
            loss = out.loss.sum() / normalizer
        stats = () if out.stats is None else tuple(out.stats)
        ctx.mark_non_differentiable(*stats)
        return loss, *stats

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, *_):
        if ctx.plan.per_row:
            hidden, weight, bias, normalizer, index = ctx.saved_tensors
            upstream = upstream.to(normalizer.dtype)
            row_weight = upstream if ctx.plan.row_weight is None else upstream * ctx.plan.row_weight
            plan = replace(ctx.plan, row_weight=row_weight, need_stats=False)
            out = run_chunks(hidden.index_select(0, index), weight, bias, plan, ctx.needs_input_grad[:3])
            dh, dw, db, factor = out.dhidden, out.dweight, out.dbias, 1 / normalizer
            dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        else:
            dh, dw, db, normalizer, index = ctx.saved_tensors
            factor, dtypes = upstream / normalizer, ctx.dtypes
        if dh is not None:
            dh = scatter_rows(scaled(dh, factor, dtypes[0]), index, ctx.shape)
        dw = None if dw is None else scaled(dw, factor, dtypes[1])
        db = None if db is None else scaled(db, factor, dtypes[2])
        return dh, dw, db, None, None, None


def scatter_rows(rows: Tensor, index: Tensor, shape: torch.Size) -> Tensor:
    """(n, H) rows at their places in an (N, H) tensor of zeros."""
    return rows.new_zeros(shape).index_copy_(0, index, rows)


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
    backend = resolve_backend(backend, hidden.device)

    shape, hidden = labels.shape, hidden.reshape(-1, hidden.shape[-1])
    if shift:
        following = torch.full_like(labels, ignore_index)
        following[..., :-1] = labels[..., 1:]
        labels = following
    labels = labels.reshape(-1).long()
    index = (labels != ignore_index).nonzero().squeeze(1)
    labels = labels[index]
    check_labels(labels, weight.shape[0])
    row_weight = None if row_weight is None else row_weight.detach().reshape(-1)[index]
    dtype = autocast_dtype(hidden)
    norm = normalizer_of(normalizer if reduction == "mean" else 1, index.numel(), hidden.device, wide_dtype(dtype))
    hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        if backend == "reference":
            if return_stats:
                raise ValueError("return_stats is not served by backend='reference'")
            rows = reference.linear_cross_entropy(
                hidden[index], weight, labels, bias=bias, row_weight=row_weight, ignore_index=-1, **vars(options)
            )
            loss = rows if reduction == "none" else rows.sum() / norm
            stats = ()
        else:
            plan = Plan(
                labels,
                options,
                row_weight,
                logits_dtype or dtype,
                chunk_rows,
                leaves(backend),
                return_stats,
                reduction == "none",
                torch.is_grad_enabled(),
            )
            loss, *stats = _LinearCrossEntropy.apply(hidden, weight, bias, norm, index, plan)
    if reduction == "none":
        loss = loss.new_zeros(shape.numel()).index_copy(0, index, loss).view(shape)
    return (loss, RowStats(*stats)) if return_stats else loss


def check_decoder(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Errors for a decoder that does not fit the hidden states."""
    if not isinstance(weight, Tensor) or weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        shape = tuple(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
        raise ValueError(f"weight must be (V, H) with H = {hidden.shape[-1]} as in hidden, got {shape}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be (V,) = ({weight.shape[0]},), got {tuple(bias.shape)}")
    cast = torch.is_autocast_enabled(hidden.device.type)
    for name, value in (("weight", weight), ("bias", bias)):
        if value is None:
            continue
        if value.device != hidden.device:
            raise ValueError(f"{name} is on {value.device}, hidden on {hidden.device}")
        if value.dtype != hidden.dtype and not cast:
            raise TypeError(f"{name} is {value.dtype}, hidden is {hidden.dtype}: cast one, or use autocast")


def check_labels(labels: Tensor, vocab: int) -> None:
    """Labels of supervised rows must be classes. On a GPU the check is an assertion on the device: no wait."""
    valid = ((labels >= 0) & (labels < vocab)).all()
    if labels.is_cuda:
        torch._assert_async(valid, f"labels must be in [0, {vocab}) or ignore_index")
    elif not valid:
        wrong = labels[(labels < 0) | (labels >= vocab)][0].item()
        raise ValueError(f"labels must be in [0, {vocab}), the vocabulary of weight, or ignore_index; got {wrong}")
