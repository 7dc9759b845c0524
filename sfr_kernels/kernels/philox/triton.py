"""Philox4x32-10 in registers, for the noise and the times of the Triton leaves (DESIGN section 1).

key = the 64-bit seed; counter = (block, identity low, identity high, stream)
streams: 0 noise, 1 time of a row, 2 the table of times, 3 time of a sequence
"""

import triton
import triton.language as tl

from .elementary import circle, radius


@triton.jit
def words(seed, identity, block, STREAM: tl.constexpr):
    """Four uint32 words of each counter; identity is int64, block int32, of shapes that broadcast.

    `tl.philox` wants counters of one shape; so the first rounds of what all blocks of a row share are made only once.
    """
    c0, c1, c2 = block.to(tl.uint32), identity.to(tl.uint32), (identity >> 32).to(tl.uint32)
    c3 = tl.full((), STREAM, dtype=tl.uint32)
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        p0, p1 = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0, c2 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0, (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1, c3 = p1.to(tl.uint32), p0.to(tl.uint32)
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def uniform(word):
    """(w + ½) · 2⁻³²"""
    return (word.to(tl.float32) + 0.5) * 2.3283064365386963e-10


@triton.jit
def gaussian(seed, identity, block, std):
    """std · ε of the four coordinates of each block, side by side: lanes (0, 1) and (2, 3) are Box–Muller pairs."""
    w0, w1, w2, w3 = words(seed, identity, block, 0)
    x0, x1 = circle(radius(w0) * std, w1)
    x2, x3 = circle(radius(w2) * std, w3)
    return tl.interleave(tl.interleave(x0, x2), tl.interleave(x1, x3))
