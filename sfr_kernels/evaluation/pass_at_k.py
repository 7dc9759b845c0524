"""pass@k: how likely at least one of k answers to a problem is right."""

import math


def pass_at_k(n: int, c: int, k: int) -> float:
    """The unbiased estimate 1 − C(n−c, k) / C(n, k) from n answers of which c are right (Chen et al. 2021,
    arXiv 2107.03374, eq. 1). ValueError unless 0 <= c <= n and 1 <= k <= n."""
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@k needs 0 <= c <= n right answers and 1 <= k <= n, not n={n}, c={c}, k={k}")
    if n - c < k:
        return 1.0
    # The quotient is the product of 1 − c/(n−i) over i < k, and of 1 − k/(n−i) over i < c: the shorter is taken. The
    # sum of logarithms keeps the digits of a result near 0, which 1 − product would lose.
    few, many = sorted((c, k))
    return -math.expm1(math.fsum(math.log1p(-many / (n - i)) for i in range(few)))
