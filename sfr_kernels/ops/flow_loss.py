"""The flow loss L_flow = Σ_r weight[r] ℓ_r / normalizer, for every kind of loss that needs no decoder.

"flow" and "mse" are one operator: path, head, loss, and the head's backward, so that after forward only gradients are
alive; backward scales them by the upstream one. "cosine" is the head under autograd; "cka" has no head.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import reference
from ..config import SFRConfig
from ..kernels.backend import resolve_backend
from ..kernels.flow import FlowPath, flow_mse, flow_path
from ..kernels.times import sequence_times, stratified_times
from ..rows import SupervisedRows
from .autograd import (
    Inputs,
    Need,
    Operator,
    fake_parameter_grads,
    finish_gradients,
    keep_gradients,
    matrix_views,
    new_matrices,
    new_vectors,
)
from .numerics import (
    aligned,
    autocast_dtype,
    gather_rows,
    rms_norm,
    rms_norm_backward,
    split_normalizer,
    wide_dtype,
    without_autocast,
)
from .validate import check_flow, check_hidden, normalizer_of, on_device
from .velocity_head import HeadCall, HeadWeights, head_backward, head_forward, named_parameters, velocity_head

_LEAST_RESPONSES = 4  # of the unbiased CKA


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
    """L_flow, a float32 scalar (float64 for float64 hidden); formula: `reference.flow_matching_loss`.

    Differentiable in hidden and the head's parameters, which may be float32 beside 16-bit hidden states.
    seed: an int, or a one-element int64 tensor on the device. normalizer: None is the supervised rows of this call;
    `config.flow_normalizer="weights"` overrides it. No rows give 0, still connected to the graph. targets, times,
    normalizer and rows.weight are constants: none may require a gradient.
    Raises TypeError or ValueError naming the argument; "mtp" needs the decoder and is served by `sfr_loss`.
    """
    check_hidden(hidden)
    if isinstance(config, SFRConfig) and config.loss == "mtp":
        raise ValueError("loss='mtp' decodes with the lm_head: call sfr_loss")
    check_flow(hidden, head, rows, targets, times, seed, config)
    dtype = autocast_dtype(hidden)
    backend = resolve_backend(backend, hidden.device, dtype)
    norm = normalizer_of(normalizer, rows.num_ce, hidden.device, wide_dtype(dtype))
    norm = flow_normalizer(norm, rows, config)
    if backend == "reference":
        if not torch.compiler.is_compiling():
            check_finite(targets)
        params, scales = reference_head(head, hidden.dtype)
        seed = seed_tensor(seed, hidden.device)
        return reference.flow_matching_loss(
            hidden, params, rows, targets, times, seed=seed, config=config, normalizer=norm, **scales
        ).to(norm.dtype)
    flat = hidden.reshape(-1, hidden.shape[-1]).to(dtype)
    if config.loss in ("cosine", "cka"):
        return cosine_or_cka(backend, flat, head, rows, targets, config, norm)
    flow = flow_of(rows, targets, times, seed, config, head)
    call = FlowCall(rows.rows[: rows.num_flow], rows.token_row, norm, backend, flow)
    return flow_loss_op(Inputs(flat, params=[*named_parameters(head).values()]), call)[0]


def check_finite(targets: Tensor) -> None:
    """On the CPU, where it costs little; on a GPU it would be a device sync, and a NaN shows in the loss."""
    if targets.device.type == "cpu" and not torch.isfinite(targets).all():
        raise ValueError("targets contain NaN or infinite values")


def reference_head(head: Any, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The head as the reference takes it: parameters by name, and its scales and norm."""
    if head is None:
        return {}, {"time_scale": 1.0}
    shape = head.shape
    params = {name: p.to(dtype) for name, p in named_parameters(head).items()}
    return params, {name: getattr(shape, name) for name in ("time_scale", "hidden_scale", "hidden_norm")}


def flow_normalizer(normalizer: Tensor, rows: SupervisedRows, config: SFRConfig) -> Tensor:
    """What L_flow is divided by, as a zero-dim tensor."""
    if config.flow_normalizer == "weights":
        return rows.weight[: rows.num_flow].sum(dtype=normalizer.dtype).clamp(min=1.0)
    return normalizer


def cosine_or_cka(
    backend: str,
    h: Tensor,  # (N, H)
    head: Any,  # VelocityHead
    rows: SupervisedRows,
    targets: Tensor,
    config: SFRConfig,
    norm: Tensor,
) -> Tensor:
    """L_flow of the two losses that torch's own autograd takes backward."""
    if not torch.compiler.is_compiling():
        check_finite(targets)
    n = rows.num_flow
    h, anchor, weight = h.index_select(0, rows.rows[:n]), rows.anchor[:n], rows.weight[:n]
    if config.loss == "cosine":  # Σ_r weight[r] (1 − cos(head(0, 0, h), x_1))
        v = velocity_head(backend, head, h, None, h.new_zeros(1), torch.zeros_like(anchor))
        with torch.autocast(h.device.type, enabled=False):
            wide = wide_dtype(v.dtype)
            x_1 = config.scale_for(head.shape.target_size) * targets.to(wide)[anchor]
            return (weight * (1 - torch.cosine_similarity(v.to(wide), x_1, dim=1))).sum() / norm
    with torch.autocast(h.device.type, enabled=False):
        loss = cka_loss(h, targets, anchor.long(), config.target_rule == "published")
        return loss if config.flow_normalizer == "weights" else loss * (n / norm)


def cka_loss(
    h: Tensor,  # (n, H), hidden states of the flow rows
    targets: Tensor,  # (A, d)
    anchor: Tensor,  # (n,), the response of each row
    published: bool,
) -> Tensor:
    """1 − linear CKA between per-response mean hidden states and their targets: a float32 scalar (float64 for float64
    h), differentiable in h; 0 without rows. By U-centred Gram matrices (Székely & Rizzo 2014, unbiased):

        Ã_ij = A_ij − Σ_j A_ij/(n−2) − Σ_i A_ij/(n−2) + Σ A/((n−1)(n−2)) off the diagonal, 0 on it
        HSIC(A, B) = Σ Ã B̃ / (n(n − 3))      CKA = HSIC(K, L) / √(HSIC(K, K) HSIC(L, L))

    As published, CKA is kept within [0, 1], and fewer than four responses have loss 0. Else fewer are a ValueError;
    where responses without text make them fewer, that is known on the CPU alone, and on a GPU (to avoid a device sync)
    and under a compiler the loss is NaN.
    """
    wide = torch.promote_types(h.dtype, torch.float32)
    count = targets.shape[0]
    if h.shape[0] == 0 or (published and count < _LEAST_RESPONSES):
        return h.to(wide).sum() * 0
    member = (torch.arange(count, device=h.device).unsqueeze(1) == anchor).to(wide)
    rows = member.sum(1, keepdim=True)
    present = rows.squeeze(1) > 0  # a response without text has no rows
    if not published:
        if h.device.type == "cpu" and not torch.compiler.is_compiling():
            count = int(present.sum())
        if count < _LEAST_RESPONSES:
            raise ValueError(
                f"loss='cka' needs at least {_LEAST_RESPONSES} responses in a batch, got {count}: "
                "raise the batch size, drop the last batch"
            )
    k, q = (_centred(x, present) for x in (member @ h.to(wide) / rows.clamp(min=1), targets.to(wide)))
    norms = (k.square().sum() * q.square().sum()).clamp(min=1e-24)
    cka = (k * q).sum() / norms.sqrt()
    loss = 1 - (cka.clamp(0, 1) if published else cka)
    return torch.where(present.sum() < _LEAST_RESPONSES, 0.0 if published else torch.nan, loss)


def _centred(x: Tensor, present: Tensor) -> Tensor:
    """The U-centred Gram matrix of the rows of x that are present, zero for the others."""
    n = present.sum().clamp(min=_LEAST_RESPONSES)  # with fewer, the result is discarded
    off = (present.unsqueeze(1) & present).to(x.dtype).fill_diagonal_(0)
    gram = (x @ x.T) * off
    sums = gram.sum(dim=1)
    return (gram - (sums[:, None] + sums[None, :]) / (n - 2) + sums.sum() / ((n - 1) * (n - 2))) * off


# ---------------------------------------------------------------------------------------------------------------------
# The seed of a step, and its times.


def draw_times(
    backend: str,
    noise_id: Tensor,  # (n,) int64
    time_index: Tensor | None,  # (n,) int32, the sequence of each row; None: one table for all rows
    sequence_id: Tensor | None,  # (B,) int64, the identity of each sequence
    seed: Tensor,  # (1,) int64
    num_times: int,  # M, the size of the table; 0: every row at t = 0
) -> tuple[Tensor, Tensor]:  # times (M,) float32, time_index (n,) int32
    """The table of times and every row's index into it, from the seed and the rows' identities alone."""
    if num_times == 0:
        device = noise_id.device
        index = torch.zeros(noise_id.shape[0], dtype=torch.int32, device=device)
        return torch.zeros(1, dtype=torch.float32, device=device), index
    if time_index is None:
        return stratified_times(backend, noise_id, seed, num_times)
    return sequence_times(backend, sequence_id, seed), time_index


def sequence_ids(rows: SupervisedRows) -> Tensor:
    """(B,) int64: the first identity among the rows of each sequence."""
    index: Any = rows.time_index
    first = torch.zeros(rows.shape[0], dtype=torch.int64, device=rows.device)
    return first.scatter_reduce_(0, index.long(), rows.noise_id, "amin", include_self=False)


def seed_tensor(seed: int | Tensor, device: torch.device) -> Tensor:
    """The seed as one int64 on the device: the same 64 bits, whether they came signed or not.

    A traced seed is taken as it is, below 2⁶³: inductor has no numbers beyond 64 bits to wrap it with.
    """
    if isinstance(seed, Tensor):
        return on_device(seed.reshape(1), device)
    if not torch.compiler.is_compiling():
        seed = (seed + 2**63) % 2**64 - 2**63
    return torch.full((1,), seed, dtype=torch.int64, device=device)


def step_seed(seed: int, step: int | Tensor) -> int | Tensor:
    """A 63-bit seed from (config.seed, step), the same on every rank: the SplitMix64 finaliser.

    The step may be an int64 tensor, which a compiled function takes for a variable; so is the seed then.
    """
    x = _signed(_signed(seed * 0x9E3779B97F4A7C15) + (step + 2) * _signed(0xD1B54A32D192ED03))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = _signed((x ^ _shifted(x, shift)) * _signed(factor))
    return _shifted(x ^ _shifted(x, 31), 1)


def _signed(x: int | Tensor) -> int | Tensor:
    """The last 64 bits as a signed number, which those of a tensor are."""
    return x if isinstance(x, Tensor) else (x + 2**63) % 2**64 - 2**63


def _shifted(x: int | Tensor, count: int) -> int | Tensor:
    """The 64 bits of x, shifted right, with zeros from the left."""
    return (x >> count) & (2 ** (64 - count) - 1)


# ---------------------------------------------------------------------------------------------------------------------
# The operator of "flow" and "mse".


class Flow(NamedTuple):
    """The flow rows of a call and their path; times and time_index are None where the seed gives them."""

    targets: Tensor  # (A, d)
    times: Tensor | None  # (M,)
    noise_id: Tensor  # (n,) int64
    anchor: Tensor  # (n,) int32
    weight: Tensor  # (n,) float32
    time_index: Tensor | None  # (n,) int32
    sequence_id: Tensor | None  # (B,) int64
    seed: Tensor  # (1,) int64
    num_times: int  # M; 0: the head sees x_t = 0 at t = 0
    time_power: float  # of drawn times
    target_scale: float
    source_std: float
    time_scale: float
    hidden_scale: float
    hidden_norm: str


def flow_of(
    rows: SupervisedRows, targets: Tensor, times: Tensor | None, seed: int | Tensor, config: SFRConfig, head: Any
) -> Flow:
    n, index, sequence_id, num_times = rows.num_flow, rows.time_index, None, 0
    if config.is_dirac:
        times = index = None
    elif times is not None:
        num_times = times.shape[0]
    elif config.time_sampling == "sequence":
        sequence_id, num_times = sequence_ids(rows), rows.shape[0]
    else:
        index, num_times = None, config.num_times
    return Flow(
        targets, times, rows.noise_id[:n], rows.anchor[:n], rows.weight[:n], None if index is None else index[:n],
        sequence_id, seed_tensor(seed, rows.device), num_times, float(config.time_power),
        config.scale_for(head.shape.target_size),
        0.0 if config.is_dirac else config.source_std, head.shape.time_scale, head.shape.hidden_scale,
        head.shape.hidden_norm,
    )  # fmt: skip


def run_flow(
    backend: str,
    h: Tensor,  # (n, H)
    params: Sequence[Tensor],
    coefficient: Tensor | None,  # (n,) scale of each row's gradient; None: the loss alone
    flow: Flow,
    *,
    need_params: bool = True,
    dh: Tensor | None = None,  # as in `head_backward`
    add_to_dh: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Row losses ℓ (n,), and the parameters' gradients of Σ_r coefficient[r] ℓ_r in two buffers."""
    if flow.hidden_norm == "rms":
        normed, rstd = rms_norm(h)
        normed, flow = aligned(normed), flow._replace(hidden_norm="none")
        dnormed = None if dh is None else normed  # the last to read it writes over it
        found = run_flow(backend, normed, params, coefficient, flow, need_params=need_params, dh=dnormed)
        if dh is not None:
            rms_norm_backward(normed, h, rstd, dh, add=add_to_dh)
        return found
    check_finite(flow.targets)
    times: Any = flow.times
    time_index: Any = flow.time_index
    if times is None:
        times, time_index = draw_times(backend, flow.noise_id, time_index, flow.sequence_id, flow.seed, flow.num_times)
        times = times**flow.time_power
    path = FlowPath(
        aligned(flow.targets), times, flow.noise_id, flow.anchor, time_index, flow.seed, flow.target_scale,
        flow.source_std,
    )  # fmt: skip
    if backend == "cuda" and coefficient is not None and flow.num_times:
        from ..kernels.flow import one_call

        if one_call.serves_flow_loss(h, list(params), flow.targets, times.shape[0]):
            shapes = [p.shape for p in params] if need_params else []
            matrices, vectors = new_matrices(shapes, h), new_vectors(shapes, h)
            loss = one_call.flow_loss(
                h, list(params), path, coefficient, flow.time_scale, flow.hidden_scale,
                matrices=matrix_views(matrices, shapes), vectors=vectors if need_params else None,
                dh=dh, add_to_dh=add_to_dh,
            )  # fmt: skip
            return loss, matrices, vectors
    x_t, u = flow_path(backend, path, h.dtype)
    x_t = aligned(x_t) if flow.num_times else None
    head = HeadCall(x_t, times, time_index, flow.time_scale, flow.hidden_scale, backend)
    weights = HeadWeights(params, h.dtype)
    saved = head_forward(head, weights, h)
    loss, db = flow_mse(backend, saved.outputs[-1], u, coefficient)
    if coefficient is None:
        return loss, h.new_empty(0), loss.new_empty(0)
    saved.overwrite = True
    return loss, *head_backward(head, weights, saved, h, db, need_params=need_params, dh=dh, add_to_dh=add_to_dh)


class FlowCall(NamedTuple):
    """What the operator is given beside its inputs."""

    rows: Tensor  # (n,) int64, the flow rows among the N tokens
    token_row: Tensor  # (N,) int32, for backward
    normalizer: Tensor  # zero-dim
    backend: str
    flow: Flow


def _forward(x: Inputs, call: FlowCall, need: Need) -> list[Tensor]:
    """[loss, dh (n, H), the parameters' two buffers]; the gradients in float16 those of normalizer times the loss."""
    with without_autocast(x.hidden):
        weight, (early, _) = call.flow.weight, split_normalizer(call.normalizer, x.hidden.dtype)
        scaled = weight if early is None else weight.to(early.dtype) / early
        coefficient = scaled if need.hidden or need.params else None
        h = gather_rows(x.hidden, call.rows)
        dh = h if need.hidden else None  # the last to read h writes over it
        loss, *buffers = run_flow(call.backend, h, x.params, coefficient, call.flow, need_params=need.params, dh=dh)
        total = (loss * weight).sum() / call.normalizer
        return [total, h.contiguous() if need.hidden else h.new_empty(0, 0), *buffers]


def _fake(x: Inputs, call: FlowCall, need: Need) -> list[Tensor]:
    loss = x.hidden.new_empty((), dtype=wide_dtype(x.hidden.dtype))
    dh = x.hidden.new_empty((call.rows.shape[0], x.hidden.shape[1]) if need.hidden else (0, 0))
    return [loss, dh, *fake_parameter_grads(x.hidden, x.params, need.params)]


flow_loss_op = Operator("flow_loss", FlowCall, _forward, _fake, keep_gradients, finish_gradients)
