"""Philox4x32-10 in torch, for the noise and the times of the torch leaves.

key = the 64-bit seed; counter = (block, identity low, identity high, stream)
streams: 0 noise, 1 time of a row, 2 the table of times, 3 time of a sequence
"""

import math

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF


def random_words(
    seed: int | Tensor,  # 64 bits
    identity: Tensor,  # (n,) int64
    stream: int,
    blocks: int = 1,
) -> Tensor:  # (n, 4 · blocks) int64 in [0, 2^32), four words a block
    """The words of `blocks` consecutive counters for each identity."""
    n, device = identity.numel(), identity.device
    if isinstance(seed, Tensor):
        seed = seed.to(device).reshape(())
        k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    else:
        k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    c0 = torch.arange(blocks, device=device).expand(n, blocks)
    c1 = (identity & _LOW).unsqueeze(1).expand(n, blocks)
    c2 = ((identity >> 32) & _LOW).unsqueeze(1).expand(n, blocks)
    c3 = torch.full_like(c0, stream)
    for _ in range(10):
        # int64 products wrap modulo 2^64; the mask keeps the upper word right although the shift is arithmetic.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c2 = ((p1 >> 32) & _LOW) ^ c1 ^ k0, ((p0 >> 32) & _LOW) ^ c3 ^ k1
        c1, c3 = p1 & _LOW, p0 & _LOW
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return torch.stack([c0, c1, c2, c3], dim=2).reshape(n, 4 * blocks)


def to_uniform(words: Tensor) -> Tensor:
    """(w + ½) · 2⁻³² in float32."""
    return words.to(torch.float32).add_(0.5).mul_(2.0**-32)


def gaussian(seed: int | Tensor, identity: Tensor, size: int) -> Tensor:
    """(n, size) float32 standard normal noise: lanes (0, 1) and (2, 3) of a block are Box–Muller pairs."""
    blocks = -(-size // 4)
    u = to_uniform(random_words(seed, identity, 0, blocks)).view(identity.numel(), 2 * blocks, 2)
    radius = u[..., 0].log().mul_(-2.0).sqrt_()
    angle = u[..., 1].mul(2 * math.pi)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=2).flatten(1)[:, :size]
