"""The losses over the kernels: every value and gradient against the reference in float64."""

from dataclasses import replace

import pytest
import torch
from cases import assert_as_good_as_eager, evaluate, in_float64, make_case, reference_flow, reference_sfr, small_config
from device import BACKEND, DEVICE, DTYPES, ON_GPU
from marks import long_but

from sfr_kernels import flow_matching_loss, linear_cross_entropy, reference, sfr_loss


def on_device(case, dtype, head_dtype=None):
    """The case's rows and targets where the kernels run, and fresh leaves there in `dtype`."""
    x = case.inputs(dtype, head_dtype)
    tensors = {name: t.detach().to(DEVICE).requires_grad_() for name, t in vars(x).items() if torch.is_tensor(t)}
    head = x.head and x.head.to(DEVICE)
    moved = replace(case, rows=case.rows.to(DEVICE), targets=case.targets.to(DEVICE))
    return moved, type(x)(**tensors, head=head, params=dict(head.named_parameters()) if head else {})


def judge(case, ours, eager, dtype, k=1.5, draws=4 if ON_GPU else 2):
    """‖ours − exact‖ ≤ k ‖eager − exact‖ for every value and gradient, over several hidden states and seeds."""
    found = [], [], []
    for draw in range(draws):
        hidden = torch.randn(case.hidden.shape, generator=torch.Generator().manual_seed(draw), dtype=torch.float64)
        drawn = replace(case, hidden=hidden, seed=draw)
        moved, x = on_device(drawn, dtype)
        mine = evaluate(ours(moved), x)
        assert mine["value"].dtype == torch.float32 and mine["hidden"].dtype == dtype
        found[0].append({name: t.cpu() for name, t in mine.items()})
        moved, y = on_device(drawn, dtype)
        found[1].append({name: t.cpu() for name, t in evaluate(eager(moved), y).items()})
        found[2].append(evaluate(eager(drawn), in_float64(drawn.inputs(dtype))))
    assert_as_good_as_eager(*({name: torch.stack([r[name] for r in rs]) for name in rs[0]} for rs in found), k)


def ours_flow(case):
    options = dict(seed=case.seed, config=case.config, backend=BACKEND)
    return lambda x: flow_matching_loss(x.hidden, x.head, case.rows, case.targets, **options)


def ours_sfr(case):
    options = dict(seed=case.seed, config=case.config, backend=BACKEND) | case.options
    return lambda x: sfr_loss(x.hidden, x.weight, x.head, case.rows, case.targets, bias=x.bias, **options).loss


@pytest.mark.parametrize("dtype", long_but(DTYPES, torch.float32))
@pytest.mark.parametrize("preset, loss", [("default", "flow"), ("default", "mse")])
def test_flow_loss(preset, loss, dtype):
    case = make_case(small_config(preset, loss=loss, width=24, num_layers=4), hidden_size=20, target_size=14)
    judge(case, ours_flow, reference_flow, dtype)


@pytest.mark.parametrize("dtype", long_but(DTYPES, torch.float16))
@pytest.mark.parametrize("preset, options", [("default", {}), ("official", dict(softcap=3.0, logit_scale=0.7))])
def test_sfr_loss(preset, options, dtype):
    case = make_case(small_config(preset, width=24), hidden_size=20, target_size=14, vocab=37)
    judge(replace(case, options=options), ours_sfr, reference_sfr, dtype)


def test_statistics_of_the_joint_loss():
    case = make_case(small_config("official"), hidden_size=20, target_size=14, vocab=37)
    logits = case.hidden.flatten(0, 1)[case.rows.rows[case.rows.ce_start :]] @ case.weight.T + case.bias
    moved, x = on_device(case, torch.float32)
    options = dict(seed=case.seed, config=case.config, bias=x.bias, backend=BACKEND, return_stats=True)
    stats = sfr_loss(x.hidden, x.weight, x.head, moved.rows, moved.targets, **options).stats
    torch.testing.assert_close(stats.lse.cpu().double(), logits.logsumexp(1), rtol=1e-5, atol=0)
    assert torch.equal(stats.predicted.cpu(), logits.argmax(1))


def close_to_the_reference(case) -> dict[str, torch.Tensor]:
    """Values and gradients in float32, found near those of float64."""
    exact = evaluate(reference_sfr(case), case.inputs())
    moved, x = on_device(case, torch.float32)
    found = evaluate(ours_sfr(moved), x)
    for name, value in found.items():
        torch.testing.assert_close(value.cpu().double(), exact[name], rtol=1e-4, atol=1e-5)
    return found


@pytest.mark.parametrize("loss", ["cosine", "cka", "mtp"])
def test_relatives_of_the_flow_loss(loss):
    close_to_the_reference(make_case(small_config(loss=loss, mtp_tokens=2), hidden_size=20, target_size=14, vocab=37))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_linear_cross_entropy(dtype, reduction):
    case = make_case(small_config(), hidden_size=20, vocab=37)
    options = dict(softcap=4.0, logit_scale=0.8, label_smoothing=0.1, z_loss=0.01)

    def ours(case):
        labels, how = case.labels.to(DEVICE), dict(shift=True, reduction=reduction, backend=BACKEND)
        return lambda x: linear_cross_entropy(x.hidden, x.weight, labels, bias=x.bias, **how, **options).sum()

    def eager(case):
        labels = torch.full_like(case.labels, -100)
        labels[:, :-1] = case.labels[:, 1:]
        index = (labels.flatten() != -100).nonzero().squeeze(1)

        def loss(x):
            h = x.hidden.flatten(0, 1)[index.to(x.hidden.device)]
            chosen = labels.flatten()[index].to(h.device)
            out = reference.linear_cross_entropy(h, x.weight, chosen, bias=x.bias, **options)
            return out.mean() if reduction == "mean" else out.sum()

        return loss

    judge(case, ours, eager, dtype, 1.2)


@pytest.mark.parametrize("dtype", long_but(DTYPES, torch.float16))
def test_two_runs_give_the_same_bits(dtype):
    case = make_case(small_config(width=24), hidden_size=20, target_size=14, vocab=37)
    first, second = (evaluate(ours_sfr(moved), x) for moved, x in (on_device(case, dtype) for _ in range(2)))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("rows", ["none", "one"])
def test_few_rows(rows):
    labels = torch.full((2, 5), -100)
    if rows == "one":
        labels[1, 3] = 4
    found = close_to_the_reference(make_case(small_config(min_tokens=1), labels=labels))
    assert rows == "one" or not any(t.any() for t in found.values())
