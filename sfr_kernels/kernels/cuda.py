"""The compiled kernels of csrc/, called through ctypes: pointers, sizes and the stream in, an error code out."""

import ctypes
import os
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from .build import LIBRARY_VARIABLE, find

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # as DType in csrc/types.cuh

# The parameters of each launcher, in order: p pointer, i int, l int64, d double, s the address of a `structure`. The
# last is the stream.
SIGNATURES = {
    "sfr_column_sum": "pilpilip",
    "sfr_group": "ppppiip",
    "sfr_philox": "pppliip",
    "sfr_scale": "pippilip",
    "sfr_split": "pppilip",
    "sfr_stratified_times": "pppplip",
    "sfr_sequence_times": "ppplp",
    "sfr_sinusoid": "ppiiiidp",
}
SIGNATURES |= dict.fromkeys(
    ["sfr_flow_loss", "sfr_flow_mse", "sfr_flow_path", "sfr_norm_act", "sfr_norm_act_backward", "sfr_scatter_rows",
     "sfr_softmax_gradient", "sfr_softmax_partials", "sfr_softmax_xent", "sfr_sum_by_index"],
    "sip",
)  # fmt: skip
_KINDS = {"p": ctypes.c_void_p, "i": ctypes.c_int, "l": ctypes.c_int64, "d": ctypes.c_double}
_KINDS["s"] = SimpleNamespace(from_param=ctypes.byref)  # takes a structure, and passes its address
_NO_IMAGE = 209  # cudaErrorNoKernelImageForDevice


def structure(name: str, *, pointers: str, int64: str = "", int32: str = "", float32: str = "") -> type:
    """The structure `name` of csrc/launchers.h, whose fields are filled by name; one that is not named is null or 0."""
    kinds = {ctypes.c_void_p: pointers, ctypes.c_int64: int64, ctypes.c_int: int32, ctypes.c_float: float32}
    fields = [(field, kind) for kind, names in kinds.items() for field in names.split()]
    # without slots, a name that is no field would be taken for an attribute
    return type(name, (ctypes.Structure,), {"__slots__": (), "_fields_": fields})


class Library:
    """A shared library of launchers, `library.flow_path(…)` for sfr_flow_path."""

    def __init__(self, path: Path):
        """RuntimeError if it cannot be loaded, or is something else."""
        try:
            handle = ctypes.CDLL(str(path))
        except OSError as error:
            raise RuntimeError(f"the CUDA kernels at {path} cannot be loaded ({error}): remove the file") from error
        if not hasattr(handle, "sfr_error"):
            raise RuntimeError(f"{path} is not a library of these CUDA kernels")
        self.path, self._error, self.emulated = path, handle.sfr_error, hasattr(handle, "sfr_emulated_gemm")
        self._error.argtypes, self._error.restype = [ctypes.c_int], ctypes.c_char_p
        self.cluster_code = handle.sfr_cluster_code
        if self.emulated:
            self.emulated_gemm = ctypes.cast(handle.sfr_emulated_gemm, ctypes.c_void_p).value
        for name, codes in SIGNATURES.items():
            if not hasattr(handle, name):
                raise RuntimeError(f"the CUDA kernels at {path} were compiled from other sources: it lacks {name}")
            function = getattr(handle, name)
            function.argtypes, function.restype = [_KINDS[c] for c in codes], ctypes.c_int
            setattr(self, name.removeprefix("sfr_"), self._checked(name, function))

    def _checked(self, name: str, function):
        def launch(*arguments) -> None:
            if error := function(*arguments):
                words = f"{name}: {self._error(error).decode()} (CUDA error {error})"
                if error == _NO_IMAGE:
                    words += f": {self.path} has no code for this GPU, name its architecture in TORCH_CUDA_ARCH_LIST"
                raise RuntimeError(words)

        return launch


def emulated() -> bool:
    """Whether the library that was asked for runs its kernels on the CPU, as those of the tests do."""
    return bool(os.environ.get(LIBRARY_VARIABLE)) and library().emulated


_library: Library | None = None


def library() -> Library:
    """The library of this installation, found or built at the first call."""
    global _library
    if _library is None:
        _library = Library(find())
    return _library


def stream_of(x: Tensor) -> int | None:
    """The stream on which torch works on the device of `x` now."""
    return torch._C._cuda_getCurrentRawStream(x.get_device()) if x.is_cuda else None


def address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def threads_for(width: int, dtype: torch.dtype, most: int) -> int:
    """Threads for a row of so many columns, 16 bytes each: whole warps, at most `most`."""
    vectors = -(-width * dtype.itemsize // 16)
    return min(most, -(-vectors // 32) * 32)
