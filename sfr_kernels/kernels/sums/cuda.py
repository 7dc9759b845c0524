"""Sums of rows in a fixed order: csrc/sums.cu."""

import torch
from torch import Tensor

from ..cuda import DTYPES, library, stream_of, threads_for

# Row blocks of a sum over rows, at most, and threads in all of them: four blocks of 128 for each of an H100's 132
# multiprocessors, as many as it holds of them, and few enough that the partial sums are small beside the rows.
MAX_PARTS, THREADS = 2048, 512 * 128

# As in csrc/sums.cu: the index that it sorts by has at most so many values, and a block looks at so many rows.
MOST_GROUPS, CHUNK = 1024, 256


def parts_for(n: int, threads: int = 32) -> tuple[int, int]:
    """Row blocks of so many threads, and rows in each, for n rows."""
    rows = max(1, -(-n // min(MAX_PARTS, THREADS // threads)))
    return -(-n // rows), rows


def partial_sums(sums: int, parts: int, width: int, device: torch.device) -> Tensor:
    """Room for (S, P, D) float32, each row on 16 bytes."""
    return torch.empty(sums, parts, -(-width // 4) * 4, dtype=torch.float32, device=device)[..., :width]


def column_sum(partial: Tensor) -> Tensor:  # (S, P, D) float32, its rows as far apart as in `partial_sums`
    """(S, D) float32."""
    sums, parts, width = partial.shape
    out = torch.empty(sums, width, dtype=torch.float32, device=partial.device)
    library().column_sum(
        partial.data_ptr(), DTYPES[partial.dtype], partial.stride(1), out.data_ptr(), sums, parts, width,
        stream_of(partial),
    )  # fmt: skip
    return out


def room_to_group(n: int, size: int) -> int:
    """Numbers of 32 bit that `sfr_group` works in."""
    return n + size * max(1, -(-n // CHUNK))


def _group(index: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The rows by index, (n,), and where those of each begin, (size + 1,), both int32."""
    n = index.shape[0]
    if size > MOST_GROUPS:
        ordered, order = index.sort(stable=True)
        bounds = torch.searchsorted(ordered, torch.arange(size + 1, dtype=torch.int32, device=index.device))
        return order.int(), bounds.int()
    room = torch.empty(n + size + 1 + room_to_group(n, size), dtype=torch.int32, device=index.device)
    order, bounds, rest = room.split([n, size + 1, room_to_group(n, size)])
    library().group(index.data_ptr(), order.data_ptr(), bounds.data_ptr(), rest.data_ptr(), n, size, stream_of(index))
    return order, bounds


def sum_by_index(
    x: Tensor,  # (n, D)
    index: Tensor,  # (n,) int32, in [0, M)
    size: int,  # M
) -> Tensor:
    """(M, D) float32: out[m] = Σ_{index = m} x."""
    (n, width), index = x.shape, index.int().contiguous()
    order, bounds = _group(index, size)
    threads = threads_for(width, x.dtype, 256)
    parts, rows = parts_for(n, threads)
    out = torch.empty(size, width, dtype=torch.float32, device=x.device)
    pieces = torch.empty(2 * parts, width, dtype=torch.float32, device=x.device)
    library().sum_by_index(
        x.data_ptr(),
        DTYPES[x.dtype],
        *x.stride(),
        index.data_ptr(),
        order.data_ptr(),
        bounds.data_ptr(),
        pieces.data_ptr(),
        out.data_ptr(),
        n,
        width,
        size,
        parts,
        rows,
        threads,
        stream_of(x),
    )
    return out
