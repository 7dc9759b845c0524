"""What is `sfr_loss`'s own: it is the sum of its two parts, and takes the options of both.

What every loss does is in test_every_loss.py, what "mtp" predicts in test_mtp.py.
"""

from dataclasses import replace

import pytest
import torch
from cases import (
    LossCase,
    assert_same,
    evaluate,
    make_case,
    our_sfr,
    reference_sfr,
    sfr_output,
    small_config,
)
from operations import Operations

from sfr_kernels import flow_matching_loss, linear_cross_entropy, reference

pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = [(loss, preset) for loss in ("flow", "mse", "cosine", "cka") for preset in ("default", "official")]


def check(case: LossCase, **overrides) -> None:
    exact = evaluate(reference_sfr(case, **overrides), case.inputs(), upstream=-1.7)
    assert_same(evaluate(our_sfr(case, **overrides), case.inputs(), upstream=-1.7), exact)


@pytest.mark.parametrize("loss, preset", [*KINDS, ("mtp", "default")])
def test_options_of_a_call(loss, preset):
    """λ, the normalizer and the transforms of the logits; and L_flow with the other normalizer than the preset's."""
    case = make_case(small_config(preset, loss=loss))
    options = dict(flow_weight=2.5, normalizer=31.0, softcap=2.0, logit_scale=0.5, label_smoothing=0.1, z_loss=0.02)
    check(case, **options)
    other = dict(tokens="weights", weights="tokens")[case.config.flow_normalizer]
    check(replace(case, config=replace(case.config, flow_normalizer=other)), **options)
    check(case, bias=None, flow_weight=torch.tensor(0.0, dtype=torch.float64))


@pytest.mark.parametrize("loss, preset", KINDS)
def test_loss_is_the_sum_of_its_parts(loss, preset):
    case = make_case(small_config(preset, loss=loss))
    x = case.inputs()

    def parts(x):
        ce = linear_cross_entropy(x.hidden, x.weight, case.rows, bias=x.bias)
        arguments = (x.hidden, x.head, case.rows, case.targets)
        return ce, flow_matching_loss(*arguments, seed=case.seed, config=case.config)

    out, (ce, flow) = sfr_output(case, x, flow_weight=0.3), parts(x)
    for name, expected in dict(loss=ce + 0.3 * flow, ce=ce, flow=flow).items():
        torch.testing.assert_close(getattr(out, name), expected, rtol=1e-11, atol=0)
    assert out.loss.requires_grad and not (out.ce.requires_grad or out.flow.requires_grad) and out.stats is None
    separate = evaluate(lambda x: torch.add(*parts(x), alpha=0.3), case.inputs())
    assert_same(evaluate(our_sfr(case, flow_weight=0.3), case.inputs()), separate)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("loss, preset", [*KINDS, ("mtp", "default")])
def test_the_flow_of_another_layer(loss, preset, backend):
    """Each of two hidden states has the gradient of its own part. Also where one of them needs none."""
    case = make_case(small_config(preset, loss=loss))
    other = torch.randn(case.hidden.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    options = dict(flow_weight=2.5, normalizer=31.0, softcap=2.0, label_smoothing=0.1)

    def leaves(frozen=()):
        x = case.inputs()
        x.flow_hidden = other.clone().requires_grad_()
        for name in frozen:
            getattr(x, name).requires_grad_(False)
        return x

    def wanted(x):
        shape = dict(time_scale=1.0) if x.head is None else vars(x.head.shape)
        scales = {k: v for k, v in shape.items() if k in ("time_scale", "hidden_scale", "hidden_norm")}
        given = dict(seed=case.seed, config=case.config, bias=x.bias) | scales | options
        both = [
            reference.sfr_loss(h, x.weight, x.params, case.rows, case.targets, **given)
            for h in (x.hidden, x.flow_hidden)
        ]
        return both[0][1] + 2.5 * both[1][2]

    def found(x):
        return sfr_output(case, x, flow_hidden=x.flow_hidden, backend=backend, **options).loss

    for frozen in ((), ("hidden", "weight", "bias"), ("flow_hidden",)):
        exact = evaluate(wanted, leaves(frozen), upstream=-1.7)
        assert all(exact[name].any() == (name not in frozen) for name in ("hidden", "flow_hidden"))
        assert_same(evaluate(found, leaves(frozen), upstream=-1.7), exact)


def test_hidden_states_of_another_layer_that_do_not_fit_are_refused():
    case = make_case(small_config())
    x = case.inputs()
    for error, words, options in (
        (ValueError, r"flow_hidden must be like hidden, \(4, 13, 12\) on cpu", dict(flow_hidden=x.hidden[:, 1:])),
        (ValueError, "flow_hidden must be like hidden", dict(flow_hidden=x.hidden.to("meta"))),
        (TypeError, "flow_hidden must be a floating-point", dict(flow_hidden=x.hidden.long())),
        (ValueError, "return_norms has no meaning with flow_hidden", dict(flow_hidden=x.hidden, return_norms=True)),
    ):
        with pytest.raises(error, match=words):
            sfr_output(case, x, **options)


@pytest.mark.parametrize("loss, preset", [("flow", "official"), ("mtp", "default")])
def test_how_logits_are_held_is_passed_on(loss, preset):
    case = make_case(small_config(preset, loss=loss))
    with Operations() as seen:
        found = evaluate(our_sfr(case, softcap=3.0, chunk_rows=3, accum_dtype=torch.float64), case.inputs())
    assert_same(found, evaluate(reference_sfr(case, softcap=3.0), case.inputs()))
    assert max(s[0] for s in seen.shapes if len(s) == 2 and s[1] == len(case.weight)) == 3
