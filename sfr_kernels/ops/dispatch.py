"""Which backend serves a call: the argument, else the environment, else the device."""

import os
from types import ModuleType

import torch

ENVIRONMENT = "SFR_KERNELS_BACKEND"
BACKENDS = ("torch", "triton", "cuda", "reference")
_MISSING = {
    "triton": "this version has no Triton leaves yet",
    "cuda": "this version has no CUDA extension yet",
}


def unavailable(backend: str) -> str | None:
    """Why `backend` cannot be used, or None if it can."""
    return _MISSING.get(backend)


def resolve_backend(backend: str | None, device: torch.device) -> str:
    """The backend's name. An explicit choice is never replaced: it works or raises.

    ValueError for an unknown name, RuntimeError for a backend that is not usable here.
    """
    source = "backend"
    if backend is None:
        backend, source = os.environ.get(ENVIRONMENT) or None, ENVIRONMENT
    if backend is None:
        return "torch"
    if backend not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if reason := unavailable(backend):
        raise RuntimeError(f"{source}={backend!r} cannot serve a tensor on {device}: {reason}")
    return backend


def leaves(backend: str) -> ModuleType:
    """The leaf kernels of a resolved backend."""
    if backend == "torch":
        from ..leaves import torch as module

        return module
    raise AssertionError(f"backend {backend} has no leaves")
