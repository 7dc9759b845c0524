"""Elementary functions in float32 operations alone, with no library call.

So the interpreter, which stands in for a GPU where there is none, gives the same bits as a GPU that contracts no
products (`contract=False` in `launch`), and no function keeps a stack frame for a slow path that is never taken.

Polynomials are Taylor's: their first missing term is below half a unit in the last place on the reduced range.
"""

import triton
import triton.language as tl


@triton.jit
def log(x):
    """ln x for normal, positive x: x = 2^e m with m in (0.7, 1.42), ln m = 2 artanh((m − 1) / (m + 1))."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits >> 23) - 127
    m = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    upper = m > 1.41421356
    m = tl.where(upper, m * 0.5, m)
    e = (exponent + upper.to(tl.int32)).to(tl.float32)
    f = m - 1.0
    s = tl.div_rn(f, 2.0 + f)
    w = s * s
    series = w * (2.0 / 3.0 + w * (2.0 / 5.0 + w * (2.0 / 7.0 + w * (2.0 / 9.0))))
    # ln 2 in two parts, the first with few enough bits that e times it is exact
    return e * 0.693359375 + (2.0 * s + (s * series - e * 2.12194440e-4))


@triton.jit
def sincos_turns(r):
    """sin 2πr and cos 2πr for |r| ≤ 1; the reduction to an eighth of a turn is exact."""
    quadrant = tl.floor(4.0 * r + 0.5)
    x = (r - 0.25 * quadrant) * 6.283185307179586
    w = x * x
    sine = x + x * w * (-1.0 / 6.0 + w * (1.0 / 120.0 + w * (-1.0 / 5040.0 + w * (1.0 / 362880.0))))
    cosine = 1.0 - 0.5 * w + w * w * (1.0 / 24.0 + w * (-1.0 / 720.0 + w * (1.0 / 40320.0 + w * (-1.0 / 3628800.0))))
    q = quadrant.to(tl.int32) & 3
    odd = (q & 1) != 0
    s, c = tl.where(odd, cosine, sine), tl.where(odd, sine, cosine)
    return tl.where(q >= 2, -s, s), tl.where((q == 1) | (q == 2), -c, c)


@triton.jit
def tanh(x):
    """tanh x and its derivative, to a few units in the last place also where either is small; `tl.exp2` makes a GPU's
    bits its own."""
    size = tl.abs(x)
    w = x * x
    series = 62.0 / 2835.0 + w * (-1382.0 / 155925.0 + w * (21844.0 / 6081075.0))
    series = w * (-1.0 / 3.0 + w * (2.0 / 15.0 + w * (-17.0 / 315.0 + w * series)))
    # Of a negative exponent, so that nothing overflows.
    e = tl.exp2(-2.0 * 1.4426950408889634 * size)
    far = (1.0 - e) / (1.0 + e)
    t = tl.where(size < 0.4, x + x * series, tl.where(x < 0.0, -far, far))
    return t, 4.0 * e / ((1.0 + e) * (1.0 + e))
