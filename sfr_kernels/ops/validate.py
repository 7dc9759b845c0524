"""Errors for arguments that do not fit together: raised once, by the public functions, naming the argument."""

import torch
from torch import Tensor, nn

from ..config import SFRConfig
from ..rows import SupervisedRows
from .constants import INTEGER, check_constant, check_tensor
from .numerics import autocast_dtype, wide_dtype
from .velocity_head import HeadShape


def check_hidden(hidden: Tensor) -> None:
    check_tensor("hidden", hidden)
    if hidden.dim() < 2:
        raise ValueError(f"hidden must be (..., H) with at least two dimensions, got {tuple(hidden.shape)}")


def check_config(config: SFRConfig) -> None:
    if not isinstance(config, SFRConfig):
        raise TypeError(f"config must be an SFRConfig, got {type(config).__name__}")


def check_rows(rows: SupervisedRows, hidden: Tensor) -> None:
    if not isinstance(rows, SupervisedRows):
        raise TypeError(f"rows must be SupervisedRows, got {type(rows).__name__}")
    if hidden.shape[:-1].numel() != rows.shape[0] * rows.shape[1]:
        raise ValueError(f"rows were made for {rows.shape} tokens, hidden has {tuple(hidden.shape[:-1])}")
    if rows.device != hidden.device:
        raise ValueError(f"rows are on {rows.device}, hidden on {hidden.device}: move them with rows.to(device)")


def check_flow(hidden, head, rows, targets, times, seed, config) -> None:
    """Errors for arguments of the flow loss that do not fit together."""
    check_rows(rows, hidden)
    if isinstance(seed, Tensor):
        if seed.numel() != 1 or seed.dtype != torch.int64:
            raise TypeError(f"seed must be an int or one int64, got {tuple(seed.shape)} of {seed.dtype}")
    elif isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an int or a one-element int64 tensor, got {type(seed).__name__}")
    if times is not None:
        if config.is_dirac:
            raise ValueError(f"times must be None for loss={config.loss!r}, which is taken at t = 0")
        check_tensor("times", times)
        check_constant("times", times)
        if times.dim() != 1 or times.shape[0] == 0:
            raise ValueError(
                f"times must be (M,), M at least 1, got {tuple(times.shape)}; None kernels them to the seed"
            )
        if times.device != hidden.device:
            raise ValueError(f"times are on {times.device}, hidden on {hidden.device}")
    if rows.time_index is None and not config.is_dirac:
        if times is not None:
            raise ValueError("times were given, but rows.time_index is None: set it, or leave both to the seed")
        if config.time_sampling == "sequence":
            raise ValueError("rows were made for stratified times; build them with this config (time_sampling)")
    check_constant("targets", targets)
    check_tensor("rows.weight", rows.weight)
    check_constant("rows.weight", rows.weight)
    if config.loss == "mtp":
        check_tensor("targets", targets, INTEGER)
        if targets.shape != rows.labels.shape:
            shapes = f"{tuple(rows.labels.shape)}, got {tuple(targets.shape)}"
            raise ValueError(f"targets of loss='mtp' must be rows.labels {shapes}")
        if targets.device != hidden.device:
            raise ValueError(f"targets are on {targets.device}, hidden on {hidden.device}")
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
    check_tensor("targets", targets)
    if targets.dim() != 2:
        raise ValueError(f"targets must be (A, d), got {tuple(targets.shape)}")
    if targets.shape[0] != rows.num_anchors:
        raise ValueError(
            f"targets must have one row for each of the {rows.num_anchors} anchors of rows, got {targets.shape[0]}"
        )
    if targets.device != device:
        raise ValueError(f"targets are on {targets.device}, hidden on {device}")


def check_decoder(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Errors for a decoder that does not fit the hidden states."""
    for name, value in (("weight", weight), ("bias", bias)):
        if type(value).__name__ == "DTensor":
            raise TypeError(
                f"{name} is a DTensor, of which this process has a part: call the loss inside the module that owns it, "
                "where FSDP has gathered it (attach does), or give the local part, with process_group and vocab_start, "
                "if it is spread over the vocabulary"
            )
    if isinstance(weight, Tensor) and weight.numel() == 0:
        raise ValueError(
            f"weight is empty {tuple(weight.shape)}: an engine that shards parameters (ZeRO-3, FSDP) has taken it. "
            "Call the loss inside the module that owns it (attach does), or gather it first"
        )
    check_tensor("weight", weight)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(f"weight must be (V, H) with H = {hidden.shape[-1]} as in hidden, got {tuple(weight.shape)}")
    if bias is not None:
        check_tensor("bias", bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias must be (V,) = ({weight.shape[0]},), got {tuple(bias.shape)}")
    cast = torch.is_autocast_enabled(hidden.device.type)
    for name, value in (("weight", weight), ("bias", bias)):
        if value is None:
            continue
        if value.device != hidden.device:
            raise ValueError(f"{name} is on {value.device}, hidden on {hidden.device}")
        if value.dtype != hidden.dtype and not cast:
            raise TypeError(f"{name} is {value.dtype}, hidden is {hidden.dtype}: cast one, or use autocast")


def check_memory(
    hidden: Tensor, logits_dtype: torch.dtype | None, chunk_rows: int | None, accum_dtype: torch.dtype | None
) -> None:
    """Errors for what says how the logits and dW are held."""
    dtype = autocast_dtype(hidden)
    either = " or ".join(dict.fromkeys(map(str, (dtype, wide_dtype(dtype)))))
    if logits_dtype not in (None, dtype, wide_dtype(dtype)):
        raise ValueError(f"logits_dtype must be {either}, got {logits_dtype}")
    if chunk_rows is not None:
        if isinstance(chunk_rows, bool) or not isinstance(chunk_rows, int):
            raise TypeError(f"chunk_rows must be an int, got {chunk_rows!r}")
        if chunk_rows < 1:
            raise ValueError(f"chunk_rows must be at least 1, got {chunk_rows}")
    if accum_dtype not in (None, dtype, wide_dtype(dtype)):
        raise ValueError(f"accum_dtype must be {either}, got {accum_dtype}")
    if accum_dtype == torch.float16:
        raise ValueError("accum_dtype must not be float16, which has no room for a sum over thousands of rows")
