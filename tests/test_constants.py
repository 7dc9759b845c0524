"""Where a loss has no derivative it says so: a gradient or a tangent that is silently zero trains another model."""

from types import SimpleNamespace

import pytest
import torch
from cases import LossCase, make_case, small_config
from torch.autograd import forward_ad

from sfr_kernels import flow_matching_loss, linear_cross_entropy, sfr_loss

pytestmark = pytest.mark.usefixtures("one_thread")


def entropy(x: SimpleNamespace, case: LossCase, **given):
    return linear_cross_entropy(x.hidden, x.weight, case.labels, bias=x.bias, shift=True, **given)


def row_losses(x, case, **given):
    return entropy(x, case, reduction="none", **given).sum()


def flow(x, case, **given):
    fixed = dict(rows=case.rows, targets=case.targets, seed=1, config=case.config)
    return flow_matching_loss(x.hidden, x.head, **fixed | given)


def joint(x, case, **given):
    fixed = dict(rows=case.rows, targets=case.targets, seed=1, config=case.config, bias=x.bias)
    return sfr_loss(x.hidden, x.weight, x.head, **fixed | given).loss


def velocity(x, case, **given):
    fixed = dict(x_t=torch.ones(13, 6, dtype=torch.float64), t=0.5)
    return x.head(hidden=x.hidden[0], **fixed | given).square().sum()


FIXED = {
    "normalizer": (torch.tensor(3.0), [(entropy, "flow"), (flow, "flow"), (flow, "cka"), (joint, "flow")]),
    "row_weight": (torch.ones(4, 13), [(entropy, "flow"), (row_losses, "flow")]),
    "class_weight": (torch.ones(17), [(entropy, "flow"), (row_losses, "flow")]),
    "flow_weight": (torch.tensor(0.5), [(joint, "flow"), (joint, "cosine"), (joint, "mtp")]),
    "targets": (None, [(flow, "flow"), (flow, "cosine"), (flow, "cka"), (joint, "mse")]),
    "rows.weight": (None, [(flow, "flow"), (flow, "cosine"), (joint, "mtp")]),
    "times": (torch.tensor([0.1, 0.2, 0.3, 0.4]), [(flow, "flow"), (joint, "flow")]),
    "x_t": (torch.ones(13, 6, dtype=torch.float64), [(velocity, "flow")]),
    "t": (torch.ones(13), [(velocity, "flow")]),
}


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("name, value, function, loss", [
    (name, value, function, loss) for name, (value, calls) in FIXED.items() for function, loss in calls
])  # fmt: skip
def test_what_gets_no_gradient_must_not_ask_for_one(monkeypatch, name, value, function, loss, backend):
    monkeypatch.setenv("SFR_KERNELS_BACKEND", backend)
    case = make_case(
        small_config("official" if name in ("times", "normalizer") and loss == "flow" else "default", loss=loss)
    )
    x = case.inputs()
    value = dict(targets=case.targets, **{"rows.weight": case.rows.weight}).get(name, value)

    def run(value):
        given = dict(rows=case.rows.replace(weight=value)) if name == "rows.weight" else {name: value}
        return function(x, case, **given)

    leaf = value.clone().requires_grad_()
    with pytest.raises(ValueError, match=rf"^{name} must not require a gradient"):
        run(leaf)
    with pytest.raises(ValueError, match=rf"^{name} must not require a gradient"):
        torch.func.jvp(run, (value,), (torch.ones_like(value),))
    with torch.no_grad():  # an evaluation
        assert torch.equal(run(leaf), run(value))
    assert run(leaf.detach()).requires_grad


CALLS = {"entropy": (entropy, "flow"), "row losses": (row_losses, "flow"), "flow": (flow, "flow"), "mse": (flow, "mse")}
CALLS |= {"cosine": (flow, "cosine"), "joint": (joint, "flow"), "mtp": (joint, "mtp"), "head": (velocity, "flow")}


def directions(name):
    function, loss = CALLS[name]
    case = make_case(small_config(loss=loss))
    x = case.inputs()
    hidden, along = x.hidden.detach(), torch.randn(x.hidden.shape, dtype=torch.float64)
    return x, hidden, along, lambda h: function(SimpleNamespace(**vars(x) | dict(hidden=h)), case)


@pytest.mark.parametrize("name", CALLS)
def test_a_forward_derivative_is_refused(name):
    _, hidden, along, run = directions(name)
    ways = {
        "jvp": lambda: torch.func.jvp(run, (hidden,), (along,)),
        "jacfwd": lambda: torch.func.jacfwd(run)(hidden),
        "hessian": lambda: torch.func.hessian(run)(hidden),
        "outer": lambda: torch.func.jvp(
            lambda h: torch.func.jvp(lambda q: run(h) + q.sum(), (hidden,), (along,))[1], (hidden,), (along,)
        ),
        "under vmap": lambda: torch.func.jvp(torch.func.vmap(run), (hidden[None],), (along[None],)),
    }
    for way in ways.values():
        with pytest.raises(NotImplementedError, match="forward-mode"):
            way()
    for h in (hidden, hidden.clone().requires_grad_()):
        for enabled in (True, False):
            with forward_ad.dual_level(), torch.set_grad_enabled(enabled):
                dual = forward_ad.make_dual(h, along)
                with pytest.raises(NotImplementedError, match="forward-mode"):
                    run(dual)


def test_a_forward_derivative_in_a_parameter_is_refused():
    x, hidden, _, _ = directions("head")
    bias = x.head.output_proj.bias.detach()
    fixed = torch.ones(13, 6, dtype=torch.float64), 0.5, hidden[0]
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda b: torch.func.functional_call(x.head, {"output_proj.bias": b}, fixed), (bias,), (bias,))


@pytest.mark.parametrize("name", CALLS)
def test_a_constant_in_the_forward_derivative_of_something_else_is_one(name):
    _, hidden, _, run = directions(name)
    value, tangent = torch.func.jvp(lambda s: s**2 * run(hidden), (torch.tensor(3.0),), (torch.tensor(1.0),))
    assert torch.equal(value, 9 * run(hidden)) and torch.equal(tangent, 6 * run(hidden))


@pytest.mark.parametrize("name", CALLS)
def test_the_reference_has_forward_derivatives_and_those_of_functional_transforms(monkeypatch, name):
    _, hidden, along, run = directions(name)
    leaf = hidden.clone().requires_grad_()
    (grad,) = torch.autograd.grad(run(leaf), leaf)
    monkeypatch.setenv("SFR_KERNELS_BACKEND", "reference")
    torch.testing.assert_close(torch.func.jvp(run, (hidden,), (along,))[1], (grad * along).sum())
    torch.testing.assert_close(torch.func.grad(run)(hidden), grad)


@pytest.mark.parametrize("fullgraph", [True, False])
def test_a_compiled_forward_derivative_is_refused(fullgraph):
    torch._dynamo.reset()
    _, hidden, along, run = directions("flow")
    compiled = torch.compile(lambda h: torch.func.jvp(run, (h,), (along,))[1], backend="aot_eager", fullgraph=fullgraph)
    error = torch._dynamo.exc.Unsupported if fullgraph else NotImplementedError
    with pytest.raises(error):
        compiled(hidden)
