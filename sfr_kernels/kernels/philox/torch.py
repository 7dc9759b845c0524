"""Philox in int64, of which the low 32 bits count, and the noise made of it."""

import math

import torch
from torch import Tensor

from .. import row_blocks

_LOW, _M0, _M1 = 0xFFFFFFFF, 0xD2511F53, 0xCD9E8D57


def random_words(
    seed: int | Tensor,  # 64 bits
    identity: Tensor,  # (n,) int64
    stream: int,
    blocks: int = 1,
) -> Tensor:  # (n, 4 · blocks) int64 in [0, 2^32), four words a block
    """The words of `blocks` consecutive counters for each identity."""
    return torch.stack(_planes(seed, identity, stream, blocks), dim=2).reshape(identity.numel(), 4 * blocks)


def _planes(seed: int | Tensor, identity: Tensor, stream: int, blocks: int) -> list[Tensor]:
    """The four words of each counter, (n, blocks) int64 each."""
    n, device = identity.numel(), identity.device
    seed = seed.to(device).reshape(()) if isinstance(seed, Tensor) else seed
    keys = [((seed + i * 0x9E3779B9) & _LOW, ((seed >> 32) + i * 0xBB67AE85) & _LOW) for i in range(10)]
    c0, c2 = torch.arange(blocks, dtype=torch.int64, device=device), ((identity >> 32) & _LOW).unsqueeze(1)
    c1, c3 = (identity & _LOW).unsqueeze(1), torch.full((), stream, dtype=torch.int64, device=device)
    # int64 products wrap modulo 2⁶⁴. Of c1 and c3 the low 32 bits count; the mask takes off what else comes along.
    for k0, k1 in keys[:3]:  # a word depends on the row or on the block alone, until the third round has mixed them
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c2 = ((p1 >> 32) ^ c1 ^ k0) & _LOW, ((p0 >> 32) ^ c3 ^ k1) & _LOW
        c1, c3 = p1, p0
    c1, c3 = c1.expand(n, blocks).contiguous(), c3.expand(n, blocks).contiguous()
    room = torch.empty_like(c0)
    for k0, k1 in keys[3:]:
        p0, p1 = c0.mul_(_M0), c2.mul_(_M1)
        c0 = torch.bitwise_right_shift(p1, 32, out=room).bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(_LOW)
        c2 = torch.bitwise_right_shift(p0, 32, out=c1).bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(_LOW)
        c1, c3, room = p1, p0, c3
    return [c0, c1.bitwise_and_(_LOW), c2, c3.bitwise_and_(_LOW)]


def to_uniform(words: Tensor) -> Tensor:
    """(w + ½) · 2⁻³² in float32."""
    return words.to(torch.float32).add_(0.5).mul_(2.0**-32)


def gaussian(seed: int | Tensor, identity: Tensor, size: int) -> Tensor:
    """(n, size) float32 standard normal noise."""
    n, blocks = identity.numel(), -(-size // 4)
    out = torch.empty(n, blocks, 2, 2, device=identity.device, dtype=torch.float32)
    for rows in row_blocks(out, elements=1 << 18):  # whose words, of 64 bits, stay in cache
        w0, w1, w2, w3 = _planes(seed, identity[rows], 0, blocks)
        radius = to_uniform(torch.stack([w0, w2], dim=2)).log_().mul_(-2.0).sqrt_()
        angle = to_uniform(torch.stack([w1, w3], dim=2)).mul_(2 * math.pi)
        torch.mul(radius, angle.cos(), out=out[rows, ..., 0])
        torch.mul(radius, angle.sin_(), out=out[rows, ..., 1])
    return out.view(n, 4 * blocks)[:, :size]
