"""The randomness of a step: its seed, and the flow times drawn from it (DESIGN section 1, Presets)."""

import torch
from torch import Tensor

from ..rows import SupervisedRows
from .constants import moved


def draw_times(
    kernels,
    noise_id: Tensor,  # (n,) int64
    time_index: Tensor | None,  # (n,) int32, the sequence of each row; None: one table for all rows
    sequence_id: Tensor | None,  # (B,) int64, the identity of each sequence
    seed: Tensor,  # (1,) int64
    num_times: int,  # M, the size of the table; 0: every row at t = 0
) -> tuple[Tensor, Tensor]:  # times (M,) float32, time_index (n,) int32
    """The table of times and every row's index into it, from the seed and the rows' identities alone."""
    if num_times == 0:
        device = noise_id.device
        index = torch.zeros(noise_id.shape[0], dtype=torch.int32, device=device)
        return torch.zeros(1, dtype=torch.float32, device=device), index
    if time_index is None:
        return kernels.stratified_times(noise_id, seed, num_times)
    return kernels.sequence_times(sequence_id, seed), time_index


def sequence_ids(rows: SupervisedRows) -> Tensor:
    """(B,) int64: the first identity among the rows of each sequence."""
    first = torch.zeros(rows.shape[0], dtype=torch.int64, device=rows.device)
    return first.scatter_reduce_(0, rows.time_index.long(), rows.noise_id, "amin", include_self=False)


def seed_tensor(seed: int | Tensor, device: torch.device) -> Tensor:
    """The seed as one int64 on the device: the same 64 bits, whether they came signed or not.

    A traced seed is taken as it is, below 2⁶³: inductor has no numbers beyond 64 bits to wrap it with.
    """
    if isinstance(seed, Tensor):
        return moved(seed.reshape(1), device)
    if not torch.compiler.is_compiling():
        seed = (seed + 2**63) % 2**64 - 2**63
    return torch.full((1,), seed, dtype=torch.int64, device=device)


def step_seed(seed: int, step: int | Tensor) -> int | Tensor:
    """A 63-bit seed from (config.seed, step), the same on every rank: the SplitMix64 finaliser.

    The step may be an int64 tensor, which a compiled function takes for a variable; so is the seed then.
    """
    x = _signed(_signed(seed * 0x9E3779B97F4A7C15) + (step + 2) * _signed(0xD1B54A32D192ED03))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = _signed((x ^ _shifted(x, shift)) * _signed(factor))
    return _shifted(x ^ _shifted(x, 31), 1)


def _signed(x: int | Tensor) -> int | Tensor:
    """The last 64 bits as a signed number, which those of a tensor are."""
    return x if isinstance(x, Tensor) else (x + 2**63) % 2**64 - 2**63


def _shifted(x: int | Tensor, count: int) -> int | Tensor:
    """The 64 bits of x, shifted right, with zeros from the left."""
    return (x >> count) & (2 ** (64 - count) - 1)
