"""What a public function is given: errors naming the argument, and numbers as tensors."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..config import HeadShape, SFRConfig
from ..rows import SupervisedRows
from .autograd import has_tangent
from .lora import LoRA
from .numerics import autocast_dtype, wide_dtype

# Named one by one: a float8 or a quantized dtype holds codes, whatever torch says of it.
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_INTEGERS = (
    *(torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint64, torch.uint32, torch.uint16, torch.uint8),
)
FLOATING, INTEGER, NUMBERS = "a floating-point tensor of 16, 32 or 64 bit", "an integer tensor", "a tensor of numbers"
_DTYPES = {FLOATING: _FLOATS, INTEGER: _INTEGERS, NUMBERS: (*_FLOATS, *_INTEGERS, torch.bool)}


def check_tensor(name: str, value: Tensor, kind: str = FLOATING) -> None:
    if not isinstance(value, Tensor) or value.dtype not in _DTYPES[kind]:
        raise TypeError(f"{name} must be {kind}, got {getattr(value, 'dtype', type(value).__name__)}")


def check_constant(name: str, value) -> None:
    """ValueError for a tensor that requires a gradient: the losses have none for constants."""
    if isinstance(value, Tensor) and ((torch.is_grad_enabled() and value.requires_grad) or has_tangent([value])):
        raise ValueError(f"{name} must not require a gradient, which the losses do not have for it: detach it")


def check_number(name: str, value: float | Tensor, least: float = -math.inf) -> None:
    """Errors for anything but a number or a one-element tensor."""
    if isinstance(value, Tensor):
        check_tensor(name, value, NUMBERS)
        check_constant(name, value)
        if value.numel() != 1:
            raise ValueError(f"{name} must have one element, got shape {tuple(value.shape)}")
    elif isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number or a tensor, got {value!r}")
    elif not (-math.inf < value < math.inf and value >= least):
        bound = "" if least == -math.inf else f", at least {least:g}"
        raise ValueError(f"{name} must be a finite number{bound}, got {value}")


def check_hidden(hidden: Tensor) -> None:
    check_tensor("hidden", hidden)
    if hidden.dim() < 2:
        raise ValueError(f"hidden must be (..., H) with at least two dimensions, got {tuple(hidden.shape)}")


def check_flow_hidden(flow_hidden: Tensor | None, hidden: Tensor) -> None:
    if flow_hidden is None:
        return
    check_tensor("flow_hidden", flow_hidden)
    if flow_hidden.shape != hidden.shape or flow_hidden.device != hidden.device:
        found, wanted = (f"{tuple(x.shape)} on {x.device}" for x in (flow_hidden, hidden))
        raise ValueError(f"flow_hidden must be like hidden, {wanted}, got {found}")


def check_rows(rows: SupervisedRows, hidden: Tensor) -> None:
    if not isinstance(rows, SupervisedRows):
        raise TypeError(f"rows must be SupervisedRows, got {type(rows).__name__}")
    if hidden.shape[:-1].numel() != rows.shape[0] * rows.shape[1]:
        raise ValueError(f"rows were made for {rows.shape} tokens, hidden has {tuple(hidden.shape[:-1])}")
    if rows.device != hidden.device:
        raise ValueError(f"rows are on {rows.device}, hidden on {hidden.device}: move them with rows.to(device)")


def check_flow(hidden, head, rows, targets, times, seed, config) -> None:
    """Errors for arguments of the flow loss that do not fit together."""
    if not isinstance(config, SFRConfig):
        raise TypeError(f"config must be an SFRConfig, got {type(config).__name__}")
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
                f"times must be (M,), M at least 1, got {tuple(times.shape)}; None leaves them to the seed"
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
        _check_targets(targets, rows, hidden.device)
    if config.loss == "cka":
        return
    if not isinstance(getattr(head, "shape", None), HeadShape):
        raise TypeError(f"head must be a VelocityHead, got {type(head).__name__}")
    if elsewhere := {p.device for p in head.parameters()} - {hidden.device}:
        raise ValueError(
            f"head is on {elsewhere.pop()}, hidden on {hidden.device}: move it with head.to(device). If an engine has "
            "offloaded its weights, let it do so before attach, or whole: accelerate's "
            "preload_module_classes=['Attachment']"
        )
    check_head_shape(head, config)
    if head.shape.hidden_size != hidden.shape[-1]:
        raise ValueError(f"head was made for hidden size {head.shape.hidden_size}, hidden has {hidden.shape[-1]}")
    if config.loss != "mtp" and head.shape.target_size != targets.shape[1]:
        raise ValueError(f"head was made for target size {head.shape.target_size}, targets have {targets.shape[1]}")


def _check_targets(targets: Tensor, rows: SupervisedRows, device: torch.device) -> None:
    check_tensor("targets", targets)
    if targets.dim() != 2:
        raise ValueError(f"targets must be (A, d), got {tuple(targets.shape)}")
    if targets.shape[0] != rows.num_anchors:
        raise ValueError(
            f"targets must have one row for each of the {rows.num_anchors} anchors of rows, got {targets.shape[0]}"
        )
    if targets.device != device:
        raise ValueError(f"targets are on {targets.device}, hidden on {device}")


def check_head_shape(head: Any, config: SFRConfig) -> None:
    """The head's scales and norm are part of what it learned, and its output is what the loss is taken of: both must be
    those of the objective."""
    shape = head.shape
    for name in ("time_scale", "hidden_scale", "hidden_norm"):
        if getattr(shape, name) != getattr(config, name):
            raise ValueError(
                f"head was made with {name} {getattr(shape, name)}, config has {getattr(config, name)}: "
                "make it with VelocityHead.from_config"
            )
    mtp = config.loss == "mtp"
    size = config.mtp_tokens * shape.hidden_size if mtp else shape.target_size
    if shape.output_size != size:
        what = f"mtp_tokens={config.mtp_tokens} hidden states" if mtp else "a velocity"
        raise ValueError(
            f"head must have output size {size}, {what}, for loss={config.loss!r}, got {shape.output_size}: make it "
            "with VelocityHead.from_config"
        )


def check_decoder(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Errors for a decoder that does not fit the hidden states."""
    _check_whole("weight", weight)
    _check_whole("bias", bias)
    check_tensor("weight", weight)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(f"weight must be (V, H) with H = {hidden.shape[-1]} as in hidden, got {tuple(weight.shape)}")
    if bias is not None:
        check_tensor("bias", bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias must be (V,) = ({weight.shape[0]},), got {tuple(bias.shape)}")
        _check_beside("bias", bias, hidden)
    _check_beside("weight", weight, hidden)


def check_lora(hidden: Tensor, weight: Tensor, adapters: Sequence[LoRA]) -> None:
    """Errors for adapters that do not fit the hidden states and the decoder."""
    if not isinstance(adapters, list | tuple) or not all(isinstance(a, LoRA) for a in adapters):
        kinds = [type(a).__name__ for a in adapters] if isinstance(adapters, list | tuple) else type(adapters).__name__
        raise TypeError(f"lora must be a LoRA, or a list of them, got {kinds}")
    for i, adapter in enumerate(adapters):
        lora = "lora" if len(adapters) == 1 else f"lora[{i}]"
        for name in ("down", "up"):
            value = getattr(adapter, name)
            _check_whole(f"{lora}.{name}", value)
            check_tensor(f"{lora}.{name}", value)
            _check_beside(f"{lora}.{name}", value, hidden)
        rank, vocab, size = adapter.down.shape[0] if adapter.down.dim() else 0, weight.shape[0], hidden.shape[-1]
        if adapter.down.shape != (rank, size) or rank < 1:
            raise ValueError(f"{lora}.down must be (r, H) with H = {size}, got {tuple(adapter.down.shape)}")
        if adapter.up.shape != (vocab, rank):
            shape = tuple(adapter.up.shape)
            raise ValueError(f"{lora}.up must be (V, r) = ({vocab}, {rank}) beside weight and down, got {shape}")
        for name in ("scale", "dropout"):
            value = getattr(adapter, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{lora}.{name} must be a number, got {value!r}")
        if not -math.inf < adapter.scale < math.inf:
            raise ValueError(f"{lora}.scale must be finite, got {adapter.scale}")
        if not 0 <= adapter.dropout <= 1:
            raise ValueError(f"{lora}.dropout must be in [0, 1], got {adapter.dropout}")


def _check_whole(name: str, value: Tensor | None) -> None:
    """Errors for a parameter that an engine has in parts."""
    if type(value).__name__ == "DTensor":
        raise TypeError(
            f"{name} is a DTensor, of which this process has a part: call the loss inside the module that owns it, "
            "where FSDP has gathered it (attach does), or give the local part, with process_group and vocab_start, "
            "if it is spread over the vocabulary"
        )
    if isinstance(value, Tensor) and value.numel() == 0:
        raise ValueError(
            f"{name} is empty {tuple(value.shape)}: an engine that shards parameters (ZeRO-3, FSDP) has taken it. "
            "Call the loss inside the module that owns it (attach does), or gather it first"
        )


def _check_beside(name: str, value: Tensor, hidden: Tensor) -> None:
    if value.device != hidden.device:
        raise ValueError(f"{name} is on {value.device}, hidden on {hidden.device}")
    if value.dtype != hidden.dtype and not torch.is_autocast_enabled(hidden.device.type):
        raise TypeError(f"{name} is {value.dtype}, hidden is {hidden.dtype}: cast one, or use autocast")


def check_supervision(hidden, labels, row_weight, ignore_index) -> None:
    if isinstance(labels, SupervisedRows):
        check_rows(labels, hidden)
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


def check_reduction(labels, shift, reduction, normalizer) -> None:
    if not isinstance(shift, int):
        raise TypeError(f"shift must be a bool or an int, got {shift!r}")
    if shift < 0:
        raise ValueError(f"shift must be at least 0, got {shift}")
    if shift and isinstance(labels, SupervisedRows):
        raise ValueError("shift has no meaning with SupervisedRows, whose labels are those of the next tokens")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be mean, sum or none, got {reduction!r}")
    if reduction != "mean" and normalizer is not None:
        raise ValueError(f"normalizer divides the mean: it has no meaning with reduction={reduction!r}")


def check_class_weight(class_weight, weight: Tensor, label_smoothing: float, group: str) -> None:
    if class_weight is None:
        return
    if label_smoothing or group:
        other = "process_group" if group else "label_smoothing"
        raise ValueError(f"class_weight is not served together with {other}")
    check_tensor("class_weight", class_weight)
    check_constant("class_weight", class_weight)
    if class_weight.shape != weight.shape[:1]:
        raise ValueError(f"class_weight must be (V,) = ({weight.shape[0]},), got {tuple(class_weight.shape)}")
    if class_weight.device != weight.device:
        raise ValueError(f"class_weight is on {class_weight.device}, weight on {weight.device}")


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
        raise ValueError("accum_dtype must not be float16, in which a sum over thousands of rows overflows")


def check_logit_options(softcap: float | None, logit_scale: float, label_smoothing: float, z_loss: float) -> None:
    """Errors for what says how logits become a loss."""
    named = dict(softcap=softcap, logit_scale=logit_scale, label_smoothing=label_smoothing, z_loss=z_loss)
    for name, value in named.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise TypeError(f"{name} must be a number, got {value!r}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be positive and finite, got {softcap}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    if not 0 <= z_loss < math.inf:
        raise ValueError(f"z_loss must be finite and not negative, got {z_loss}")
    if not -math.inf < logit_scale < math.inf:
        raise ValueError(f"logit_scale must be finite, got {logit_scale}")


def on_device(x: Tensor, device: torch.device) -> Tensor:
    """x on the device. A copy from pageable memory would hold the host up until all that was launched has run; one from
    the caller's own pinned memory might see what is written there next."""
    if x.device.type == "cpu" and device.type == "cuda" and not torch.compiler.is_compiling():
        return (x.clone() if x.is_pinned() else x).pin_memory().to(device, non_blocking=True)
    return x.to(device)


def scalar(value: float | Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A number, or a tensor of one, as a zero-dim tensor without a gradient."""
    if isinstance(value, Tensor):
        return on_device(value.detach().reshape(()), device).to(dtype)
    if torch.compiler.is_compiling():  # a float that changes is kept out of the graph only as a factor of a tensor
        return torch.ones((), device=device, dtype=dtype) * value
    return torch.full((), value, device=device, dtype=dtype)


def normalizer_of(
    normalizer: float | Tensor | None, default: int | Tensor, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """The normalizer as a zero-dim tensor of `dtype`; 0 becomes 1, since it divides a sum over no rows."""
    value = default if normalizer is None else normalizer
    check_number("normalizer", value, least=0)
    if not isinstance(value, Tensor):
        return scalar(value or 1, device, dtype)
    value = scalar(value, device, dtype)
    return torch.where(value == 0, 1.0, value)
