"""Room for rows that kernels and products read 16 bytes at a time, whatever their width."""

import torch
from torch import Tensor

ACCESS_BYTES = 16  # what a kernel, or a product, reads at once where every row starts on a multiple of them
_PADDED = 64  # elements, to a multiple of which an odd row is padded


def empty_rows(n: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Room for (n, width), each row on 16 bytes: contiguous where the width allows it, else with room between them."""
    if width * dtype.itemsize % ACCESS_BYTES == 0:
        return torch.empty(n, width, dtype=dtype, device=device)
    return torch.empty(n, -(-width // _PADDED) * _PADDED, dtype=dtype, device=device)[:, :width]
