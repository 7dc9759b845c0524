"""The flow times of a step, drawn from the seed, and their sinusoid: csrc/times.cu."""

import torch
from torch import Tensor

from ..cuda import DTYPES, library, stream_of


def stratified_times(
    noise_id: Tensor,  # (n,) int64
    seed: Tensor,  # (1,) int64
    num_times: int,  # M
) -> tuple[Tensor, Tensor]:
    """The table of jittered, stratified times (M,) float32, and each row's index into it (n,) int32."""
    noise_id, device = noise_id.long().contiguous(), noise_id.device
    n = noise_id.shape[0]
    times = torch.empty(num_times, dtype=torch.float32, device=device)
    index = torch.empty(n, dtype=torch.int32, device=device)
    pointers = (t.data_ptr() for t in (noise_id, seed, times, index))
    library().stratified_times(*pointers, n, num_times, stream_of(noise_id))
    return times, index


def sequence_times(
    sequence_id: Tensor,  # (B,) int64
    seed: Tensor,  # (1,) int64
) -> Tensor:
    """A uniform time (B,) float32 for each sequence."""
    sequence_id = sequence_id.long().contiguous()
    times = torch.empty(sequence_id.shape[0], dtype=torch.float32, device=sequence_id.device)
    pointers = (t.data_ptr() for t in (sequence_id, seed, times))
    library().sequence_times(*pointers, times.shape[0], stream_of(sequence_id))
    return times


def sinusoid(times: Tensor, size: int, time_scale: float, dtype: torch.dtype) -> Tensor:
    """(M, size) in `dtype`: [sin(s t ω) ; cos(s t ω)], DESIGN section 1."""
    times = times.float().contiguous()
    out = torch.empty(times.shape[0], size, dtype=dtype, device=times.device)
    library().sinusoid(
        times.data_ptr(), out.data_ptr(), DTYPES[dtype], times.shape[0], 1, size, time_scale, stream_of(times)
    )
    return out
