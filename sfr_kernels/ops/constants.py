"""What a loss is given: tensors of numbers, and constants, for which it has no gradient."""

import math

import torch
from torch import Tensor

from .autograd import has_tangent

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
    """ValueError for a tensor that wants a gradient, here where it would get none."""
    if isinstance(value, Tensor) and ((torch.is_grad_enabled() and value.requires_grad) or has_tangent([value])):
        raise ValueError(f"{name} must not require a gradient, which the losses do not have for it: detach it")


def check_number(name: str, value: float | Tensor, least: float = -math.inf) -> None:
    """Errors for what is no number, and no tensor of one."""
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


def moved(x: Tensor, device: torch.device) -> Tensor:
    """x on the device. A copy from pageable memory would hold the host up until all that was launched has run; one from
    the caller's own pinned memory might see what is written there next."""
    if x.device.type == "cpu" and device.type == "cuda" and not torch.compiler.is_compiling():
        return (x.clone() if x.is_pinned() else x).pin_memory().to(device, non_blocking=True)
    return x.to(device)


def scalar(value: float | Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A number, or a tensor of one, as a zero-dim tensor without a gradient."""
    if isinstance(value, Tensor):
        return moved(value.detach().reshape(()), device).to(dtype)
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
