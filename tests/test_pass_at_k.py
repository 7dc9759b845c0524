"""pass@k against its definition: the share of k-subsets of the answers that hold a right one."""

import itertools
import math

import pytest

from sfr_kernels.evaluation.pass_at_k import pass_at_k


def test_it_is_the_share_of_subsets_with_a_right_answer():
    for n in range(1, 8):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations([i < c for i in range(n)], k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), rel=1e-14, abs=0)


@pytest.mark.parametrize(
    "n, c, k, wanted",
    [
        (5, 2, 1, 2 / 5),
        (5, 2, 2, 7 / 10),  # 1 − C(3, 2) / C(5, 2) = 1 − 3/10
        (10, 3, 5, 11 / 12),  # 1 − C(7, 5) / C(10, 5) = 1 − 21/252
        (4, 0, 4, 0.0),
        (4, 1, 4, 1.0),
        (1, 1, 1, 1.0),
    ],
)
def test_values_by_hand(n, c, k, wanted):
    assert pass_at_k(n, c, k) == pytest.approx(wanted, rel=1e-15, abs=0)


def test_many_answers():
    n = 10**5
    assert pass_at_k(n, 1, 1) == pytest.approx(1e-5, rel=1e-14, abs=0)  # 1 − 0.99999 would keep 11 digits
    assert pass_at_k(n, 1, n // 2) == pytest.approx(0.5, rel=1e-14)
    assert pass_at_k(n, n // 2, n // 2) == 1.0
    exact = 1 - math.comb(n - 700, 100) / math.comb(n, 100)
    assert pass_at_k(n, 700, 100) == pytest.approx(exact, rel=1e-13)


@pytest.mark.parametrize("n, c, k", [(5, 6, 1), (5, 1, 6), (5, -1, 1), (5, 1, 0), (5, 1, -1), (-1, 0, 1), (0, 0, 1)])
def test_what_cannot_be_is_an_error(n, c, k):
    with pytest.raises(ValueError, match=f"n={n}, c={c}, k={k}"):
        pass_at_k(n, c, k)
