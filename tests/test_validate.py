"""Arguments that would give a wrong number rather than an error."""

import math

import pytest
import torch
from cases import evaluate, make_case, reference_flow, small_config

from sfr_kernels import flow_matching_loss, linear_cross_entropy, sfr_loss


def call(case, **options):
    return sfr_loss(case.hidden, case.weight, case.head, case.rows, case.targets, seed=1, config=case.config, **options)


@pytest.mark.parametrize("value", [math.nan, math.inf, torch.ones(2)])
def test_flow_weight_is_one_finite_number(value):
    with pytest.raises(ValueError, match="flow_weight"):
        call(make_case(small_config("default")), flow_weight=value)


def test_a_one_element_flow_weight_leaves_the_loss_a_scalar():
    case = make_case(small_config("default"))
    out, wanted = call(case, flow_weight=torch.tensor([0.5])), call(case, flow_weight=0.5)
    assert out.loss.shape == () and out.loss == wanted.loss


@pytest.mark.parametrize("error, times", [
    (TypeError, [0.5]),
    (ValueError, torch.tensor(0.5)),
    (TypeError, torch.zeros(3, dtype=torch.int64)),
    (ValueError, torch.zeros(1, device="meta")),
])  # fmt: skip
def test_times_are_a_vector_of_floats_on_the_device(error, times):
    case = make_case(small_config("default"))
    with pytest.raises(error, match="times"):
        flow_matching_loss(case.hidden, case.head, case.rows, case.targets, times, seed=1, config=case.config)


@pytest.mark.parametrize("loss", ["mse", "cosine", "mtp"])
def test_losses_at_time_zero_take_no_times(loss):
    """The head would be told of a time at which there is no x_t."""
    case = make_case(small_config("default", loss=loss))
    with pytest.raises(ValueError, match="times must be None"):
        call(case, times=torch.tensor([0.5]))


@pytest.mark.parametrize("option", [{"z_loss": math.nan}, {"logit_scale": math.nan}, {"logits_dtype": torch.int64}])
def test_options_of_the_logits_are_numbers(option):
    case = make_case(small_config("default"))
    labels = torch.zeros(case.hidden.shape[:-1], dtype=torch.int64)
    with pytest.raises(ValueError, match=next(iter(option))):
        linear_cross_entropy(case.hidden, case.weight, labels, **option)


class Unused(torch.autograd.Function):
    """x, of which no gradient comes back: torch hands None to the backward before it."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, _):
        return None


@pytest.mark.parametrize("kind", ["flow", "sfr", "decoder", "rows", "head"])
def test_a_loss_without_an_upstream_gradient_gives_none(kind):
    case = make_case(small_config("default"))
    x = case.inputs()
    case.hidden, case.weight, case.head = x.hidden, x.weight, x.head
    if kind == "flow":
        loss = flow_matching_loss(case.hidden, case.head, case.rows, case.targets, seed=1, config=case.config)
    elif kind == "sfr":
        loss = call(case).loss
    elif kind == "head":
        loss = case.head(torch.zeros(4, 6, dtype=torch.float64), 0.5, case.hidden[0, :4]).sum()
    else:
        reduction = "none" if kind == "rows" else "mean"
        loss = linear_cross_entropy(case.hidden, case.weight, case.labels, shift=True, reduction=reduction)
    (Unused.apply(loss).sum() + case.hidden.sum() * 2).backward()
    assert (case.hidden.grad == 2).all()
    assert all(p.grad is None or not p.grad.any() for p in (case.weight, *case.head.parameters()))


@pytest.mark.parametrize("joint", [True, False])
def test_a_step_of_the_head_between_two_backwards_changes_nothing(joint):
    """The gradients were made in forward: what the parameters are by now is no concern of backward."""
    case = make_case(small_config("default"))
    case.hidden.requires_grad_()
    if joint:
        loss = call(case).loss
    else:
        loss = flow_matching_loss(case.hidden, case.head, case.rows, case.targets, seed=1, config=case.config)
    loss.backward(retain_graph=True)
    first = [p.grad.clone() for p in (case.hidden, *case.head.parameters())]
    with torch.no_grad():
        for p in (case.hidden, *case.head.parameters()):
            p.grad = None
            p.mul_(2)
    loss.backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(first, (case.hidden, *case.head.parameters()), strict=True))


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
    ours = evaluate(
        lambda x: flow_matching_loss(x.hidden, x.head, case.rows, case.targets, seed=case.seed, config=config),
        case.inputs(torch.float16),
    )
    sums = exact["output_proj.weight"].abs().max() * 2**15
    assert sums > 65504
    for name, x in ours.items():
        error = (x.double() - exact[name]).norm() / exact[name].norm().clamp(min=1e-3)
        assert error < 0.02, (name, error)
