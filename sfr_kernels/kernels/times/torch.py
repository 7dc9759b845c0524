"""In torch operations on whole tensors."""

import torch
from torch import Tensor

from ..philox.torch import random_words, to_uniform


def stratified_times(noise_id: Tensor, seed: Tensor, num_times: int) -> tuple[Tensor, Tensor]:
    device = noise_id.device
    step = torch.zeros(1, dtype=torch.int64, device=device)
    jitter = to_uniform(random_words(seed, step, 2, blocks=-(-num_times // 4))[0, :num_times])
    times = (torch.arange(num_times, dtype=torch.int64, device=device) + jitter) / num_times
    return times, (random_words(seed, noise_id, 1)[:, 0] * num_times >> 32).int()


def sequence_times(sequence_id: Tensor, seed: Tensor) -> Tensor:
    return to_uniform(random_words(seed, sequence_id, 3)[:, 0])


def sinusoid(times: Tensor, size: int, time_scale: float, dtype: torch.dtype) -> Tensor:
    half, wide = size // 2, torch.promote_types(dtype, torch.float32)
    exponent = torch.arange(half, dtype=wide, device=times.device) / max(half - 1, 1)
    angle = torch.outer(times.to(wide) * time_scale, torch.pow(10000.0, -exponent))
    out = torch.zeros(times.shape[0], size, dtype=dtype, device=times.device)
    out[:, :half], out[:, half : 2 * half] = angle.sin(), angle.cos()
    return out
