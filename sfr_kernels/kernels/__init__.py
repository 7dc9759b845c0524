"""The kernels, a folder for each computation: its `__init__` states formula and contract; `torch.py`, `triton.py` and
`cuda.py` beside it implement them. `philox` and `sums` are functions that kernels of one backend share.

To add a kernel: declare it in a folder's `__init__` with `@dispatch`; define a function of the same name and
parameters in each backend's file (it may add keyword-only parameters of its own at the end); for CUDA also write
csrc/NAME.cu, its arguments in csrc/launchers.h, and its launcher's name in `cuda.SIGNATURES`. Test it in
tests/kernels/, and compile it for every chip in tests/test_ahead_of_time.py. `backend.py` chooses the backend of a
call; `triton.py`, `elementary.py`, `cuda.py` and `build.py` are what the kernels of one backend share. Tensors may have
any strides unless a contract says otherwise.
"""

import torch
from torch import Tensor

ACCESS_BYTES = 16  # of one vector load or store; rows that start on a multiple of them are read fastest
_PADDED = 64  # elements, to a multiple of which an odd row is padded


def empty_rows(n: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(n, width) uninitialised, every row aligned to 16 bytes: contiguous where the width allows it, else padded."""
    if width * dtype.itemsize % ACCESS_BYTES == 0:
        return torch.empty(n, width, dtype=dtype, device=device)
    return torch.empty(n, -(-width // _PADDED) * _PADDED, dtype=dtype, device=device)[:, :width]


def row_blocks(x: Tensor, elements: int = 1 << 22) -> list[slice]:
    """Slices of x's rows of about so many elements, so that a float32 copy of one stays small."""
    step = max(1, elements // max(1, x[:1].numel()))
    return [slice(start, start + step) for start in range(0, x.shape[0], step)]
