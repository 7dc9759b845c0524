"""The flow loss L_flow = Σ_r weight[r] ℓ_r / normalizer, for every kind of loss that needs no decoder.

"flow" and "mse" go the short way: path, head, loss, and the head's backward in one pass, so that after forward only
gradients are alive. They are gradients of Σ_r weight[r] ℓ_r; backward scales them by upstream / normalizer.
"cosine" is the head under autograd; "cka" has no head.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .. import reference
from ..config import SFRConfig
from ..rows import SupervisedRows
from .cka import response_cka
from .dispatch import leaves, resolve_backend
from .linear_cross_entropy import scatter_rows
from .numerics import autocast_dtype, check_hidden, normalizer_of, scaled, wide_dtype
from .times import draw_times
from .velocity_head import HeadShape, HeadWeights, head_backward, head_forward, scaled_grads, velocity_head


@dataclass(frozen=True)
class FlowInputs:
    """The flow rows of a call and all that is not differentiable about them."""

    rows: Tensor  # (n,) int64
    noise_id: Tensor  # (n,) int64
    anchor: Tensor  # (n,) int32
    weight: Tensor  # (n,) float32
    time_index: Tensor  # (n,) int32
    targets: Tensor  # (A, d)
    times: Tensor  # (M,)
    seed: int | Tensor
    config: SFRConfig

    @classmethod
    def of(cls, rows: SupervisedRows, targets, times, seed, config) -> "FlowInputs":
        n = rows.num_flow
        if times is None:
            times, time_index = draw_times(rows, seed, config)
        elif rows.time_index is None:
            raise ValueError("times were given, but rows.time_index is None: set it, or leave both to the seed")
        else:
            time_index = rows.time_index
        return cls(
            rows.rows[:n],
            rows.noise_id[:n],
            rows.anchor[:n],
            rows.weight[:n],
            time_index[:n],
            targets,
            times,
            seed,
            config,
        )


def run_flow(
    leaves,
    flow: FlowInputs,
    h: Tensor,  # (n, H)
    params: tuple[Tensor, ...],
    shape: HeadShape,
    coefficient: Tensor | None,  # (n,) scale of each row's gradient; None: the loss alone
    dh: Tensor | None,  # (n, H), to which the gradient of h is added
) -> tuple[Tensor, list[Tensor] | None]:
    """Row losses ℓ (n,), and the parameters' gradients of Σ_r coefficient[r] ℓ_r."""
    config = flow.config
    dirac = config.is_dirac
    x_t, u = leaves.flow_path(
        flow.targets,
        flow.times,
        flow.noise_id,
        flow.anchor,
        flow.time_index,
        flow.seed,
        target_scale=config.scale_for(shape.target_size),
        source_std=0.0 if dirac else config.source_std,
        dtype=h.dtype,
    )
    weights = HeadWeights(list(params), shape, h.dtype)
    v, saved = head_forward(leaves, weights, h, None if dirac else x_t, flow.times, flow.time_index)
    loss, dv, db = leaves.flow_mse(v, u, coefficient)
    if coefficient is None:
        return loss, None
    return loss, head_backward(leaves, weights, saved, dv, db, flow.time_index, dh)


class _FlowLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, normalizer, flow, leaves, shape, grad_enabled, *params):
        h = hidden.index_select(0, flow.rows)
        need = grad_enabled and any(ctx.needs_input_grad)
        dh = torch.zeros_like(h) if need and ctx.needs_input_grad[0] else None
        loss, grads = run_flow(leaves, flow, h, params, shape, flow.weight if need else None, dh)
        ctx.index, ctx.shape = flow.rows, hidden.shape
        ctx.dtypes = [p.dtype for p in params]
        ctx.save_for_backward(normalizer, dh, *(grads or ()))
        return (loss * flow.weight).sum() / normalizer

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        normalizer, dh, *grads = ctx.saved_tensors
        factor = upstream / normalizer
        if dh is not None:
            dh = scatter_rows(scaled(dh, factor, dh.dtype), ctx.index, ctx.shape)
        return dh, None, None, None, None, None, *scaled_grads(grads, ctx.dtypes, factor, ctx.needs_input_grad[6:])


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
    """L_flow, a float32 scalar (float64 for float64 hidden): DESIGN section 1; gradients: section 2.

    Differentiable in hidden and the head's parameters, which may be float32 beside 16-bit hidden states.
    seed: an int, or a one-element int64 tensor on the device. normalizer: None is the supervised rows of this call;
    `config.flow_normalizer="weights"` overrides it. No rows give 0, still connected to the graph.
    Raises TypeError or ValueError naming the argument; "mtp" needs the decoder and is served by `sfr_loss`.
    """
    check_hidden(hidden)
    check_config(config)
    if config.loss == "mtp":
        raise ValueError("loss='mtp' decodes with the lm_head: call sfr_loss")
    check_flow(hidden, head, rows, targets, times, seed, config)
    backend = resolve_backend(backend, hidden.device)
    if backend == "reference":
        params, scales = reference_head(head, hidden.dtype)
        return reference.flow_matching_loss(
            hidden, params, rows, targets, times, seed=seed, config=config, normalizer=normalizer, **scales
        )
    dtype = autocast_dtype(hidden)
    norm = flow_normalizer(normalizer, rows, config, wide_dtype(dtype))
    flat = hidden.reshape(-1, hidden.shape[-1]).to(dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        if config.loss == "cka":
            if rows.num_flow == 0:
                return (flat[:0].sum() * 0).to(norm.dtype)
            anchor = rows.anchor[: rows.num_flow].long()
            cka = response_cka(flat.index_select(0, rows.rows[: rows.num_flow]), targets, anchor)
            return (1 - cka) * (rows.num_flow / norm)
        flow = FlowInputs.of(rows, targets, times, seed, config)
        module = leaves(backend)
        if config.loss == "cosine":
            v = velocity_head(module, head, flat.index_select(0, flow.rows), None, flow.times, flow.time_index)
            x_1 = config.scale_for(head.shape.target_size) * targets.to(norm.dtype)[flow.anchor]
            return (flow.weight * (1 - torch.cosine_similarity(v.to(norm.dtype), x_1, dim=1))).sum() / norm
        grad = torch.is_grad_enabled()
        return _FlowLoss.apply(flat, norm, flow, module, head.shape, grad, *head.parameters())


def reference_head(head: nn.Module | None, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The head as the reference takes it: parameters by name, and its scales."""
    if head is None:
        return {}, {"time_scale": 1.0}
    shape = head.shape
    params = {name: p.to(dtype) for name, p in head.named_parameters()}
    return params, {"time_scale": shape.time_scale, "hidden_scale": shape.hidden_scale}


def flow_normalizer(normalizer, rows: SupervisedRows, config: SFRConfig, dtype: torch.dtype) -> Tensor:
    """What L_flow is divided by, as a zero-dim tensor."""
    if config.flow_normalizer == "weights":
        return rows.weight[: rows.num_flow].sum(dtype=dtype).clamp(min=1.0)
    return normalizer_of(normalizer, rows.num_ce, rows.device, dtype)


def check_config(config: SFRConfig) -> None:
    if not isinstance(config, SFRConfig):
        raise TypeError(f"config must be an SFRConfig, got {type(config).__name__}")


def check_flow(hidden, head, rows, targets, times, seed, config) -> None:
    """Errors for arguments of the flow loss that do not fit together."""
    if not isinstance(rows, SupervisedRows):
        raise TypeError(f"rows must be SupervisedRows, got {type(rows).__name__}")
    if hidden.shape[:-1].numel() != rows.shape[0] * rows.shape[1]:
        raise ValueError(f"rows were made for {rows.shape} tokens, hidden has {tuple(hidden.shape[:-1])}")
    if rows.device != hidden.device:
        raise ValueError(f"rows are on {rows.device}, hidden on {hidden.device}: move them with rows.to(device)")
    if isinstance(seed, Tensor):
        if seed.numel() != 1 or seed.dtype != torch.int64:
            raise TypeError(f"seed must be an int or one int64, got {tuple(seed.shape)} of {seed.dtype}")
    elif isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an int or a one-element int64 tensor, got {type(seed).__name__}")
    if times is not None:
        if config.is_dirac:
            raise ValueError(f"times must be None for loss={config.loss!r}, which is taken at t = 0")
        if not isinstance(times, Tensor) or times.dim() != 1 or not times.is_floating_point():
            got = f"{tuple(times.shape)} of {times.dtype}" if isinstance(times, Tensor) else type(times).__name__
            raise ValueError(f"times must be an (M,) floating-point tensor, got {got}")
        if times.device != hidden.device:
            raise ValueError(f"times are on {times.device}, hidden on {hidden.device}")
    if config.loss == "mtp":
        if targets.shape != rows.labels.shape or targets.is_floating_point():
            raise ValueError(
                f"targets of loss='mtp' must be rows.labels {tuple(rows.labels.shape)}, got "
                f"{tuple(targets.shape)} of {targets.dtype}"
            )
    else:
        check_targets(targets, rows, hidden.device)
    if config.loss == "cka":
        return
    if not isinstance(getattr(head, "shape", None), HeadShape):
        raise TypeError(f"head must be a VelocityHead, got {type(head).__name__}")
    check_scales(head, config)
    if head.shape.hidden_size != hidden.shape[-1]:
        raise ValueError(f"head was made for hidden size {head.shape.hidden_size}, hidden has {hidden.shape[-1]}")
    size = hidden.shape[-1] if config.loss == "mtp" else targets.shape[1]
    if head.shape.target_size != size:
        raise ValueError(f"head was made for target size {head.shape.target_size}, targets have {size}")


def check_scales(head: nn.Module, config: SFRConfig) -> None:
    """The head's scales are part of what it learned: they must be those of the objective."""
    for name in ("time_scale", "hidden_scale"):
        if getattr(head.shape, name) != getattr(config, name):
            raise ValueError(
                f"head was made with {name} {getattr(head.shape, name):g}, config has {getattr(config, name):g}: "
                "make it with VelocityHead.from_config"
            )


def check_targets(targets: Tensor, rows: SupervisedRows, device: torch.device) -> None:
    if not isinstance(targets, Tensor) or targets.dim() != 2 or not targets.is_floating_point():
        shape = tuple(targets.shape) if isinstance(targets, Tensor) else type(targets).__name__
        raise ValueError(f"targets must be (A, d) floating point, got {shape}")
    if targets.shape[0] != rows.num_anchors:
        raise ValueError(
            f"targets must have one row for each of the {rows.num_anchors} anchors of rows, got {targets.shape[0]}"
        )
    if targets.device != device:
        raise ValueError(f"targets are on {targets.device}, hidden on {device}")
    finite = torch.isfinite(targets).all()
    if targets.is_cuda:
        torch._assert_async(finite, "targets contain NaN or infinite values")
    elif not finite:
        raise ValueError("targets contain NaN or infinite values")
