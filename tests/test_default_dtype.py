"""torch's default dtype is for the caller's tensors: no loss, row or head computes anything else under another one."""

import pytest
import torch
from cases import LossCase, evaluate, make_case, make_labels, small_config

from sfr_kernels import SupervisedRows, VelocityHead, flow_matching_loss, linear_cross_entropy, reference, sfr_loss
from sfr_kernels.ops.times import draw_times

pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = [("flow", "default"), ("flow", "official"), ("mse", "default"), ("cosine", "default"), ("cka", "default")]
KINDS += [("mtp", "default")]


@pytest.fixture
def default_dtype():
    """Sets it, until the test is over."""
    yield torch.set_default_dtype
    torch.set_default_dtype(torch.float32)


def losses(case: LossCase, backend: str) -> list[torch.Tensor]:
    """Values and gradients in two dtypes, with every option that makes tensors of its own."""
    entropy = dict(labels=case.labels, shift=2, row_weight=case.labels % 3, class_weight=case.bias.abs().float())
    smooth = dict(labels=case.labels, label_smoothing=0.1, z_loss=0.1, softcap=3.0, logit_scale=0.3, normalizer=2.5)
    fixed = dict(rows=case.rows, targets=case.targets, seed=case.seed, config=case.config, backend=backend)
    functions = [
        lambda x: linear_cross_entropy(x.hidden, x.weight, bias=x.bias, backend=backend, **entropy),
        lambda x: linear_cross_entropy(x.hidden, x.weight, reduction="none", backend=backend, **entropy).sum(),
        lambda x: linear_cross_entropy(x.hidden, x.weight, case.rows, backend=backend),
        lambda x: linear_cross_entropy(x.hidden, x.weight, bias=x.bias, backend=backend, **smooth),
        lambda x: sfr_loss(x.hidden, x.weight, x.head, **fixed, flow_weight=0.3, normalizer=torch.tensor(7)).loss,
    ]
    if case.config.loss != "mtp":
        functions.append(lambda x: flow_matching_loss(x.hidden, x.head, **fixed))
    if case.config.loss == "flow":
        x_t = case.hidden[0, :, :6]
        functions.append(lambda x: x.head(x_t.to(x.hidden.dtype), 0.3, x.hidden[0]).square().sum())
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        found += [t for f in functions for t in evaluate(f, case.inputs(dtype, torch.float32)).values()]
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("loss, preset", KINDS)
def test_losses_are_the_same_bit_for_bit(monkeypatch, default_dtype, loss, preset, backend, dtype):
    monkeypatch.setenv("SFR_KERNELS_BACKEND", backend)
    case = make_case(small_config(preset, loss=loss))
    wanted = losses(case, backend)
    default_dtype(dtype)
    found = losses(case, backend)
    assert [t.dtype for t in found] == [t.dtype for t in wanted]
    assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("options", [dict(), dict(weighting="uniform"), dict(loss="mtp")])
@pytest.mark.parametrize("preset", ["default", "official"])
def test_rows_are_the_same_bit_for_bit(default_dtype, preset, options, dtype):
    if preset == "official" and "loss" in options:
        options = dict(segment_tokens=0)
    (labels, segments), config = make_labels(200), small_config(preset, **options)
    wanted = vars(SupervisedRows.from_labels(labels, config, segments))
    default_dtype(dtype)
    found = vars(SupervisedRows.from_labels(labels, config, segments))
    for name, value in wanted.items():
        if isinstance(value, torch.Tensor):
            assert found[name].dtype == value.dtype and torch.equal(found[name], value), name
        else:
            assert found[name] == value, name


def test_the_time_of_the_losses_at_zero_is_float32(default_dtype):
    """Kernels read it as such."""
    rows = make_case(small_config(loss="mse")).rows
    default_dtype(torch.bfloat16)
    drawn = draw_times(None, rows.noise_id, None, None, torch.zeros(1, dtype=torch.int64), 0)
    for times, _ in (drawn, reference.draw_times(rows, 1, small_config(loss="mse"))):
        assert times.dtype == torch.float32


def test_parameters_of_a_head_are_of_the_default_dtype_as_those_of_torch(default_dtype):
    default_dtype(torch.float64)
    assert {p.dtype for p in VelocityHead(3, 4, 5).parameters()} == {torch.float64}
