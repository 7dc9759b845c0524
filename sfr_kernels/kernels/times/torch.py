"""The flow times of a step, drawn from the seed, and their sinusoid (DESIGN section 1)."""

import torch
from torch import Tensor

from ..philox.torch import random_words, to_uniform


def stratified_times(
    noise_id: Tensor,  # (n,) int64
    seed: Tensor,  # (1,) int64
    num_times: int,  # M
) -> tuple[Tensor, Tensor]:
    """The table of jittered, stratified times (M,) float32, and each row's index into it (n,) int32."""
    device = noise_id.device
    step = torch.zeros(1, dtype=torch.int64, device=device)
    jitter = to_uniform(random_words(seed, step, 2, blocks=-(-num_times // 4))[0, :num_times])
    times = (torch.arange(num_times, device=device) + jitter) / num_times
    return times, (random_words(seed, noise_id, 1)[:, 0] * num_times >> 32).int()


def sequence_times(
    sequence_id: Tensor,  # (B,) int64
    seed: Tensor,  # (1,) int64
) -> Tensor:
    """A uniform time (B,) float32 for each sequence."""
    return to_uniform(random_words(seed, sequence_id, 3)[:, 0])


def sinusoid(times: Tensor, size: int, time_scale: float, dtype: torch.dtype) -> Tensor:
    """(M, size) in `dtype`: [sin(s t ω) ; cos(s t ω)]."""
    half, wide = size // 2, torch.promote_types(dtype, torch.float32)
    exponent = torch.arange(half, dtype=wide, device=times.device) / max(half - 1, 1)
    angle = torch.outer(times.to(wide) * time_scale, torch.pow(10000.0, -exponent))
    out = torch.zeros(times.shape[0], size, dtype=dtype, device=times.device)
    out[:, :half], out[:, half : 2 * half] = angle.sin(), angle.cos()
    return out
