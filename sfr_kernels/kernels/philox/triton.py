"""Philox in registers, and the noise made of it.

`radius` and `circle` have the same operations, in the same order, in every kernel that makes noise, so where no product
is contracted (`contract=False` in `launch`) the bits are the same too, also in the interpreter, which stands in for a
GPU where there is none. Their polynomials and the quotient are minimax fits.
"""

import triton
import triton.language as tl


@triton.jit
def words(seed, identity, block, STREAM: tl.constexpr):
    """Four uint32 words of each counter; identity is int64, block int32, of shapes that broadcast.

    `tl.philox` wants counters of one shape; here the first rounds, of what all blocks of a row share, are made once.
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
def radius(w):
    """√(−2 ln u), u = (w + ½) 2⁻³², of a uint32 word; within 1e-6, at the smallest u, and 1e-7 on average.

    u = 2^e m with m in [√½, √2). N / D = −4 ln u, whose half has the root √(N² / (2 N D)) = N · (2 N D)^(−½): a first
    guess from the bits, a quadratic and one Newton step give that inverse root, with no division and no root.
    """
    u = uniform(w)
    bits = u.to(tl.int32, bitcast=True)
    t = (bits - 0x3F3504F3) & -0x800000  # 2²³ e
    g = (bits - t).to(tl.float32, bitcast=True) - 1.0
    denominator = (g + 3.99667946) * g + 3.32525532
    # −4 ln 2 · 2⁻²³ of t
    numerator = (t.to(tl.float32) * -3.3051833e-07) * denominator + g * (
        (-0.44024708 * g - 9.3363455) * g - 13.30102624
    )
    x = numerator * denominator
    z = (0x5F1FF800 - (x.to(tl.int32, bitcast=True) >> 1)).to(tl.float32, bitcast=True)
    t = (x * z) * z  # in this order: finite at x = 0, where z is huge
    z = z * ((0.46930116 * t - 1.24577161) * t + 1.48683098)
    z = z * (1.5 - (x * z) * z)
    return numerator * z


@triton.jit
def circle(r, w):
    """r cos and r sin of the angle 2π (w + ½) 2⁻³², of a uint32 word; within 3e-7 r.

    The angle is a half turn for the highest bit of w, which is a sign of r, and for the others π/2 + π y with
    y in [−½, ½): s = −√2 sin(π y / 2) and c = √2 cos(π y / 2) give its cosine, s c, and its sine, 1 − s².
    """
    y = (w * 2 + 0x80000001).to(tl.int32, bitcast=True).to(tl.float32) * 2.3283064365386963e-10
    q = y * y
    s = y * (((0.00650772 * q - 0.11268458) * q + 0.91353029) * q - 2.22144146)
    c = ((-0.02886174 * q + 0.35864263) * q - 1.74471105) * q + 1.41421352
    r = (r.to(tl.uint32, bitcast=True) ^ (w & 0x80000000)).to(tl.float32, bitcast=True)
    return r * (s * c), r * (1.0 - s * s)


@triton.jit
def gaussian(seed, identity, block, std):
    """std · ε of the four coordinates of each block, side by side."""
    w0, w1, w2, w3 = words(seed, identity, block, 0)
    x0, x1 = circle(radius(w0) * std, w1)
    x2, x3 = circle(radius(w2) * std, w3)
    return tl.interleave(tl.interleave(x0, x2), tl.interleave(x1, x3))
