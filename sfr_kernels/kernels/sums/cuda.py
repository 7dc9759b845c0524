"""csrc/sums.cu."""

import torch
from torch import Tensor

from ..cuda import DTYPES, library, stream_of, structure, threads_for

SumByIndexArguments = structure(
    "SumByIndexArguments",
    pointers="x index order bounds pieces out",
    int64="x_row x_col",
    int32="n width size num_blocks rows threads",
)
# Row blocks of a sum over rows, at most, and threads in all of them: four blocks of 128 for each of an H100's 132
# multiprocessors, as many as it holds of them, and few enough that the partial sums are small beside the rows.
MAX_BLOCKS, THREADS = 2048, 512 * 128

# As in csrc/sums.cu: the index that it sorts by has at most so many values, and a block looks at so many rows.
MOST_GROUPS, CHUNK = 1024, 256


def blocks_for(n: int, threads: int = 32) -> tuple[int, int]:
    """Row blocks of so many threads, and rows in each, for n rows."""
    rows = max(1, -(-n // min(MAX_BLOCKS, THREADS // threads)))
    return -(-n // rows), rows


def partial_sums(sums: int, num_blocks: int, width: int, device: torch.device) -> Tensor:
    """Uninitialised (S, P, D) float32, each row on 16 bytes."""
    return torch.empty(sums, num_blocks, -(-width // 4) * 4, dtype=torch.float32, device=device)[..., :width]


def column_sum(partial: Tensor) -> Tensor:  # (S, P, D) float32, its rows as far apart as in `partial_sums`
    """(S, D) float32."""
    sums, num_blocks, width = partial.shape
    out = torch.empty(sums, width, dtype=torch.float32, device=partial.device)
    library().column_sum(
        partial.data_ptr(), DTYPES[partial.dtype], partial.stride(1), out.data_ptr(), sums, num_blocks, width,
        stream_of(partial),
    )  # fmt: skip
    return out


def rank_and_counts(n: int, size: int) -> int:
    """How many int32 `sfr_group` works in: a rank of each row, and of each chunk of rows a count of each value."""
    return n + size * max(1, -(-n // CHUNK))


def _group(index: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The rows by index, (n,), and where those of each begin, (size + 1,), both int32."""
    n = index.shape[0]
    if size > MOST_GROUPS:
        ordered, order = index.sort(stable=True)
        bounds = torch.searchsorted(ordered, torch.arange(size + 1, dtype=torch.int32, device=index.device))
        return order.int(), bounds.int()
    lengths = [n, size + 1, rank_and_counts(n, size)]
    order, bounds, room = torch.empty(sum(lengths), dtype=torch.int32, device=index.device).split(lengths)
    library().group(index.data_ptr(), order.data_ptr(), bounds.data_ptr(), room.data_ptr(), n, size, stream_of(index))
    return order, bounds


def sum_by_index(x: Tensor, index: Tensor, size: int) -> Tensor:
    (n, width), index = x.shape, index.int().contiguous()
    order, bounds = _group(index, size)
    threads = threads_for(width, x.dtype, 256)
    num_blocks, rows = blocks_for(n, threads)
    out = torch.empty(size, width, dtype=torch.float32, device=x.device)
    pieces = torch.empty(2 * num_blocks, width, dtype=torch.float32, device=x.device)
    arguments = SumByIndexArguments(
        x=x.data_ptr(), x_row=x.stride(0), x_col=x.stride(1), index=index.data_ptr(), order=order.data_ptr(),
        bounds=bounds.data_ptr(), pieces=pieces.data_ptr(), out=out.data_ptr(),
        n=n, width=width, size=size, num_blocks=num_blocks, rows=rows, threads=threads,
    )  # fmt: skip
    library().sum_by_index(arguments, DTYPES[x.dtype], stream_of(x))
    return out
