"""Kernels that show what our generator makes in Triton, and Triton's own."""

import triton
import triton.language as tl

from sfr_kernels.kernels.elementary import sincos_turns
from sfr_kernels.kernels.philox.triton import circle, radius, words


@triton.jit
def words_kernel(out_ptr, identity_ptr, seed_ptr, STREAM: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    block = tl.arange(0, BLOCK)
    found = words(tl.load(seed_ptr), tl.load(identity_ptr + row), block, STREAM)
    for lane in tl.static_range(4):
        tl.store(out_ptr + (row * BLOCK + block) * 4 + lane, found[lane].to(tl.int64))


@triton.jit
def tritons_kernel(out_ptr, counter_ptr, seed_ptr, SIZE: tl.constexpr):
    """(4, SIZE) words of as many counters."""
    at = counter_ptr + tl.arange(0, SIZE)
    c0, c1 = tl.load(at).to(tl.uint32), tl.load(at + SIZE).to(tl.uint32)
    c2, c3 = tl.load(at + 2 * SIZE).to(tl.uint32), tl.load(at + 3 * SIZE).to(tl.uint32)
    found = tl.philox(tl.load(seed_ptr), c0, c1, c2, c3)
    for lane in tl.static_range(4):
        tl.store(out_ptr + lane * SIZE + tl.arange(0, SIZE), found[lane].to(tl.int64))


@triton.jit
def elementary_kernel(w_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """(5, n): radius, circle's cosine and sine, and those of as many turns."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    w = tl.load(w_ptr + offs, mask=offs < n, other=0).to(tl.uint32)
    cosine, sine = circle(tl.full((BLOCK,), 1.0, dtype=tl.float32), w)
    turn_sine, turn_cosine = sincos_turns(w.to(tl.float32) * 2.3283064365386963e-10)
    found = radius(w), cosine, sine, turn_cosine, turn_sine
    for k in tl.static_range(5):
        tl.store(out_ptr + k * n + offs, found[k], mask=offs < n)
