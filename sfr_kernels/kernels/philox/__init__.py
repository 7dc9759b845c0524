"""Philox4x32-10, the counter that noise and times are drawn from: functions for other kernels.

key = the 64-bit seed; counter = (block, identity low, identity high, stream)
streams: 0 noise, 1 time of a row, 2 the table of times, 3 time of a sequence
u = (w + ½) · 2⁻³²; lanes (0, 1) and (2, 3) of a block are Box–Muller pairs √(−2 ln u_a)·(cos, sin)(2π u_b)
"""

from torch import Tensor


def step_seed(seed: int, step: int | Tensor) -> int | Tensor:
    """A 63-bit seed from (config.seed, step), the same on every rank: the SplitMix64 finaliser.

    The step may be an int64 tensor, which a compiled function takes for a variable; so is the seed then.
    """
    x = _signed(_signed(seed * 0x9E3779B97F4A7C15) + (step + 2) * _signed(0xD1B54A32D192ED03))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = _signed((x ^ _shifted(x, shift)) * _signed(factor))
    return _shifted(x ^ _shifted(x, 31), 1)


def _signed(x: int | Tensor) -> int | Tensor:
    """The last 64 bits as a signed number, which those of a tensor are."""
    return x if isinstance(x, Tensor) else (x + 2**63) % 2**64 - 2**63


def _shifted(x: int | Tensor, count: int) -> int | Tensor:
    """The 64 bits of x, shifted right, with zeros from the left."""
    return (x >> count) & (2 ** (64 - count) - 1)
