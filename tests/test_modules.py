"""`VelocityHead` is the reference's head (test_golden.py: the published one); loss modules pass on what they get."""

import copy
import inspect
import pickle
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from cases import assert_same, evaluate, make_case, make_head, small_config

from sfr_kernels import (
    LinearCrossEntropy,
    SFRConfig,
    SFRLoss,
    VelocityHead,
    linear_cross_entropy,
    modules,
    reference,
    sfr_loss,
)

pytestmark = pytest.mark.usefixtures("one_thread")
H, D_TARGET, WIDTH = 7, 6, 10


def published_shapes(num_layers: int) -> dict[str, tuple[int, ...]]:
    """The parameters of the published head, in order."""
    weights = {
        "time_embed.mlp.0": (4 * D_TARGET, D_TARGET),
        "time_embed.mlp.2": (D_TARGET, 4 * D_TARGET),
        "input_proj.0": (WIDTH, 2 * D_TARGET + H),
        "input_proj.1": (WIDTH,),
    }
    for i in range(num_layers - 2):
        weights |= {f"res_blocks.{i}.linear": (WIDTH, WIDTH), f"res_blocks.{i}.norm": (WIDTH,)}
    weights["output_proj"] = (D_TARGET, WIDTH)
    return {f"{k}.{of}": s[:n] for k, s in weights.items() for of, n in (("weight", 2), ("bias", 1))}


@pytest.mark.parametrize("num_layers, other", [(2, 4), (3, 2), (4, 3)])
def test_parameters_are_the_published_ones_and_another_depth_is_refused(num_layers, other):
    head = VelocityHead(H, D_TARGET, WIDTH, num_layers)
    wanted = list(published_shapes(num_layers).items())
    assert [(name, p.shape) for name, p in head.named_parameters()] == wanted
    assert [(name, t.shape) for name, t in head.state_dict().items()] == wanted  # no buffers
    with pytest.raises(RuntimeError, match="res_blocks"):
        VelocityHead(H, D_TARGET, WIDTH, other).load_state_dict(head.state_dict())


def test_a_new_head_predicts_no_velocity():
    head = VelocityHead(H, D_TARGET, WIDTH)
    v = head(torch.randn(5, D_TARGET), torch.rand(5), torch.randn(5, H))
    assert v.shape == (5, D_TARGET) and not v.any()
    v.sum().backward()
    assert head.output_proj.weight.grad.any()  # and yet it learns


def test_from_config_takes_every_setting_of_the_head():
    for config in (SFRConfig(width=12, num_layers=5), SFRConfig.official(width=9)):
        shape = VelocityHead.from_config(config, 3, 4).shape
        assert (shape.hidden_size, shape.target_size, shape.width) == (3, 4, config.width)
        assert shape.num_blocks == config.num_layers - 2
        for name in ("time_scale", "hidden_scale", "hidden_norm"):
            assert getattr(shape, name) == getattr(config, name)


@pytest.mark.parametrize("t", [torch.rand(5).double(), 0.25, torch.tensor(0.25), torch.zeros(5)])
def test_forward_and_gradients_equal_the_reference(t):
    head, times = make_head(H, D_TARGET, small_config()), torch.as_tensor(t, dtype=torch.float64).expand(5)
    x_t, h, upstream = (torch.randn(5, size, dtype=torch.float64) for size in (D_TARGET, H, D_TARGET))
    x = SimpleNamespace(hidden=h.requires_grad_(), params=dict(head.named_parameters()))
    scales = head.shape.time_scale, head.shape.hidden_scale, head.shape.hidden_norm
    exact = evaluate(lambda x: (reference.velocity(x.params, x_t, times, x.hidden, *scales) * upstream).sum(), x)
    assert_same(evaluate(lambda x: (head(x_t, t, x.hidden) * upstream).sum(), x), exact)
    # the upstream gradient of a sum has stride 0, that of a product is contiguous
    contiguous = evaluate(lambda x: (head(x_t, t, x.hidden) * torch.ones_like(upstream)).sum(), x)
    assert_same(evaluate(lambda x: head(x_t, t, x.hidden).sum(), x), contiguous)


def test_forward_is_served_by_the_backend_of_the_environment(monkeypatch):
    head, calls, real = make_head(H, D_TARGET, small_config()), [], F.layer_norm
    monkeypatch.setattr(F, "layer_norm", lambda *a: calls.append(1) or real(*a))  # which only the reference calls
    x_t, h = torch.randn(3, D_TARGET, dtype=torch.float64), torch.randn(3, H, dtype=torch.float64)
    expected = head(x_t, 0.5, h)
    assert not calls
    monkeypatch.setenv("SFR_KERNELS_BACKEND", "reference")
    torch.testing.assert_close(head(x_t, 0.5, h), expected, rtol=1e-10, atol=1e-12)
    assert calls
    monkeypatch.setenv("SFR_KERNELS_BACKEND", "fast")
    with pytest.raises(ValueError, match="SFR_KERNELS_BACKEND"):
        head(x_t, 0.5, h)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_forward_casts_what_it_is_given(monkeypatch, backend):
    monkeypatch.setenv("SFR_KERNELS_BACKEND", backend)
    head = make_head(H, D_TARGET, small_config(), torch.float32)
    x_t, h = torch.randn(3, D_TARGET), torch.randn(3, H)
    v = head(x_t, 0.5, h.bfloat16())
    assert v.dtype == torch.bfloat16 and v.is_contiguous()  # its rows of 12 bytes were padded to 16 within
    with torch.autocast("cpu", torch.bfloat16):
        assert head(x_t, 0.5, h).dtype == torch.bfloat16


def test_no_rows():
    head = make_head(H, D_TARGET, small_config())
    x_t, h = torch.zeros(0, D_TARGET, dtype=torch.float64), torch.zeros(0, H, dtype=torch.float64)
    assert head(x_t, 0.5, h).shape == (0, D_TARGET)


WRONG = [("hidden_size", 0), ("target_size", -1), ("width", 2.0), ("num_layers", 1), ("time_scale", 0.0)]
WRONG += [("hidden_scale", float("nan")), ("hidden", torch.zeros(5, H + 1)), ("x_t", torch.zeros(5, D_TARGET - 1))]
WRONG += [("x_t", torch.zeros(4, D_TARGET)), ("t", torch.zeros(4)), ("t", torch.zeros(5, 1)), ("hidden_norm", "layer")]


@pytest.mark.parametrize("name, value", WRONG)
def test_errors_name_the_argument(name, value):
    made = dict(hidden_size=H, target_size=D_TARGET, width=WIDTH)
    call = dict(x_t=torch.zeros(5, D_TARGET), t=torch.zeros(5), hidden=torch.zeros(5, H))
    with pytest.raises(ValueError, match=rf"\b{name} "):
        VelocityHead(**made | ({} if name in call else {name: value}))(**call | {name: value})


@pytest.mark.parametrize("module, function", [(LinearCrossEntropy, linear_cross_entropy), (SFRLoss, sfr_loss)])
def test_a_loss_module_passes_on_every_argument_of_the_function(module, function, monkeypatch):
    taken = inspect.signature(function)
    of_module, of_call = (list(inspect.signature(f).parameters)[1:] for f in (module.__init__, module.forward))
    tensors = dict(config=small_config(), head=make_head(H, D_TARGET, small_config()), class_weight=torch.ones(13))
    values = {name: tensors.get(name, f"the {name}") for name in taken.parameters}
    monkeypatch.setattr(modules, function.__name__, lambda *args, **kwargs: taken.bind(*args, **kwargs).arguments)
    assert {*of_module, *of_call} == values.keys()
    made = module(**{name: values[name] for name in of_module})
    assert made(**{name: values[name] for name in of_call}) == values


def test_sfr_loss_module_has_a_head_where_the_loss_has_one():
    head = make_head(H, D_TARGET, small_config())
    assert list(SFRLoss(small_config(), head).parameters()) == list(head.parameters())
    with pytest.raises(ValueError, match="cka"):
        SFRLoss(small_config(loss="cka"), head)
    with pytest.raises(ValueError, match="flow"):
        SFRLoss(small_config(), None)
    for other in (dict(hidden_scale=0.5), dict(hidden_norm="none")):  # than the head learned with
        with pytest.raises(ValueError, match=next(iter(other))):
            SFRLoss(small_config(**other), head)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_modules_can_be_copied_and_pickled(duplicate):
    case = make_case(small_config())
    module = SFRLoss(case.config, case.head)
    other = duplicate(module)
    call = (case.hidden, case.weight, case.rows, case.targets)
    assert torch.equal(other(*call, seed=1).loss, module(*call, seed=1).loss)
    with torch.no_grad():  # a copy shares nothing
        other.head.output_proj.bias.add_(1)
    assert not torch.equal(other(*call, seed=1).loss, module(*call, seed=1).loss)
    entropy = duplicate(LinearCrossEntropy(softcap=3.0))
    assert entropy.options == LinearCrossEntropy(softcap=3.0).options
