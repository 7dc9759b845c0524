"""The `info` command: versions, the device, which backends are usable, and which one `auto` picks."""

import importlib.metadata
import os
import platform

import torch

from .._version import __version__
from ..kernels.backend import BACKENDS, ENVIRONMENT, automatic, measured, resolve_backend, unavailable


def run(args) -> int:
    print(f"sfr_kernels {__version__}, Python {platform.python_version()}, torch {torch.__version__}, ", end="")
    print(f"triton {_triton_version()}, CUDA {torch.version.cuda or 'none'}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        print(f"device: {properties.name}, compute capability {properties.major}.{properties.minor}, {memory}")
    else:
        print(f"device: CPU ({platform.machine()}, {torch.get_num_threads()} threads); torch sees no GPU")
    print("backends:")
    for backend in BACKENDS:
        state = "usable" if (reason := unavailable(backend)) is None else f"not usable: {reason}"
        if backend == "cuda" and reason is None:
            from ..kernels.build import built, nvcc  # which needs fcntl, a module of POSIX systems

            state += f", {built()}" if built() else f", once it has been compiled at the first call, with {nvcc()}"
        print(f"  {backend:10} {state}")
    print(f"auto picks: {automatic(device)}")
    if device.type == "cuda":
        rows = measured(torch.cuda.get_device_capability(device))
        for row in rows:
            times = ", ".join(f"{name} {ms:.4f} ms" for name, ms in row["ms"].items())
            print(f"  {row['kernel']}, {row['size']}: {row['backend']} ({times}; {row['origin']})")
        if not rows:
            print("  no kernel has been measured on this kind of GPU (`bench`, then `bench choose`)")
    if chosen := os.environ.get(ENVIRONMENT):
        try:
            resolve_backend(None, device)
            print(f"{ENVIRONMENT}={chosen} overrides it")
        except (ValueError, RuntimeError) as error:
            print(f"{ENVIRONMENT} is wrong: {error}")
            return 1
    return 0


def _triton_version() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
