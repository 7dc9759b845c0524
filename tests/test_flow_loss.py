"""What is `flow_matching_loss`'s own: sizes and dtypes of its head, seeds, sums in float16; and 1 − CKA.

What every loss does is in test_every_loss.py.
"""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from cases import LossCase, assert_same, evaluate, make_case, our_flow, reference_flow, small_config
from torch import Tensor

from sfr_kernels import SupervisedRows, flow_matching_loss, reference
from sfr_kernels.kernels.backend import kernels_of
from sfr_kernels.kernels.flow import FlowPath
from sfr_kernels.ops.flow_loss import step_seed

pytestmark = pytest.mark.usefixtures("one_thread")
BOTH = pytest.mark.parametrize("preset", ["default", "official"])
BACKENDS = pytest.mark.parametrize("backend", ["torch", "reference"])


@BOTH
@pytest.mark.parametrize(
    "target_size, num_layers",
    [(2, 4), (5, 4), (7, 4), (6, 2), (6, 5)],  # one frequency; odd: a padded sinusoid; not whole Philox blocks; blocks
)
def test_odd_sizes_and_depths_of_the_head(target_size, num_layers, preset):
    case = make_case(small_config(preset, num_layers=num_layers, source_std=0.7), target_size=target_size)
    assert_same(evaluate(our_flow(case), case.inputs()), evaluate(reference_flow(case), case.inputs()))


@pytest.mark.parametrize("dtype, head_dtype", [("float64", "float32"), ("float32", "float64"), ("bfloat16", "float64")])
def test_a_head_of_another_dtype_than_the_hidden_states(dtype, head_dtype):
    case = make_case(small_config(time_scale=1.0))
    value = our_flow(case)(case.inputs(getattr(torch, dtype), getattr(torch, head_dtype)))
    exact = reference_flow(case)(case.inputs())
    torch.testing.assert_close(value.double(), exact, rtol=2.0**-7 if dtype == "bfloat16" else 1e-5, atol=0)


def test_mse_is_flow_from_a_point_at_time_zero():
    mse = make_case(small_config(loss="mse"))
    flow = replace(mse, config=replace(mse.config, loss="flow", source_std=0.0))
    flow.rows = mse.rows.replace(time_index=torch.zeros(len(mse.rows), dtype=torch.int32))
    at_zero = our_flow(flow, times=torch.zeros(1, dtype=torch.float32))
    assert_same(evaluate(at_zero, flow.inputs()), evaluate(our_flow(mse), mse.inputs()), rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_flow_path_is_rounded_once(dtype):
    rows, targets = (case := make_case(small_config())).rows, case.targets
    times, index = reference.draw_times(rows, 3, case.config)
    n, seed = rows.num_flow, torch.tensor([3])
    path = FlowPath(targets, times, rows.noise_id[:n], rows.anchor[:n], index[:n].int(), seed, 1.9, 0.7)
    for wide, found in zip(*(kernels_of("torch").flow_path(path, d) for d in (torch.float32, dtype)), strict=True):
        assert torch.equal(found, wide.to(dtype))


def test_step_seeds_are_those_of_splitmix_as_numbers_and_as_tensors():
    """63 bits, from the finaliser computed with unsigned numbers; all different."""

    def wanted(seed, step):
        mask = 2**64 - 1
        x = (seed * 0x9E3779B97F4A7C15 + (step + 2) * 0xD1B54A32D192ED03) & mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return (x ^ (x >> 31)) >> 1

    steps, found = [*range(-1, 1000), 2**31, 2**40], set()
    for seed in (-(2**63), -1, 0, 1, 12345, 2**63 - 1):
        seeds = [step_seed(seed, s) for s in steps]
        assert seeds == [wanted(seed, s) for s in steps] == step_seed(seed, torch.tensor(steps)).tolist()
        found.update(seeds)
    assert len(found) == 6 * len(steps) and all(0 <= s < 2**63 for s in found)


@pytest.mark.parametrize("loss", ["flow", "mse"])
def test_sums_over_many_rows_fit_in_float16(loss):
    """Every row pulls the head the same way: before they are divided by the normalizer, the sums of its gradients over
    the rows are beyond 65504, those of its table of times too."""
    labels = torch.zeros(1, 2**15 + 1, dtype=torch.int64)
    labels[0, 0] = -100
    config = small_config(loss=loss, target_scale=8.0, weighting="uniform", segment_tokens=0, width=32)
    case = make_case(config, labels=labels, hidden_size=8, target_size=8)
    case.targets = torch.full_like(case.targets, 8**-0.5)
    exact = evaluate(reference_flow(case), case.inputs())
    assert exact["output_proj.weight"].abs().max() * 2**15 > 65504
    for name, x in evaluate(our_flow(case), case.inputs(torch.float16)).items():
        error = (x.double() - exact[name]).norm() / exact[name].norm().clamp(min=1e-3)
        assert error < 0.02, (name, error)


# ---------------------------------------------------------------------------------------------------------------------
# CKA: the estimator by other people's definitions, its bounds, its normalizer, and batches too small for it


def unbiased_hsic(x: Tensor, y: Tensor) -> float:
    """Song et al. 2012, equation 4: the U-statistic, a mean over all quadruples of distinct samples."""
    k, q, n = (x @ x.T).tolist(), (y @ y.T).tolist(), len(x)
    terms = [k[a][b] * (q[a][b] + q[c][d] - 2 * q[a][c]) for a, b, c, d in itertools.permutations(range(n), 4)]
    return sum(terms) / len(terms)


def cka(x: Tensor, y: Tensor) -> float:
    return reference._response_cka(x, y, torch.arange(len(x))).item()


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
