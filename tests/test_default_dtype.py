"""torch's default dtype is for the caller's tensors: no loss, row or time computes anything else under another one."""

import pytest
import torch
from cases import EVERY, LOSSES, entropy_output, evaluate, flow_output, make_labels, sfr_output, small_config

from sfr_kernels import SupervisedRows, VelocityHead, reference
from sfr_kernels.ops.flow_loss import draw_times

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=[torch.bfloat16, torch.float64])
def under_another(request):
    """Calls a function while torch has another default dtype."""

    def run(function):
        torch.set_default_dtype(request.param)
        try:
            return function()
        finally:
            torch.set_default_dtype(torch.float32)

    return run


def assert_same_bits(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    assert [t.dtype for t in found] == [t.dtype for t in wanted] and all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("backend", ["torch", "reference"])
@EVERY
def test_losses(name, backend, under_another):
    """With every option that makes tensors of its own."""
    loss, case = LOSSES[name], LOSSES[name].case()
    weights = dict(row_weight=case.labels % 3, class_weight=case.bias.abs().float())
    logits = dict(label_smoothing=0.1, z_loss=0.1, softcap=3.0, logit_scale=0.3)
    own = {
        entropy_output: [weights, logits],
        flow_output: [dict(normalizer=7)],
        sfr_output: [dict(flow_weight=0.3, normalizer=torch.tensor(7)), logits],
    }

    def run():
        functions = [loss.ours(case, backend=backend, **options) for options in ({}, *own[loss.output])]
        inputs = [case.inputs(dtype, torch.float32) for dtype in (torch.float32, torch.bfloat16)]
        return [t for function in functions for x in inputs for t in evaluate(function, x).values()]

    assert_same_bits(under_another(run), run())


@pytest.mark.parametrize(
    "preset, options",
    [
        ("default", dict(weighting="uniform")),
        ("default", dict(loss="mtp")),
        ("default", {}),
        ("official", dict(segment_tokens=0)),
        ("official", {}),
    ],
)
def test_rows_and_times(preset, options, under_another):
    (labels, segments), config = make_labels(200), small_config(preset, **options)

    def run():
        rows = SupervisedRows.from_labels(labels, config, segments)
        tensors = [t for t in vars(rows).values() if isinstance(t, torch.Tensor)]
        at_zero = draw_times("torch", rows.noise_id, None, None, torch.zeros(1, dtype=torch.int64), 0)
        return [*tensors, *at_zero, *reference.draw_times(rows, 1, config)]

    assert_same_bits(under_another(run), run())


def test_parameters_of_a_head_are_of_the_default_dtype_as_those_of_torch(under_another):
    assert {p.dtype for p in under_another(lambda: VelocityHead(3, 4, 5)).parameters()} != {torch.float32}
