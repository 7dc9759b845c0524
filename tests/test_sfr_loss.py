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

from sfr_kernels import flow_matching_loss, linear_cross_entropy

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


@pytest.mark.parametrize("loss, preset", [("flow", "official"), ("mtp", "default")])
def test_how_logits_are_held_is_passed_on(loss, preset):
    case = make_case(small_config(preset, loss=loss))
    with Operations() as seen:
        found = evaluate(our_sfr(case, softcap=3.0, chunk_rows=3, accum_dtype=torch.float64), case.inputs())
    assert_same(found, evaluate(reference_sfr(case, softcap=3.0), case.inputs()))
    assert max(s[0] for s in seen.shapes if len(s) == 2 and s[1] == len(case.weight)) == 3
