"""The reference itself: its gradients by finite differences, its head, CKA and noise by other people's definitions."""

import math
from dataclasses import replace

import pytest
import torch
from cases import evaluate, make_case, make_head, reference_flow, reference_sfr, small_config

from benchmarks.peers.published import PublishedFlowLoss
from sfr_kernels import SFRConfig, SupervisedRows, reference

pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = [("flow", "default"), ("flow", "official"), ("mse", "default"), ("cosine", "official")]
KINDS += [("cka", "default"), ("mtp", "default")]


@pytest.mark.parametrize("loss, preset", KINDS)
def test_gradients_by_finite_differences(loss, preset):
    # few columns: gradcheck calls the loss twice for every coordinate
    config = small_config(preset, loss=loss, width=3, num_layers=3, time_scale=2.0)
    case = make_case(config, length=6, hidden_size=2, target_size=3, vocab=4)
    x = case.inputs()
    checked = [n for n in x.params if n.startswith(("time_embed.mlp.0", "input_proj", "res_blocks", "output_proj.b"))]

    def loss_of(hidden, weight, bias, *params):
        x.hidden, x.weight, x.bias = hidden, weight, bias
        x.params = x.params | dict(zip(checked, params, strict=True))
        return reference_sfr(case, flow_weight=0.7)(x)

    inputs = [x.hidden, x.weight, x.bias, *(x.params[n] for n in checked)]
    assert torch.autograd.gradcheck(loss_of, inputs, eps=1e-6, atol=1e-6, rtol=1e-6)


def published_velocity(head, x_t, t, h):
    """Of the published head, a module of torch's own layers; what it says without scales and norm, a row by itself."""
    shape, config = head.shape, small_config()
    copy = PublishedFlowLoss(shape.hidden_size, shape.target_size, config.width, 4, shape.time_scale).double()
    copy.load_state_dict(head.state_dict())
    if shape.hidden_norm == "rms":
        h = h / (h.square().mean(dim=1, keepdim=True) + 1e-6).sqrt()
    return copy.velocity(x_t[:, None], t, shape.hidden_scale * h[:, None])[:, 0]


@pytest.mark.parametrize("size", [2, 3, 5, 8])  # one frequency, odd sizes that pad a zero, an even one
def test_velocity_equals_a_module_of_torch_layers(size):
    head = make_head(7, size, small_config(time_scale=1000.0))
    x_t, h = torch.randn(5, size, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    t = torch.tensor([0.0, 1e-3, 0.25, 0.5, 1.0], dtype=torch.float64)
    ours = reference.velocity(dict(head.named_parameters()), x_t, t, h, 1000.0, 0.3, "rms")
    torch.testing.assert_close(ours, published_velocity(head, x_t, t, h), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("preset, scale", [("default", math.sqrt(6)), ("official", 1.0)])
def test_flow_loss_one_row_at_a_time(preset, scale):
    """Σ weight · mean (v − u)² / total, each row by itself."""
    case = make_case(small_config(preset))
    times = torch.tensor([0.0, 0.25, 0.5, 0.75])  # one for each sequence
    case.rows = rows = case.rows.replace(time_index=(case.rows.rows // 13).int())
    noise = reference.gaussian_noise(case.seed, rows.noise_id[: rows.num_flow], 6).double()
    total = 0.0
    for r, x_0 in enumerate(noise):
        x_1, t = scale * case.targets[rows.anchor[r]].double(), times[rows.time_index[r]].double()
        x_t, h = (1 - t) * x_0 + t * x_1, case.hidden.flatten(0, 1)[rows.rows[r]]
        v = published_velocity(case.head, x_t[None], t[None], h[None])[0]
        total += rows.weight[r].item() * ((v - (x_1 - x_0)) ** 2).mean().item()
    expected = total / (rows.num_ce if preset == "default" else max(rows.weight.double().sum().item(), 1))
    ours = evaluate(reference_flow(case, times=times), case.inputs())["value"].item()
    assert ours == pytest.approx(expected, rel=1e-10)


def test_a_zero_target_of_the_published_rule_keeps_its_weight():
    # one response of one token, shorter than min_tokens: x_1 = 0, so u = −x_0 and x_t = (1 − t) x_0
    config = small_config("official")
    case = make_case(config, labels=torch.tensor([[-100, -100, 4, -100]]))
    assert case.rows.num_flow == 1 and case.rows.weight[0] == 1.0
    assert case.targets.shape == (1, 6) and not case.targets.any()
    times, index = reference.draw_times(case.rows, case.seed, config)
    x_0 = reference.gaussian_noise(case.seed, case.rows.noise_id[:1], 6).double()
    t = times[index[:1]].double()
    params = dict(case.head.named_parameters())
    v = reference.velocity(params, (1 - t)[:, None] * x_0, t, case.hidden[:, 2], config.time_scale)
    ours = evaluate(reference_flow(case), case.inputs())["value"]
    torch.testing.assert_close(ours, (v + x_0).square().mean().detach(), rtol=1e-10, atol=0)
    assert ours > 0.01


def test_stratified_times():
    labels = torch.arange(40_000).remainder(50).view(4, 10_000)
    config = SFRConfig(num_times=10, time_power=1.0)  # not a multiple of the four words of a block
    rows = SupervisedRows.from_labels(labels, config)
    times, index = reference.draw_times(rows, 3, config)
    assert times.shape == (10,) and ((times * 10).floor() == torch.arange(10)).all()  # one in each stratum
    counts = torch.bincount(index, minlength=10).double()
    assert index.min() == 0 and index.max() == 9
    assert ((counts - len(rows) / 10).abs() < 5 * (len(rows) * 0.09) ** 0.5).all()  # five standard deviations
    early, same = reference.draw_times(rows, 3, replace(config, time_power=3.0))
    assert torch.equal(same, index) and torch.allclose(early, times * times * times, rtol=1e-6)


def test_one_time_a_sequence_from_its_first_row():
    case = make_case(small_config("official"))
    times, index = reference.draw_times(case.rows, case.seed, case.config)
    assert times.shape == (4,) and torch.equal(index, case.rows.rows // 13)
    assert len(times.unique()) == 4 and (times > 0).all() and (times < 1).all()
    dirac = replace(case.config, loss="mse")
    times, index = reference.draw_times(case.rows, case.seed, dirac)
    assert times.tolist() == [0.0] and not index.any()
