"""Which backend serves a call: the argument, else the environment, else the device, and what was measured on it."""

import functools
import importlib.util
import os
from types import ModuleType

import torch

from ..leaves import fastest

ENVIRONMENT = "SFR_KERNELS_BACKEND"
BACKENDS = ("torch", "triton", "cuda", "reference")
_KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_LEAST_CAPABILITY = (8, 0)  # bf16


@functools.cache
def _missing(backend: str) -> str | None:
    """Why this installation lacks `backend`, whatever the tensor."""
    if backend == "cuda":
        from ..leaves.cuda.build import missing

        return missing()
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install 'triton>=3.6,<3.10')"
    return None


def _interpreted() -> bool:
    """True where Triton runs its kernels in Python, on tensors of the CPU."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def _on_cpu(backend: str) -> bool:
    """Whether the backend's kernels run on tensors of the CPU here, for tests: interpreted, or emulated."""
    if backend == "triton":
        return _interpreted()
    from ..leaves.cuda.library import emulated

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

    "fastest" is, leaf by leaf, the one that leaves/fastest.json has measured on this kind of GPU. Nothing is compiled
    for it with nvcc: the cuda backend takes part where it was installed with its kernels.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return "torch"
    triton = unavailable("triton", device, dtype) is None
    if triton and not fastest.rows(torch.cuda.get_device_capability(device)):
        return "triton"  # whatever else there is: looking for it would cost every call
    if _is_built() and unavailable("cuda", device, dtype) is None:
        return "fastest" if triton else "cuda"
    return "triton" if triton else "torch"


def _is_built() -> bool:
    from ..leaves.cuda.build import built

    return built() is not None


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
def _fastest(capability: tuple[int, int]) -> fastest.Fastest:
    from ..leaves import cuda, triton

    return fastest.Fastest(fastest.rows(capability), {"triton": triton, "cuda": cuda}, otherwise="triton")


def leaves(backend: str) -> ModuleType | fastest.Fastest:
    """The leaf kernels of a resolved backend, on the current device."""
    if backend == "torch":
        from ..leaves import torch as module
    elif backend == "triton":
        from ..leaves import triton as module
    elif backend == "cuda":
        from ..leaves import cuda as module
    elif backend == "fastest":
        return _fastest(torch.cuda.get_device_capability())
    else:
        raise AssertionError(f"backend {backend} has no leaves")
    return module
