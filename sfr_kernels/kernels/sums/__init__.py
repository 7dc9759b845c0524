"""Sums over rows in a fixed order, so that the same call gives the same bits: functions for the kernels of a backend.

column_sum: (S, P, D) float32 partial sums → (S, D)
sum_by_index: (n, D), index (n,) int32 in [0, M) → (M, D) float32, out[m] = Σ_{index = m} x
"""
