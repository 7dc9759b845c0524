"""hidden_norm="rms": each hidden state is divided by its root mean square before the head, and by nothing else."""

import pytest
import torch
import torch.nn.functional as F
from cases import LOSSES, assert_same, evaluate, lora_of, make_case, make_head, reference_flow, small_config
from tiny import HIDDEN, TARGET, tiny_llama

from sfr_kernels import VelocityHead, attach, reference
from sfr_kernels.kernels import empty_rows
from sfr_kernels.ops.numerics import rms_norm, rms_norm_backward

pytestmark = pytest.mark.usefixtures("one_thread")
EPS = 1e-6
WITH_HEAD = [name for name in LOSSES if "default" in name and "cka" not in name and ":" in name] + ["sfr: mtp"]


def normed(h):
    return F.rms_norm(h, h.shape[-1:], eps=EPS)


def by_hand(name, case):
    """x → the loss by the reference, to whose head h is given normalised, and to the lm_head as it is."""

    def run(x):
        options = dict(bias=x.bias, lora=lora_of(x))
        decoder = dict(weight=x.weight, decoder_options=options)  # of "mtp"
        seen = type(x)(**vars(x) | dict(hidden=normed(x.hidden)))
        flow = reference_flow(case, hidden_norm="none", **decoder)(seen)
        if name.startswith("flow"):
            return flow
        h = x.hidden.flatten(0, 1)[case.rows.rows]
        ce = reference.linear_cross_entropy(h, x.weight, case.rows.labels, **options).sum() / case.rows.num_ce
        return ce + case.config.flow_weight * flow

    return run


@pytest.mark.parametrize("name", WITH_HEAD)
def test_value_and_every_gradient(name):
    """With a hidden state that is zero, where the norm is not differentiable without its ε."""
    case = LOSSES[name].case()
    case.hidden.view(-1, case.hidden.shape[-1])[case.rows.rows[0]] = 0
    exact = evaluate(by_hand(name, case), case.inputs(), upstream=-1.7)
    assert exact["hidden"].isfinite().all() and exact["hidden"].any()
    for backend in ("torch", "reference"):
        assert_same(evaluate(LOSSES[name].ours(case, backend=backend), case.inputs(), upstream=-1.7), exact)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_forward_of_the_head(monkeypatch, backend):
    """Of hidden states and their norms by hand: ε counts only where the mean square is as small."""
    monkeypatch.setenv("SFR_KERNELS_BACKEND", backend)
    torch.manual_seed(0)
    head = make_head(4, 6, small_config())
    plain = make_head(4, 6, small_config(hidden_norm="none"))
    h = torch.tensor([[3.0, -4.0, 0, 0], [1e-3, -1e-3, 1e-3, -1e-3], [0, 0, 0, 0]], dtype=torch.float64)
    root = (25 / 4 + 1e-6) ** 0.5
    by_hand = torch.tensor(
        [[3 / root, -4 / root, 0, 0], [0.5**0.5, -(0.5**0.5)] * 2, [0, 0, 0, 0]], dtype=torch.float64
    )
    x_t, t = torch.randn(3, 6, dtype=torch.float64), torch.rand(3, dtype=torch.float64)
    torch.testing.assert_close(head(x_t, t, h), plain(x_t, t, by_hand), rtol=1e-6, atol=1e-8)
    h.requires_grad_()
    ours, exact = (torch.autograd.grad(v.square().sum(), h)[0] for v in (head(x_t, t, h), plain(x_t, t, normed(h))))
    torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("loss", ["flow", "mse", "cosine"])
def test_the_size_of_hidden_states_changes_nothing_but_their_own_gradient(loss):
    """Far from ε, which is 1e-12 of a mean square of 1e6."""
    name = f"flow: {loss}, default"
    case = LOSSES[name].case()
    case.hidden = 1e3 * case.hidden
    small = evaluate(LOSSES[name].ours(case), case.inputs())
    case.hidden = 7 * case.hidden
    large = evaluate(LOSSES[name].ours(case), case.inputs())
    assert small["hidden"].any()
    assert_same(large | dict(hidden=7 * large["hidden"]), small, rtol=1e-8)


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_of_more_rows_than_a_block(dtype, add):
    """In rows that are padded, and where nothing is added over h itself."""
    n, size = 500, 9001
    given = torch.randn(2, n, size, dtype=torch.float32)
    h, grad = (empty_rows(n, size, dtype, given.device).copy_(x) for x in given)
    exact_h = h.double().requires_grad_()
    (exact,) = torch.autograd.grad(normed(exact_h), exact_h, grad.double())
    ours, rstd = rms_norm(h)
    bound = dict(rtol=2 * torch.finfo(dtype).eps, atol=2e-6)
    torch.testing.assert_close(ours.double(), normed(exact_h).detach(), **bound)
    dh = empty_rows(n, size, dtype, h.device).fill_(3) if add else h
    rms_norm_backward(grad, h, rstd, dh, add=add)
    torch.testing.assert_close(dh.double(), exact + 3 if add else exact, **bound)


def test_a_head_that_is_given_brings_its_norm_and_says_so():
    head = VelocityHead(HIDDEN, TARGET, 24, hidden_norm="none")
    assert "hidden_norm=none" in repr(head) and "hidden_norm=rms" in repr(VelocityHead(HIDDEN, TARGET, 24))
    assert attach(tiny_llama(), head).sfr.config.hidden_norm == "none"


def test_without_the_norm_the_size_counts():
    case = make_case(small_config(hidden_norm="none"))
    small = evaluate(LOSSES["flow: flow, default"].ours(case), case.inputs())
    case.hidden = 7 * case.hidden
    assert abs(evaluate(LOSSES["flow: flow, default"].ours(case), case.inputs())["value"] - small["value"]) > 0.01
