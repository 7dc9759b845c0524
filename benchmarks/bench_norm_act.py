"""LayerNorm, SiLU and the residual sum, forward; and backward, with the sums over rows for γ, β and the bias."""

from functools import partial

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor

from .harness.leaf_work import Leaf, Numbers, leaf_work, row_cases, suite
from .harness.work import Case, Work
from .peers.cross_entropy import COMPILED, EAGER

FORWARD, BACKWARD = "norm_act", "norm_act_backward"
LIGER = "Liger"
EPS = 1e-5


def eager(y: Tensor, gamma: Tensor, beta: Tensor, residual: Tensor) -> Tensor:
    return F.silu(F.layer_norm(y, y.shape[1:], gamma, beta, EPS)) + residual


def liger(y: Tensor, gamma: Tensor, beta: Tensor, residual: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_layer_norm

    return F.silu(liger_layer_norm(y, gamma, beta, EPS)) + residual


PEERS = {
    EAGER: lambda: eager,
    COMPILED: lambda: torch.compile(eager, dynamic=False),
    LIGER: lambda: liger,
}


def statistics(y: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """μ and ρ (n,)."""
    y = y.to(wide)
    return y.mean(1), y.var(1, correction=0).add(EPS).rsqrt()


def forward(x: Numbers) -> Leaf:
    y, residual = (x.normal(x.n, x.width) for _ in range(2))
    gamma, beta = x.normal(x.width), x.normal(x.width)
    mean, rstd = statistics(y, x.wide)

    def run(function) -> list[Tensor]:
        with torch.no_grad():
            return [function(y, gamma, beta, residual), mean, rstd]  # peers keep their statistics to themselves

    return Leaf(
        lambda k: list(k.norm_act(y, gamma, beta, residual=residual)),
        ("out", "mean", "rstd"),
        3 * y.nbytes,
        y,
        peers={name: lambda make=make: partial(run, make()) for name, make in PEERS.items()},
    )


def backward(x: Numbers) -> Leaf:
    y, dout = (x.normal(x.n, x.width) for _ in range(2))
    gamma, beta = x.normal(x.width), x.normal(x.width)
    mean, rstd = statistics(y, x.wide)
    dy = torch.empty_like(y)

    def peer(make):
        inputs = [t.detach().clone().requires_grad_() for t in (y, gamma, beta)]
        # a graph that is gone through many times must keep its buffers
        with torch._functorch.config.patch(donated_buffer=False):
            out = make()(*inputs, torch.zeros_like(y))

            def run() -> list[Tensor]:
                grads = torch.autograd.grad(out, inputs, dout, retain_graph=True)
                return [*grads, grads[0].sum(0, keepdim=True, dtype=torch.float32)]

            run()  # compiles
        return run

    return Leaf(
        lambda k: list(k.norm_act_backward(dout, y, gamma, beta, mean, rstd, dy=dy)),
        ("dy", "dgamma", "dbeta", "dbias"),
        3 * y.nbytes,
        dout,
        peers={name: partial(peer, make) for name, make in PEERS.items()},
    )


def make(case: Case, device: torch.device) -> Work:
    return leaf_work(forward if case.op == FORWARD else backward, case, device)


SUITE = suite(FORWARD, row_cases(FORWARD, BACKWARD), make, LIGER)


def test_norm_act(race):
    race()
