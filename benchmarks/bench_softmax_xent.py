"""Cross-entropy of rows of logits, and its gradient written over them."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .harness.leaf_work import OF_COPY, Leaf, Numbers, leaf_case, leaf_work, suite
from .harness.shapes import FP16, FP32
from .harness.work import Case, Goal, Run
from .peers.cross_entropy import COMPILED, EAGER

OP = "softmax_xent"
LIGER, QUACK = "Liger", "quack"


def eager(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), labels, reduction="sum")


def liger(logits: Tensor, labels: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_cross_entropy

    return liger_cross_entropy(logits, labels, reduction="sum")


def quack(logits: Tensor, labels: Tensor) -> Tensor:
    from quack.cross_entropy import cross_entropy

    return cross_entropy(logits, labels, reduction="sum", inplace_backward=True)  # as ours


PEERS = {
    EAGER: lambda: eager,
    COMPILED: lambda: torch.compile(eager, dynamic=False),
    LIGER: lambda: liger,
    QUACK: lambda: quack,
}


def leaf(x: Numbers) -> Leaf:
    source, labels = x.normal(x.n, x.width), x.integers(x.width, torch.int64)
    logits = source.clone()

    def peer(make) -> Run:
        function = make()

        def run() -> list[Tensor]:
            given = logits.detach().requires_grad_()  # the same memory: Liger writes over it
            loss = function(given, labels)
            return [loss, *torch.autograd.grad(loss, given)]

        return run

    return Leaf(
        lambda k: [k.softmax_xent(logits, labels)[0], logits],
        ("loss", "dlogits"),
        2 * logits.nbytes,
        logits,
        restore=lambda: logits.copy_(source),
        peers={name: partial(peer, make) for name, make in PEERS.items()},
    )


def cases(device: torch.device) -> list[Case]:
    def goal(**wanted: float) -> Goal:
        return Goal(backends=("cuda",), **wanted)

    found = [
        leaf_case(OP, 4096, 128256, goal(ms=0.85), device, quick=True),
        leaf_case(OP, 4096, 32000, goal(of_limit=1 / OF_COPY), device),
        leaf_case(OP, 1024, 256000, goal(of_limit=1 / OF_COPY), device),
        leaf_case(OP, 64, 32000, Goal(), device),
    ]
    if device.type == "cuda":
        found += [leaf_case(OP, 4096, 32000, Goal(), device, dtype) for dtype in (FP16, FP32)]
    return found


SUITE = suite(OP, cases, partial(leaf_work, leaf), LIGER, QUACK)


def test_softmax_xent(race):
    race()
