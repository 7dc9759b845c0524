"""What the Triton launchers would launch, compiled without a GPU: they are run on CPU tensors, each launch is recorded
instead of made, and then compiled for a chip of choice."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TYPES = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int64: "*i64", torch.int32: "*i32",
}  # fmt: skip


def configuration(kernel, args, meta):
    """What Triton would compile for a launch: (signature, constants, divisible arguments, options)."""
    given = dict(zip(kernel.arg_names, args, strict=False))
    options = {name: value for name, value in meta.items() if name not in kernel.arg_names}
    given |= {name: value for name, value in meta.items() if name in kernel.arg_names}
    signature, constants, divisible = {}, {}, []
    for parameter in kernel.params:
        name, value = parameter.name, given[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
            if value.data_ptr() % 16 == 0:
                divisible.append(parameter.num)
        elif isinstance(value, int):
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0:
                divisible.append(parameter.num)
        else:
            signature[name] = "fp32"
    return tuple(signature.items()), tuple(constants.items()), tuple(divisible), tuple(options.items())


@contextmanager
def recorded() -> Iterator[dict]:
    """{(name, configuration): kernel} of what is launched meanwhile."""
    found = {}

    def getitem(kernel, grid):
        return lambda *args, **meta: found.setdefault((kernel.__name__, configuration(kernel, args, meta)), kernel)

    with patch.object(JITFunction, "__getitem__", getitem):
        yield found


def compiled(kernel, configuration, capability: int):
    signature, constants, divisible, options = configuration
    source = ASTSource(kernel, dict(signature), dict(constants), {(i,): [["tt.divisibility", 16]] for i in divisible})
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(options))


def in_file(cubin: bytes, read: Callable[[Path], dict]) -> dict:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return read(Path(file.name))
