"""Each a single launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..elementary import sincos_turns
from ..philox.triton import uniform, words
from ..triton import kernel, launch, row_block


@kernel
def _stratified_kernel(noise_id_ptr, seed_ptr, times_ptr, index_ptr, n, M, BLOCK: tl.constexpr):
    """time_index of a block of rows, and the times of a block of the table."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    seed = tl.load(seed_ptr)
    identity = tl.load(noise_id_ptr + offs, mask=offs < n, other=0)
    word, _, _, _ = words(seed, identity, offs * 0, 1)
    index = (word.to(tl.uint64) * M) >> 32
    tl.store(index_ptr + offs, index.to(tl.int32), mask=offs < n)

    w0, w1, w2, w3 = words(seed, offs.to(tl.int64) * 0, offs // 4, 2)
    lane = offs % 4
    word = tl.where(lane == 0, w0, tl.where(lane == 1, w1, tl.where(lane == 2, w2, w3)))
    times = tl.div_rn(offs.to(tl.float32) + uniform(word), (offs * 0 + M).to(tl.float32))
    tl.store(times_ptr + offs, times, mask=offs < M)


def stratified_times(noise_id: Tensor, seed: Tensor, num_times: int) -> tuple[Tensor, Tensor]:
    n, device = noise_id.shape[0], noise_id.device
    times = torch.empty(num_times, dtype=torch.float32, device=device)
    index = torch.empty(n, dtype=torch.int32, device=device)
    launch(
        _stratified_kernel, (triton.cdiv(max(n, num_times), 128),), noise_id.contiguous(), seed, times, index,
        n, num_times, BLOCK=128, num_warps=4, contract=False,
    )  # fmt: skip
    return times, index


@kernel
def _uniform_kernel(identity_ptr, seed_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    identity = tl.load(identity_ptr + offs, mask=offs < n, other=0)
    word, _, _, _ = words(tl.load(seed_ptr), identity, offs * 0, 3)
    tl.store(out_ptr + offs, uniform(word), mask=offs < n)


def sequence_times(sequence_id: Tensor, seed: Tensor) -> Tensor:
    batch, identity = sequence_id.shape[0], sequence_id.contiguous()
    times = torch.empty(batch, dtype=torch.float32, device=sequence_id.device)
    launch(_uniform_kernel, (triton.cdiv(batch, 128),), identity, seed, times, batch, BLOCK=128, num_warps=4)
    return times


@kernel
def _sinusoid_kernel(times_ptr, out_ptr, d, time_scale, BLOCK: tl.constexpr):
    """Angles reach time_scale radians: in float64 they keep their fraction of a turn. There are few of them."""
    m = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    half = d // 2
    i = tl.where(offs < half, offs, offs - half).to(tl.float64)
    rate = 9.210340371976184 / tl.maximum(half - 1, 1).to(tl.float64)  # ln 10000 / (d / 2 − 1)
    turns = tl.load(times_ptr + m).to(tl.float64) * time_scale * tl.exp(-rate * i) * 0.15915494309189535
    sine, cosine = sincos_turns((turns - tl.floor(turns)).to(tl.float32))
    value = tl.where(offs < half, sine, tl.where(offs < 2 * half, cosine, 0.0))
    tl.store(out_ptr + m * d + offs, value.to(out_ptr.dtype.element_ty), mask=offs < d)


def sinusoid(times: Tensor, size: int, time_scale: float, dtype: torch.dtype) -> Tensor:
    out = torch.empty(times.shape[0], size, dtype=dtype, device=times.device)
    block = row_block(size, most=512)
    launch(
        _sinusoid_kernel, (times.shape[0], triton.cdiv(size, block)), times.contiguous(), out, size, time_scale,
        BLOCK=block, num_warps=4,
    )  # fmt: skip
    return out
