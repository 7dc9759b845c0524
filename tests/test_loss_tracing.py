"""What traces, intercepts or differentiates a loss: compilers, modes, opcheck, a second and a forward derivative.

It gets the same numbers, or an error: a derivative that is silently zero trains another model.
"""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo.testing
import torch._inductor.config
from cases import LEAVES, LOSSES, LossCase, assert_same, entropy_output, evaluate, leaves_of, losses
from marks import long, long_but
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = pytest.mark.usefixtures("one_thread")
HEAD = ("the head", "the head, of columns")
# losses with an operator of their own, and the operator of the head alone
OPERATORS = ["cross-entropy", "row losses", "cross-entropy of rows", *(n for n in LOSSES if "flow, " in n)]
OPERATORS += ["flow: mse, default", "flow: cosine, default", HEAD[1]]
OPERATORS += ["cross-entropy, lora", "row losses of rows, lora"]
MAIN = pytest.mark.parametrize("name", [*OPERATORS, "sfr: mtp", "sfr: mtp, lora", HEAD[0]])


def function_of(name: str, **options) -> tuple[SimpleNamespace, Callable]:
    """Leaves, and a scalar function of them."""
    case = LOSSES.get(name, LOSSES["flow: flow, default"]).case()

    def velocity(x):
        h = x.hidden[0] if name == HEAD[0] else x.hidden[0].T.contiguous().T
        return x.head(torch.ones(13, 6, dtype=torch.float64), 0.5, h).square().sum()

    return case.inputs(), velocity if name in HEAD else LOSSES[name].ours(case, **options)


class Calls(TorchDispatchMode):
    """The library's operators that are dispatched while it is on, with their arguments."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        if operator.namespace == "sfr_kernels":
            self.found.append((operator, arguments))
        return operator(*arguments, **(options or {}))


def check_operators(name: str, trained: bool, frozen: tuple = (), **options) -> None:
    """opcheck of every operator that is called in forward and, kept for another, in backward, with its arguments."""

    def leaf(t, wanted):  # with the strides it has, and no history
        if isinstance(t, list | tuple):
            return [leaf(u, wanted) for u in t]
        return t.detach().requires_grad_(wanted and t.requires_grad) if isinstance(t, torch.Tensor) else t

    x, function = function_of(name, **options)
    for leaf_name, p in leaves_of(x).items():
        p.requires_grad_(trained and leaf_name not in frozen)
    with Calls() as forward:
        value = function(x)
    with Calls() as backward:
        if trained:
            value.backward(retain_graph=True)
    assert forward.found  # backward may have none of its own
    for calls, wanted in ((forward, trained), (backward, False)):
        for operator, arguments in calls.found:
            torch.library.opcheck(operator, leaf(arguments, wanted))


UNTRAINED = ("cross-entropy", "flow: flow, default", "sfr: flow, default", HEAD[1])


@pytest.mark.parametrize("name, trained", [*((n, True) for n in OPERATORS), *((n, False) for n in UNTRAINED)])
def test_opcheck(name, trained):
    check_operators(name, trained)


@losses("sfr: flow", "sfr: mse, default", without=["lora"])  # where they take another operator
def test_opcheck_with_the_norms_of_both_gradients(name):
    check_operators(name, True, return_norms=True)


UNCOUNTED = [("cross-entropy", ()), ("row losses", ()), ("cross-entropy, lora", ()), ("cross-entropy, lora", LEAVES)]


@pytest.mark.parametrize("name, frozen", UNCOUNTED)
def test_opcheck_of_labels_that_are_not_counted(name, frozen, monkeypatch):
    """A traced graph cannot count the supervised rows: the operator finds them."""
    real, traced = torch.library.opcheck, []
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        patch.setattr(torch.library, "opcheck", lambda *call: traced.append(call))
        check_operators(name, True, frozen)
    for operator, arguments in traced:
        real(operator, arguments)


@MAIN
def test_a_mode_sees_the_operator_and_its_bits_are_those_of_a_plain_call(name):
    x, function = function_of(name)
    plain = evaluate(function, x)
    with Calls() as calls:
        watched = evaluate(function, x)
    assert calls.found and all(torch.equal(plain[key], watched[key]) for key in plain)


@MAIN
def test_recomputing_in_backward_gives_the_same_gradients(name):
    x, function = function_of(name)

    def recomputed(x):
        of_hidden = lambda h: function(SimpleNamespace(**vars(x) | dict(hidden=h)))  # noqa: E731
        return torch.utils.checkpoint.checkpoint(of_hidden, x.hidden, use_reentrant=False)

    assert_same(evaluate(recomputed, x), evaluate(function, x))


# ---------------------------------------------------------------------------------------------------------------------
# torch.compile


STATS = dict(chunk_rows=5, return_stats=True)
PLAIN = ("cross-entropy", *(f"flow: {kind}, default" for kind in ("flow", "mse", "cosine", "cka")))
PLAIN += ("flow: flow, official", "sfr: flow, default", "sfr: mtp", "cross-entropy, lora", "sfr: mtp, lora")
# each kind of loss, statistics, norms and adapters in one of them
SHORT = ("cross-entropy", "flow: flow, default", "flow: cka, default", "cross-entropy of rows", "row losses")
SHORT += ("sfr: flow, official, lora", "sfr: mtp, lora", "sfr: mse, default")
COMPILED = {name: {} for name in PLAIN} | {
    "cross-entropy of rows": STATS | dict(label_smoothing=0.1),
    "row losses": STATS | dict(softcap=3.0),
    "sfr: flow, official": STATS,
    "row losses of rows, lora": STATS,
    "sfr: flow, official, lora": {},
    "sfr: mse, default": dict(return_norms=True),
}


def all_it_returns(name: str, x: SimpleNamespace, case: LossCase, seed: torch.Tensor) -> torch.Tensor:
    """One number of the loss and of the statistics."""
    seeded = {} if LOSSES[name].output is entropy_output else dict(seed=seed)
    out = LOSSES[name].output(case, x, **case.options, **COMPILED[name], **seeded)
    if isinstance(out, torch.Tensor):
        return out
    if (norms := getattr(out, "norms", None)) is not None:
        return out.loss.square() + norms[0] + norms[1] / 3
    stats = getattr(out, "stats", out[-1])
    sums = () if stats is None else stats
    return out[0].square().sum() + sum((s * (i + 1)).sum() for i, s in enumerate(sums)) / 100


@pytest.mark.parametrize("name", long_but(COMPILED, *SHORT))
def test_compiles_whole_with_dynamic_shapes(name):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(all_it_returns, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (13, 17):
        case, seed = LOSSES[name].case(length=length), torch.tensor([length])
        both = (compiled, all_it_returns)
        assert_same(*(evaluate(lambda x, f=f, c=case, s=seed: f(name, x, c, s), case.inputs()) for f in both))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, "recompiled for another length"


def losses_of_a_step(x: SimpleNamespace, case: LossCase, step: int, value: float) -> torch.Tensor:
    """Every number that may change from one step of training to the next."""
    flow = LOSSES["flow: flow, default"].ours(case, seed=step, normalizer=value + 1)
    joint = LOSSES["sfr: flow, default"].ours(case, seed=step, normalizer=value + 1, flow_weight=value)
    return flow(x) + joint(x) + LOSSES["cross-entropy"].ours(case, shift=1, normalizer=value)(x)


@pytest.mark.parametrize("name", ["flow: flow, default", *long("flow: cosine, default", "flow: cka, default")])
def test_the_numbers_of_a_step_are_in_no_graph(name):
    """Else every step has one of its own, until dynamo has had enough of them."""
    torch._dynamo.reset()
    case = LOSSES[name].case()
    x = case.inputs()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled, graphs = torch.compile(losses_of_a_step, backend=counter, fullgraph=True), []
    for step in range(2, 7):
        both = [evaluate(lambda x, f=f, s=step: f(x, case, s, 0.1 * s), x) for f in (compiled, losses_of_a_step)]
        assert_same(*both)
        graphs.append(counter.frame_count)
    assert graphs == [1, *[graphs[1]] * 4]


@pytest.mark.parametrize("name", ["sfr: flow, default", *long("cross-entropy of rows", "sfr: flow, default, lora")])
def test_inductor_gives_the_gradient_of_a_transposed_weight(name):
    """A fake that kept its strides would let inductor write where nothing is. And from the second one on a seed is a
    symbol, for which inductor has 64 bits and no more."""
    torch._dynamo.reset()
    case, seeded = LOSSES[name].case(), LOSSES[name].output is not entropy_output
    x, seeds = case.inputs(torch.float32), (3, 4, -7, 2**62 + 12345, 2**63 - 1) if seeded else (3,)
    transposed = SimpleNamespace(**vars(x) | dict(weight=x.weight.detach().T.contiguous().T.requires_grad_()))

    def loss(x, seed):
        return LOSSES[name].ours(case, **dict(seed=seed) if seeded else {})(x)

    compiled = torch.compile(loss, fullgraph=True, backend="inductor")
    for seed in seeds:
        wanted = evaluate(lambda x, seed=seed: loss(x, seed), x)
        with torch._inductor.config.patch(force_disable_caches=True):  # which hold what another fake was compiled to
            found = evaluate(lambda x, seed=seed: compiled(x, seed), transposed)
        for leaf in ("value", "hidden", "weight"):
            torch.testing.assert_close(found[leaf], wanted[leaf], msg=lambda m, leaf=leaf: f"{leaf}: {m}")


# ---------------------------------------------------------------------------------------------------------------------
# Derivatives that a backward by hand does not have


@losses(without=["cka"])  # which is under autograd
def test_a_second_derivative_is_refused(name):
    """To autograd the gradients are constants, whether or not the upstream gradient is one: better an error."""
    case = LOSSES[name].case()
    x, scale = case.inputs(), torch.ones((), dtype=torch.float64, requires_grad=True)
    for factor in (1, scale):
        (grad,) = torch.autograd.grad(factor * LOSSES[name].ours(case)(x), x.hidden, create_graph=True)
        with pytest.raises(RuntimeError, match="first derivatives only"):
            grad.square().sum().backward()


def directions(name):
    x, function = function_of(name)
    hidden, along = x.hidden.detach(), torch.randn(x.hidden.shape, dtype=torch.float64)
    return x, hidden, along, lambda h: function(SimpleNamespace(**vars(x) | dict(hidden=h)))


@MAIN
def test_a_forward_derivative_is_refused(name):
    _, hidden, along, run = directions(name)
    at = (hidden,), (along,)
    ways = {
        "jvp": lambda: torch.func.jvp(run, *at),
        "jacfwd": lambda: torch.func.jacfwd(run)(hidden),
        "hessian": lambda: torch.func.hessian(run)(hidden),
        "outer": lambda: torch.func.jvp(lambda h: torch.func.jvp(lambda q: run(h) + q.sum(), *at)[1], *at),
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
    x, hidden, _, _ = directions(HEAD[0])
    bias = x.head.output_proj.bias.detach()
    fixed = torch.ones(13, 6, dtype=torch.float64), 0.5, hidden[0]
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda b: torch.func.functional_call(x.head, {"output_proj.bias": b}, fixed), (bias,), (bias,))


@MAIN
def test_a_constant_in_the_forward_derivative_of_something_else_is_one(name):
    _, hidden, _, run = directions(name)
    value, tangent = torch.func.jvp(lambda s: s**2 * run(hidden), (torch.tensor(3.0),), (torch.tensor(1.0),))
    assert torch.equal(value, 9 * run(hidden)) and torch.equal(tangent, 6 * run(hidden))


@MAIN
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
    _, hidden, along, run = directions("flow: flow, default")
    compiled = torch.compile(lambda h: torch.func.jvp(run, (h,), (along,))[1], backend="aot_eager", fullgraph=fullgraph)
    error = torch._dynamo.exc.Unsupported if fullgraph else NotImplementedError
    with pytest.raises(error):
        compiled(hidden)
