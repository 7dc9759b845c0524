"""Which backend serves a call: the argument, else the environment, else the device, and what was measured on it."""

import functools
import importlib
import importlib.util
import json
import os
import pkgutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Concatenate, ParamSpec, TypeVar

import torch

ENVIRONMENT = "SFR_KERNELS_BACKEND"
BACKENDS = ("torch", "triton", "cuda", "reference")
_KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_LEAST_CAPABILITY = (8, 0)  # bf16

# Written by `python -m sfr_kernels bench choose RESULT_FILE`: a row for each compute capability, kernel and class of
# size, with the times behind it and the result file they came from. A kernel without a row is Triton's.
FASTEST = Path(__file__).with_name("fastest.json")
SMALL = 4 * 2**20  # bytes: below, a kernel takes less time than its launch
SIZES = ("small", "large")

P, R = ParamSpec("P"), TypeVar("R")
DISPATCHED: dict[str, Callable] = {}  # the kernels by name, filled as their folders are imported


@functools.cache
def _missing(backend: str) -> str | None:
    """Why this installation lacks `backend`, whatever the tensor."""
    if backend == "cuda":
        from .build import missing

        return missing()
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install 'triton>=3.6,<3.10')"
    return None


def _on_cpu(backend: str) -> bool:
    """Whether the backend's kernels run on tensors of the CPU here, for tests: interpreted, or emulated."""
    if backend == "triton":
        return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
    from .cuda import emulated

    return emulated()


def unavailable(backend: str, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> str | None:
    """Why `backend` cannot serve a tensor of `dtype` on `device`, or None if it can. No device: the best there is."""
    if reason := _missing(backend):
        return reason
    if backend not in ("triton", "cuda"):
        return None
    kind = "cuda" if device is None else torch.device(device).type
    if not (_on_cpu(backend) and (kind == "cpu" or device is None)):
        if kind != "cuda":
            return f"it needs a tensor on a GPU, not on {kind}"
        if not torch.cuda.is_available():
            return "it needs a GPU, and torch sees none"
        capability = torch.cuda.get_device_capability(device)
        if torch.version.hip is not None and backend == "cuda":
            return "it needs an NVIDIA GPU"
        if torch.version.hip is None and capability < _LEAST_CAPABILITY:
            return f"it needs compute capability 8.0, this GPU has {capability[0]}.{capability[1]}"
    if dtype is not None and dtype not in _KERNEL_DTYPES:
        return f"it serves bfloat16, float16 and float32, not {str(dtype).removeprefix('torch.')}"
    return None


def automatic(device: torch.device | str, dtype: torch.dtype | None = None) -> str:
    """The backend of the device, where neither an argument nor the environment names one.

    "fastest" is, kernel by kernel, the one that fastest.json has measured on this kind of GPU. Nothing is compiled
    with nvcc for it: the cuda backend takes part only where it was installed with its kernels.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return "torch"
    triton = unavailable("triton", device, dtype) is None
    if triton and not measured(torch.cuda.get_device_capability(device)):
        return "triton"  # without a look at the cuda backend, which would cost every call
    from .build import built

    if built() is not None and unavailable("cuda", device, dtype) is None:
        return "fastest" if triton else "cuda"
    return "triton" if triton else "torch"


def resolve_backend(backend: str | None, device: torch.device, dtype: torch.dtype | None = None) -> str:
    """The backend's name. An explicit choice is never replaced: it works or raises.

    ValueError for an unknown name, RuntimeError for a backend that is not usable here.
    """
    source = "backend"
    if backend is None:
        backend, source = os.environ.get(ENVIRONMENT) or None, ENVIRONMENT
    if backend is None:
        return automatic(device, dtype)
    if backend not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if reason := unavailable(backend, device, dtype):
        raise RuntimeError(f"{source}={backend!r} cannot serve a tensor on {device}: {reason}")
    return backend


# What torch.compiler.assume_constant_result would set, had it not to import dynamo, and Triton with it.
resolve_backend._dynamo_marked_constant = True


@functools.cache
def measured(capability: tuple[int, int]) -> tuple[dict, ...]:
    """The rows of fastest.json for GPUs of this compute capability."""
    name = "{}.{}".format(*capability)
    return tuple(row for row in json.loads(FASTEST.read_text()) if row["capability"] == name)


def size_of(argument) -> str:
    """The class of size of a kernel's call, by its first argument: a tensor, or the FlowPath of the rows to make."""
    if isinstance(argument, torch.Tensor):
        count = argument.numel() * argument.element_size()
    else:
        count = argument.noise_id.shape[0] * argument.targets.shape[1] * argument.targets.element_size()
    return "small" if count < SMALL else "large"


def _fastest(name: str, argument) -> str:
    """The backend that was measured faster for such a call; where none was, Triton."""
    return _measured_faster(torch.cuda.get_device_capability(), name, size_of(argument))


@functools.cache
def _measured_faster(capability: tuple[int, int], name: str, size: str) -> str:
    rows = measured(capability)
    return next((row["backend"] for row in rows if (row["kernel"], row["size"]) == (name, size)), "triton")


def dispatch(contract: Callable[P, R]) -> Callable[Concatenate[str, P], R]:
    """The kernel that a folder's `__init__` declares: it takes a resolved backend before the arguments of `contract`,
    and calls the function of that name in the backend's file of the folder."""
    folder, name = contract.__module__, contract.__name__

    @functools.cache
    def function(backend: str) -> Callable[P, R]:
        return getattr(importlib.import_module(f"{folder}.{backend}"), name)

    @functools.wraps(contract)
    def kernel(backend: str, *args: P.args, **kwargs: P.kwargs) -> R:
        return function(_fastest(name, args[0]) if backend == "fastest" else backend)(*args, **kwargs)

    DISPATCHED[name] = kernel
    return kernel


def kernels_of(backend: str) -> SimpleNamespace:
    """Every kernel bound to a resolved backend: `kernels_of("triton").norm_act(…)`, for tests and benchmarks."""
    for entry in pkgutil.iter_modules([str(Path(__file__).parent)], prefix=f"{__package__}."):
        if entry.ispkg:
            importlib.import_module(entry.name)
    return SimpleNamespace(**{name: functools.partial(kernel, backend) for name, kernel in DISPATCHED.items()})
