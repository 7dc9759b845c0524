"""What the Triton launchers would launch, compiled without a GPU: they are run on CPU tensors, each launch is recorded
instead of made, and then compiled for a chip of choice."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

Launch = tuple[JITFunction, tuple, dict]  # kernel, arguments, constants and options


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """What is launched meanwhile."""
    made = []

    def getitem(kernel, grid):
        return lambda *args, **meta: made.append((kernel, args, meta))

    with patch.object(JITFunction, "__getitem__", getitem):
        yield made


def _bound(launch: Launch, backend):
    """What Triton makes of a launch: its arguments by name, their types and what it knows of them, and options."""
    kernel, args, meta = launch
    return create_function_from_signature(kernel.signature, kernel.params, backend)(*args, **meta)


def variant(launch: Launch) -> tuple[str, str]:
    """A kernel's name, and what is the same for all the launches that Triton compiles it for once."""
    _, specialization, options = _bound(launch, make_backend(GPUTarget("cuda", 90, 32)))
    return launch[0].__name__, str((specialization, sorted(options.items())))


def compiled(launch: Launch, capability: int):
    target = GPUTarget("cuda", capability, 32)
    backend, (kernel, _, meta) = make_backend(target), launch
    options, signature, constants, attributes = kernel._pack_args(backend, dict(meta), *_bound(launch, backend))
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=options.__dict__)


def in_file(cubin: bytes, read: Callable[[Path], dict]) -> dict:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return read(Path(file.name))
