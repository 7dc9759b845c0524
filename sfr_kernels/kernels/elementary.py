"""Elementary functions of Triton's kernels, in float32 operations that a GPU has, with no library call."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def exp(x):
    """`tl.exp` without its care of subnormal results: e^x below 2⁻¹²⁶ may be 0."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(−x)) as the square of a reciprocal square root, which a GPU has in one instruction: a division, and
    an exponential that keeps subnormal numbers, take three or four each."""
    root = tl.rsqrt(1.0 + tl.exp2(x * -LOG2_E))
    return root * root


@triton.jit
def tanh(x):
    """tanh x and its derivative, to a few units in the last place also where either is small; not the same bits in the
    interpreter, because of `tl.exp2`."""
    size = tl.abs(x)
    w = x * x
    series = 62.0 / 2835.0 + w * (-1382.0 / 155925.0 + w * (21844.0 / 6081075.0))
    series = w * (-1.0 / 3.0 + w * (2.0 / 15.0 + w * (-17.0 / 315.0 + w * series)))
    # Of a negative exponent, so that nothing overflows.
    e = tl.exp2(size * (-2.0 * LOG2_E))
    far = (1.0 - e) / (1.0 + e)
    t = tl.where(size < 0.4, x + x * series, tl.where(x < 0.0, -far, far))
    return t, 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def sincos_turns(r):
    """sin 2πr and cos 2πr for |r| ≤ 1, within two units of the last place: three times as exact as philox's `circle`,
    and slower, for the few times of a step. The reduction to an eighth of a turn is exact, the polynomials are
    Taylor's."""
    quadrant = tl.floor(4.0 * r + 0.5)
    x = (r - 0.25 * quadrant) * 6.283185307179586
    w = x * x
    sine = x + x * w * (-1.0 / 6.0 + w * (1.0 / 120.0 + w * (-1.0 / 5040.0 + w * (1.0 / 362880.0))))
    cosine = 1.0 - 0.5 * w + w * w * (1.0 / 24.0 + w * (-1.0 / 720.0 + w * (1.0 / 40320.0 + w * (-1.0 / 3628800.0))))
    q = quadrant.to(tl.int32) & 3
    odd = (q & 1) != 0
    s, c = tl.where(odd, cosine, sine), tl.where(odd, sine, cosine)
    return tl.where(q >= 2, -s, s), tl.where((q == 1) | (q == 2), -c, c)
