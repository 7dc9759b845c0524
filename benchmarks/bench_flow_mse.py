"""The matching loss of every row and its gradient, in one read of the prediction and the velocity."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .harness.leaf_work import Leaf, Numbers, leaf_work, row_cases, suite
from .peers.cross_entropy import COMPILED, EAGER

OP = "flow_mse"


def eager(v: Tensor, u: Tensor, coefficient: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of each row, and what backward starts from."""
    loss = F.mse_loss(v, u, reduction="none").float().mean(dim=1)
    return loss, (loss * coefficient).sum()


def leaf(x: Numbers) -> Leaf:
    u, source, coefficient = x.normal(x.n, x.width), x.normal(x.n, x.width), x.normal(x.n).to(x.wide)
    v = source.clone()
    size = x.width * x.dtype.itemsize
    return Leaf(
        lambda k: [*k.flow_mse(v, u, coefficient), v],
        ("loss", "db", "dv"),
        3 * x.n * size,
        v,
        restore=lambda: v.copy_(source),
        peers={
            EAGER: lambda: peer(eager, source, u, coefficient),
            COMPILED: lambda: peer(torch.compile(eager, dynamic=False), source, u, coefficient),
        },
    )


def peer(function, source: Tensor, u: Tensor, coefficient: Tensor):
    v = source.detach().clone().requires_grad_()

    def run() -> list[Tensor]:
        loss, total = function(v, u, coefficient)
        (dv,) = torch.autograd.grad(total, v)
        return [loss, dv.sum(0, dtype=torch.float32), dv]

    return run


SUITE = suite(OP, row_cases(OP), partial(leaf_work, leaf))


def test_flow_mse(race):
    race()
