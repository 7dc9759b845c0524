"""The flow times of a step, drawn from the seed (streams 1 to 3 of the counter, see `philox`), and their sinusoid:

times[m] = (m + U_m) / M      time_index[r] = ⌊M · U_r⌋      of a sequence: U_s
[sin(s t ω) ; cos(s t ω)], ω_i = 10000^(−i / (d/2 − 1)), i < d/2; an odd d ends with a zero
"""

import torch
from torch import Tensor

from ..backend import dispatch


@dispatch
def stratified_times(
    noise_id: Tensor,  # (n,) int64
    seed: Tensor,  # (1,) int64
    num_times: int,  # M
) -> tuple[Tensor, Tensor]:
    """The table of jittered, stratified times (M,) float32, and each row's index into it (n,) int32."""


@dispatch
def sequence_times(
    sequence_id: Tensor,  # (B,) int64
    seed: Tensor,  # (1,) int64
) -> Tensor:
    """A uniform time (B,) float32 for each sequence."""


@dispatch
def sinusoid(times: Tensor, size: int, time_scale: float, dtype: torch.dtype) -> Tensor:
    """(M, size) in `dtype`: [sin(s t ω) ; cos(s t ω)]."""
