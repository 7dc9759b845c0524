"""The flow times of a step: which times there are, and which of them each row uses (DESIGN section 1, Presets)."""

import torch
from torch import Tensor

from ..config import SFRConfig
from ..leaves.torch.philox import random_words, to_uniform
from ..rows import SupervisedRows


def draw_times(
    rows: SupervisedRows,
    seed: int | Tensor,
    config: SFRConfig,
) -> tuple[Tensor, Tensor]:  # times (M,) float32, time_index (n,) int32
    """The table of times and every row's index into it, from the seed and the rows' identities alone."""
    n, device = len(rows), rows.device
    if config.is_dirac:
        return torch.zeros(1, device=device), torch.zeros(n, dtype=torch.int32, device=device)
    if config.time_sampling == "sequence":
        if rows.time_index is None:
            raise ValueError("rows were made for stratified times; build them with this config (time_sampling)")
        batch = rows.shape[0]
        first = torch.zeros(batch, dtype=torch.int64, device=device)
        first.scatter_reduce_(0, rows.time_index.long(), rows.noise_id, "amin", include_self=False)
        return to_uniform(random_words(seed, first, 3)[:, 0]), rows.time_index
    size = config.num_times
    step = torch.zeros(1, dtype=torch.int64, device=device)
    jitter = to_uniform(random_words(seed, step, 2, blocks=-(-size // 4))[0, :size])
    times = (torch.arange(size, device=device) + jitter) / size
    return times, (random_words(seed, rows.noise_id, 1)[:, 0] * size >> 32).int()


def step_seed(seed: int, step: int) -> int:
    """A 63-bit seed from (config.seed, step), the same on every rank: the SplitMix64 finaliser."""
    x = (seed * 0x9E3779B97F4A7C15 + (step + 2) * 0xD1B54A32D192ED03) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return (x ^ (x >> 31)) >> 1
