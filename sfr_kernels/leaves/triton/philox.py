"""Philox4x32-10 in registers, for the noise and the times of the Triton leaves (DESIGN section 1).

key = the 64-bit seed; counter = (block, identity low, identity high, stream)
streams: 0 noise, 1 time of a row, 2 the table of times, 3 time of a sequence
"""

import triton
import triton.language as tl

from .elementary import log, sincos_turns


@triton.jit
def words(seed, identity, block, STREAM: tl.constexpr):
    """Four uint32 words of each counter; identity is int64, block int32, of shapes that broadcast."""
    low = identity.to(tl.uint32)
    high = (identity >> 32).to(tl.uint32)
    zero = (block * 0).to(tl.uint32) + low * 0
    return tl.philox(seed, block.to(tl.uint32) + zero, low + zero, high + zero, zero + STREAM)


@triton.jit
def uniform(word):
    """(w + ½) · 2⁻³²"""
    return (word.to(tl.float32) + 0.5) * 2.3283064365386963e-10


@triton.jit
def gaussian(seed, identity, block):
    """ε of the four coordinates of each block, side by side: lanes (0, 1) and (2, 3) are Box–Muller pairs."""
    w0, w1, w2, w3 = words(seed, identity, block, 0)
    radius_a, radius_b = tl.sqrt_rn(-2.0 * log(uniform(w0))), tl.sqrt_rn(-2.0 * log(uniform(w2)))
    sin_a, cos_a = sincos_turns(uniform(w1))
    sin_b, cos_b = sincos_turns(uniform(w3))
    even = tl.interleave(radius_a * cos_a, radius_b * cos_b)  # lanes 0 and 2
    odd = tl.interleave(radius_a * sin_a, radius_b * sin_b)  # lanes 1 and 3
    return tl.interleave(even, odd)
