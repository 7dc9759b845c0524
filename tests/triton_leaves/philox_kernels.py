"""Kernels that show what Triton's generator makes."""

import triton
import triton.language as tl

from sfr_kernels.leaves.triton.elementary import log, sincos_turns
from sfr_kernels.leaves.triton.philox import words


@triton.jit
def words_kernel(out_ptr, identity_ptr, seed_ptr, STREAM: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    block = tl.arange(0, BLOCK)
    found = words(tl.load(seed_ptr), tl.load(identity_ptr + row), block, STREAM)
    for lane in tl.static_range(4):
        tl.store(out_ptr + (row * BLOCK + block) * 4 + lane, found[lane].to(tl.int64))


@triton.jit
def elementary_kernel(x_ptr, log_ptr, sin_ptr, cos_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n, other=0.5)
    sine, cosine = sincos_turns(x)
    tl.store(log_ptr + offs, log(x), mask=offs < n)
    tl.store(sin_ptr + offs, sine, mask=offs < n)
    tl.store(cos_ptr + offs, cosine, mask=offs < n)
