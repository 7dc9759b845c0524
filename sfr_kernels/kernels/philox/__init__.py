"""Philox4x32-10, the counter that noise and times are drawn from: functions for other kernels.

key = the 64-bit seed; counter = (block, identity low, identity high, stream)
streams: 0 noise, 1 time of a row, 2 the table of times, 3 time of a sequence
u = (w + ½) · 2⁻³²; lanes (0, 1) and (2, 3) of a block are Box–Muller pairs √(−2 ln u_a)·(cos, sin)(2π u_b)
"""
