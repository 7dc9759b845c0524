"""`VelocityHead` is the published head, by name, shape and value; the loss modules are the functions."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from cases import make_case, make_head, small_config

from sfr_kernels import LinearCrossEntropy, SFRConfig, SFRLoss, VelocityHead, linear_cross_entropy, reference, sfr_loss

pytestmark = pytest.mark.usefixtures("one_thread")
H, D_TARGET, WIDTH = 7, 6, 10


def published_state(num_blocks: int = 2) -> dict[str, torch.Tensor]:
    """A checkpoint as the published code writes it, made without this library."""
    g = torch.Generator().manual_seed(0)
    shapes = {
        "time_embed.mlp.0.weight": (4 * D_TARGET, D_TARGET),
        "time_embed.mlp.0.bias": (4 * D_TARGET,),
        "time_embed.mlp.2.weight": (D_TARGET, 4 * D_TARGET),
        "time_embed.mlp.2.bias": (D_TARGET,),
        "input_proj.0.weight": (WIDTH, 2 * D_TARGET + H),
        "input_proj.0.bias": (WIDTH,),
        "input_proj.1.weight": (WIDTH,),
        "input_proj.1.bias": (WIDTH,),
    }
    for i in range(num_blocks):
        shapes |= {f"res_blocks.{i}.linear.weight": (WIDTH, WIDTH), f"res_blocks.{i}.linear.bias": (WIDTH,)}
        shapes |= {f"res_blocks.{i}.norm.weight": (WIDTH,), f"res_blocks.{i}.norm.bias": (WIDTH,)}
    shapes |= {"output_proj.weight": (D_TARGET, WIDTH), "output_proj.bias": (D_TARGET,)}
    return {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}


@pytest.mark.parametrize("num_layers", [2, 3, 4])
def test_parameters_have_the_published_names_shapes_and_order(num_layers):
    head = VelocityHead(H, D_TARGET, WIDTH, num_layers)
    expected = {name: tuple(p.shape) for name, p in published_state(num_layers - 2).items()}
    assert list({name: tuple(p.shape) for name, p in head.named_parameters()}.items()) == list(expected.items())
    assert list(head.state_dict()) == list(expected)  # no buffers


def test_a_published_checkpoint_loads_and_is_saved_as_it_was():
    state = published_state()
    head = VelocityHead.from_config(SFRConfig.official(width=WIDTH, num_layers=4), H, D_TARGET)
    head.load_state_dict(state)
    assert all(torch.equal(p, state[name]) for name, p in head.state_dict().items())
    x_t, t, h = torch.randn(3, D_TARGET), torch.rand(3), torch.randn(3, H)
    double = {name: p.double() for name, p in state.items()}
    expected = reference.velocity(double, x_t.double(), t.double(), h.double(), 1.0)
    torch.testing.assert_close(head(x_t, t, h).double(), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match="res_blocks"):
        VelocityHead(H, D_TARGET, WIDTH, num_layers=3).load_state_dict(state)


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
        assert (shape.time_scale, shape.hidden_scale) == (config.time_scale, config.hidden_scale)


@pytest.mark.parametrize("t", [torch.rand(5).double(), 0.25, torch.tensor(0.25), torch.zeros(5)])
def test_forward_and_gradients_equal_the_reference(t):
    config = small_config()
    heads = [make_head(H, D_TARGET, config) for _ in range(2)]
    x_t = torch.randn(5, D_TARGET, dtype=torch.float64)
    h = torch.randn(5, H, dtype=torch.float64)
    upstream = torch.randn(5, D_TARGET, dtype=torch.float64)
    h_ours, h_theirs = (h.clone().requires_grad_() for _ in range(2))
    ours = heads[0](x_t, t, h_ours)
    times = torch.as_tensor(t, dtype=torch.float64).expand(5)
    params = dict(heads[1].named_parameters())
    theirs = reference.velocity(params, x_t, times, h_theirs, config.time_scale, config.hidden_scale)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    ours.backward(upstream)
    theirs.backward(upstream)
    torch.testing.assert_close(h_ours.grad, h_theirs.grad, rtol=1e-10, atol=1e-12)
    for name, p in heads[0].named_parameters():
        torch.testing.assert_close(p.grad, params[name].grad, rtol=1e-10, atol=1e-12)


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
    assert head(x_t, 0.5, h.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert head(x_t, 0.5, h).dtype == torch.bfloat16


def test_no_rows_and_expanded_gradients():
    head = make_head(H, D_TARGET, small_config())
    h = torch.randn(4, H, dtype=torch.float64, requires_grad=True)
    x_t = torch.randn(4, D_TARGET, dtype=torch.float64)
    head(x_t, 0.5, h).sum().backward()  # the upstream gradient has stride 0
    assert h.grad.any()
    assert head(x_t[:0], 0.5, h[:0]).shape == (0, D_TARGET)


@pytest.mark.parametrize(
    "error, name, arguments",
    [
        (ValueError, "hidden_size", dict(hidden_size=0)),
        (ValueError, "target_size", dict(target_size=-1)),
        (ValueError, "width", dict(width=2.0)),
        (ValueError, "num_layers", dict(num_layers=1)),
        (ValueError, "time_scale", dict(time_scale=0.0)),
        (ValueError, "hidden_scale", dict(hidden_scale=float("nan"))),
    ],
)
def test_errors_of_the_constructor_name_the_argument(error, name, arguments):
    with pytest.raises(error, match=name):
        VelocityHead(**dict(hidden_size=3, target_size=4, width=5) | arguments)


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("hidden", dict(hidden=torch.zeros(5, H + 1))),
        ("x_t", dict(x_t=torch.zeros(5, D_TARGET - 1))),
        ("x_t", dict(x_t=torch.zeros(4, D_TARGET))),
        ("x_t", dict(x_t=torch.zeros(5, D_TARGET, requires_grad=True))),  # for which it has no gradient
        ("t ", dict(t=torch.zeros(4))),
        ("t ", dict(t=torch.zeros(5, 1))),
    ],
)
def test_errors_of_forward_name_the_argument(name, arguments):
    fitting = dict(x_t=torch.zeros(5, D_TARGET), t=torch.zeros(5), hidden=torch.zeros(5, H))
    with pytest.raises(ValueError, match=name):
        VelocityHead(H, D_TARGET, WIDTH)(**fitting | arguments)


def test_linear_cross_entropy_module_passes_every_option_on():
    g = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(s, generator=g).bfloat16() for s in ((2, 9, 8), (13, 8), (13,)))
    row_weight, labels = torch.rand(2, 9, generator=g), torch.randint(0, 13, (2, 9), generator=g)
    options = dict(shift=True, ignore_index=3, softcap=4.0, logit_scale=0.7, label_smoothing=0.1, z_loss=0.02)
    options |= dict(logits_dtype=torch.float32, chunk_rows=5, return_stats=True)
    changed = dict(reduction="none", backend="torch", **options)
    call = dict(bias=bias, row_weight=row_weight)
    ours, stats = LinearCrossEntropy(**changed)(hidden, weight, labels, **call)
    expected, expected_stats = linear_cross_entropy(hidden, weight, labels, **call, **changed)
    assert torch.equal(ours, expected) and all(map(torch.equal, stats, expected_stats))
    ours = LinearCrossEntropy()(hidden, weight, labels, normalizer=5.0)
    assert torch.equal(ours, linear_cross_entropy(hidden, weight, labels, normalizer=5.0))
    # each option alone changes the result: none is dropped on the way
    plain = LinearCrossEntropy(reduction="none")(hidden, weight, labels)
    for name in ("shift", "ignore_index", "softcap", "logit_scale", "label_smoothing", "z_loss"):
        one = LinearCrossEntropy(reduction="none", **{name: options[name]})
        assert not torch.equal(one(hidden, weight, labels), plain)


@pytest.mark.parametrize("loss", ["flow", "cosine", "cka", "mtp"])
def test_sfr_loss_module_is_the_function(loss):
    case = make_case(small_config(loss=loss))
    module = SFRLoss(case.config, case.head)
    assert {id(p) for p in module.parameters()} == {id(p) for p in (case.head.parameters() if case.head else ())}
    call = dict(seed=5, bias=case.bias, flow_weight=0.3, normalizer=9.0, softcap=3.0, logit_scale=0.5)
    ours = module(case.hidden, case.weight, case.rows, case.targets, **call, return_stats=True)
    arguments = (case.hidden, case.weight, case.head, case.rows, case.targets)
    expected = sfr_loss(*arguments, config=case.config, **call, return_stats=True)
    assert all(map(torch.equal, (*ours[:3], *ours.stats), (*expected[:3], *expected.stats)))
    for name in call:
        fewer = {key: value for key, value in call.items() if key != name} | dict(seed=call["seed"] + (name == "seed"))
        same = torch.equal(module(case.hidden, case.weight, case.rows, case.targets, **fewer).loss, ours.loss)
        assert same == (name == "seed" and loss != "flow"), name  # only the flow has a random source


def test_sfr_loss_module_has_a_head_where_the_loss_has_one():
    with pytest.raises(ValueError, match="cka"):
        SFRLoss(small_config(loss="cka"), make_head(H, D_TARGET, small_config()))
    with pytest.raises(ValueError, match="flow"):
        SFRLoss(small_config(), None)
    with pytest.raises(ValueError, match="hidden_scale"):  # another than the head learned with
        SFRLoss(small_config(hidden_scale=0.5), make_head(H, D_TARGET, small_config()))


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
