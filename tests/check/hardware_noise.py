"""An experiment: flow_path with the approximate logarithm, root, sine and cosine of the GPU itself.

    x_0 = source_std · √(−2 ln u_a) · (cos, sin)(2π u_b)      u = target_scale · x_1 − x_0      x_t = x_0 + t · u

`flow_path` makes its noise of products, sums and operations on bits, so that it has the same bits in Triton, in CUDA,
in Triton's interpreter and on every chip; these functions take fewer instructions, and their bits are a chip's own.
Both write 4 bytes a number in 16 bit, 11 µs of an H100 at n = 8192, d = 1024. If those hide the arithmetic of both,
equal bits cost nothing; the package keeps them until a measurement says that they cost a flow loss more than a percent.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sfr_kernels.kernels import empty_rows
from sfr_kernels.kernels.flow import FlowPath
from sfr_kernels.kernels.philox.triton import gaussian, uniform, words
from sfr_kernels.kernels.triton import launch, row_block, warps_for


@triton.jit
def _approximately(NAME: tl.constexpr, x):
    """The instruction of that name, such as "sin.approx.ftz.f32", of float32 numbers."""
    return tl.inline_asm_elementwise(NAME + " $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _pair(w_radius, w_angle, std):
    logarithm = _approximately("lg2.approx.ftz.f32", uniform(w_radius))
    # −2 ln u = 2 ln 2 · |log₂ u|, also where the approximation is above 0, next to u = 1
    r = std * _approximately("sqrt.approx.ftz.f32", 1.3862943611198906 * tl.abs(logarithm))
    angle = w_angle.to(tl.int32, bitcast=True).to(tl.float32) * 1.4629180792671596e-09  # 2π · 2⁻³², in [−π, π]
    return r * _approximately("cos.approx.ftz.f32", angle), r * _approximately("sin.approx.ftz.f32", angle)


@triton.jit
def _hardware_noise_kernel(
    x_t_ptr, u_ptr, targets_ptr, times_ptr, noise_id_ptr, anchor_ptr, time_index_ptr, seed_ptr, target_scale,
    source_std, d, HARDWARE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of at most BLOCK columns."""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    mask = offs < d // 16 * 16  # d itself, which the compiler so sees to be a multiple of 16
    x_1 = tl.load(targets_ptr + tl.load(anchor_ptr + row).to(tl.int64) * d + offs, mask=mask, other=0.0).to(tl.float32)
    t = tl.load(times_ptr + tl.load(time_index_ptr + row)).to(tl.float32)
    seed, identity, block = tl.load(seed_ptr), tl.load(noise_id_ptr + row), tl.arange(0, BLOCK // 4)
    if HARDWARE:
        w0, w1, w2, w3 = words(seed, identity, block, 0)
        x0, x1 = _pair(w0, w1, source_std)
        x2, x3 = _pair(w2, w3, source_std)
        x_0 = tl.interleave(tl.interleave(x0, x2), tl.interleave(x1, x3))
    else:
        x_0 = gaussian(seed, identity, block, source_std)
    u = x_1 * target_scale - x_0
    tl.store(x_t_ptr + row * d + offs, (x_0 + t * u).to(x_t_ptr.dtype.element_ty), mask=mask)
    tl.store(u_ptr + row * d + offs, u.to(u_ptr.dtype.element_ty), mask=mask)


def path_without_equal_bits(path: FlowPath, dtype: torch.dtype, hardware: bool) -> tuple[Tensor, Tensor]:
    """x_t and u (n, d) as `flow_path` gives them; d is a multiple of 16 and at most 1024, targets are contiguous. Not
    hardware: the package's functions, with products and sums contracted to one rounding."""
    n, d = path.noise_id.shape[0], path.targets.shape[1]
    if d % 16 or d > 1024:
        raise ValueError(f"d must be a multiple of 16 and at most 1024, got {d}")
    x_t, u = (empty_rows(n, d, dtype, path.targets.device) for _ in range(2))
    block = row_block(d)
    vectors = path.times, path.noise_id, path.anchor, path.time_index, path.seed
    launch(_hardware_noise_kernel, (n,), x_t, u, path.targets, *vectors, path.target_scale, path.source_std, d,
           HARDWARE=hardware, BLOCK=block, num_warps=warps_for(block, each=16))  # fmt: skip
    return x_t, u
