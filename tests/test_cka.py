"""1 − CKA: the estimator by other people's definitions, its bounds, its normalizer, and batches too small for it."""

import itertools
import math

import pytest
import torch
from cases import LossCase, make_case, small_config
from torch import Tensor

from sfr_kernels import SupervisedRows, flow_matching_loss, reference

pytestmark = pytest.mark.usefixtures("one_thread")
BACKENDS = pytest.mark.parametrize("backend", ["torch", "reference"])


def unbiased_hsic(x: Tensor, y: Tensor) -> float:
    """Song et al. 2012, equation 4: the U-statistic, a mean over all quadruples of distinct samples."""
    k, q, n = (x @ x.T).tolist(), (y @ y.T).tolist(), len(x)
    terms = [k[a][b] * (q[a][b] + q[c][d] - 2 * q[a][c]) for a, b, c, d in itertools.permutations(range(n), 4)]
    return sum(terms) / len(terms)


def cka(x: Tensor, y: Tensor) -> float:
    return reference._response_cka(x, y, torch.arange(len(x))).item()


def test_cka_is_the_ratio_of_u_statistics():
    g = torch.Generator().manual_seed(5)
    x, y = (torch.randn(6, size, generator=g, dtype=torch.float64) for size in (4, 3))
    y += x[:, :3]
    expected = unbiased_hsic(x, y) / math.sqrt(unbiased_hsic(x, x) * unbiased_hsic(y, y))
    assert cka(x, y) == pytest.approx(expected, rel=1e-10)


def test_cka_knows_no_rotation_scale_or_shift_and_is_one_with_itself():
    g = torch.Generator().manual_seed(6)
    x, y = (torch.randn(8, 5, generator=g, dtype=torch.float64) for _ in range(2))
    turn = torch.linalg.qr(torch.randn(5, 5, generator=g, dtype=torch.float64))[0]
    assert cka(x, x) == pytest.approx(1.0, rel=1e-12)
    assert cka(x, 3 * x @ turn + 7) == pytest.approx(1.0, rel=1e-10)
    assert cka(5 * x @ turn, y - 2) == pytest.approx(cka(x, y), rel=1e-9)
    assert abs(cka(x, y)) < 0.9
    # unbiased: independent samples have a mean of about zero, where the biased estimator is near 5/13 here
    draws = [cka(*torch.randn(2, 8, 5, generator=g, dtype=torch.float64)) for _ in range(300)]
    assert abs(sum(draws) / 300) < 0.05


FIVE = torch.arange(35).view(5, 7)  # responses, each of 6 rows or, as published, 7


def cka_case(preset: str, labels: Tensor = FIVE, blank: list[bool] | None = None) -> LossCase:
    case = make_case(small_config(preset, loss="cka"), labels=labels, vocab=35)
    if blank is not None:
        case.rows = SupervisedRows.from_labels(labels, case.config, blank=torch.tensor(blank))
    return case


def loss_and_gradient(case: LossCase, **options) -> tuple[Tensor, Tensor]:
    """1 − CKA as it stands in the loss, and its gradient of the hidden states (B, L, H)."""
    hidden = case.hidden.clone().requires_grad_()
    options = dict(seed=0, config=case.config) | options
    loss = flow_matching_loss(hidden, None, case.rows, case.targets, **options)
    loss.backward()
    return loss.detach(), hidden.grad


@BACKENDS
def test_the_loss_and_its_normalizer(backend):
    """Times the rows over the normalizer, so that micro-batches add up to a mean over rows; as published, by itself."""
    for preset, factor, length in (("default", 30 / 48, 6), ("official", 1.0, 7)):
        case = cka_case(preset)
        case.hidden[:, :, :6] += 3 * case.targets[:, None]  # else CKA is below zero, which is the next test's
        x, y = case.hidden[:, :length].mean(1), case.targets.double()
        wanted = unbiased_hsic(x, y) / math.sqrt(unbiased_hsic(x, x) * unbiased_hsic(y, y))
        loss, _ = loss_and_gradient(case, normalizer=48, backend=backend)
        assert loss.item() == pytest.approx(factor * (1 - wanted), rel=1e-9) and 0 < wanted < 1


@BACKENDS
def test_a_cka_below_zero_is_zero_as_published(backend):
    case, signs = cka_case("official"), set()
    for draw in range(10):
        g = torch.Generator().manual_seed(draw)
        case.hidden = torch.randn(case.hidden.shape, generator=g, dtype=torch.float64)
        loss, gradient = loss_and_gradient(case, backend=backend)
        x, y = case.hidden.mean(1), case.targets.double()
        positive = unbiased_hsic(x, y) > 0
        assert (loss < 1 if positive else loss == 1) and gradient.any() == positive
        signs.add(positive)
    assert signs == {True, False}


@BACKENDS
@pytest.mark.parametrize("blank", [None, [True, False, True, False, False]])
def test_fewer_than_four_responses(blank, backend):
    labels = FIVE[:3] if blank is None else FIVE
    with pytest.raises(ValueError, match="at least 4 responses in a batch, got 3"):
        loss_and_gradient(cka_case("default", labels, blank), backend=backend)
    loss, gradient = loss_and_gradient(cka_case("official", FIVE[:3]), backend=backend)
    assert loss == 0 and not gradient.any()


def test_a_response_whose_text_is_blank_is_left_out():
    left = [0, 2, 3, 4]
    found, fewer = cka_case("default", FIVE, [i not in left for i in range(5)]), cka_case("default", FIVE[left])
    fewer.hidden, fewer.targets = found.hidden[left], found.targets[left]
    wanted, wanted_gradient = loss_and_gradient(fewer, normalizer=9, backend="reference")
    for backend in ("torch", "reference"):
        loss, gradient = loss_and_gradient(found, normalizer=9, backend=backend)
        torch.testing.assert_close(loss, wanted, rtol=1e-10, atol=0)
        torch.testing.assert_close(gradient[left], wanted_gradient, rtol=1e-9, atol=1e-12)
        assert not gradient[1].any()
