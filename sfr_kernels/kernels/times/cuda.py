"""csrc/times.cu, each kernel in a single launch."""

import torch
from torch import Tensor

from ..cuda import DTYPES, library, stream_of


def stratified_times(noise_id: Tensor, seed: Tensor, num_times: int) -> tuple[Tensor, Tensor]:
    noise_id, n = noise_id.long().contiguous(), noise_id.shape[0]
    times = torch.empty(num_times, dtype=torch.float32, device=noise_id.device)
    index = torch.empty(n, dtype=torch.int32, device=noise_id.device)
    pointers = (t.data_ptr() for t in (noise_id, seed, times, index))
    library().stratified_times(*pointers, n, num_times, stream_of(noise_id))
    return times, index


def sequence_times(sequence_id: Tensor, seed: Tensor) -> Tensor:
    sequence_id = sequence_id.long().contiguous()
    times = torch.empty(sequence_id.shape[0], dtype=torch.float32, device=sequence_id.device)
    pointers = (t.data_ptr() for t in (sequence_id, seed, times))
    library().sequence_times(*pointers, times.shape[0], stream_of(sequence_id))
    return times


def sinusoid(times: Tensor, size: int, time_scale: float, dtype: torch.dtype) -> Tensor:
    times = times.float().contiguous()
    out, copies = torch.empty(times.shape[0], size, dtype=dtype, device=times.device), 1
    library().sinusoid(
        times.data_ptr(), out.data_ptr(), DTYPES[dtype], times.shape[0], copies, size, time_scale, stream_of(times)
    )
    return out
