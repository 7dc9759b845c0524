"""The flow-matching loss and its gradients, on supervised rows alone; launched, and in a CUDA graph."""

from dataclasses import replace

import torch

from .harness.composites import backends, work_of
from .harness.problems import Problem, Shape
from .harness.shapes import FP16, FP32, case_of, fit, shape_of, sweep, unscaled
from .harness.work import GRAPH, LIMIT, PRODUCTS, Case, Goal, Suite, Work
from .peers.cross_entropy import COMPILED, EAGER, absent
from .peers.flow import flow_peers

OP = "flow_loss"
SMALL = 1024  # tokens, in two sequences: launching is what it costs


def cases(device: torch.device) -> list[Case]:
    def shape(hidden_size: int, tokens: int, supervised: float = 0.75, **options) -> Shape:
        return shape_of((hidden_size, 0), tokens, supervised, **options)

    found = [
        case_of(OP, None, shape(4096, 8192), quick=True),
        case_of(OP, None, shape(4096, SMALL, length=512), goal=Goal(ms=0.25, backends=("cuda",)), quick=True),
        case_of(OP, None, shape(4096, 8192, 1.0)),
        case_of(OP, None, shape(5120, 16384)),
        case_of(OP, None, shape(1024, 8192)),
        case_of(OP, None, shape(576, 8192)),
        *(case_of(OP, None, shape(4096, SMALL, length=512), dtype) for dtype in (FP16, FP32)),
    ]
    curves = [
        *sweep(OP, "supervised", [shape(4096, 8192, s) for s in (0.1, 0.25, 0.5, 0.75, 1.0)]),
        *sweep(OP, "tokens", [shape(4096, 1024 * 2**i) for i in range(6)]),
        *sweep(OP, "hidden_size", [shape(h, 8192) for h in (1024, 2048, 4096, 8192)]),
    ]
    shares = [(512, 0.5), (512, 1.0), (2048, 0.5), (2048, 1.0)]
    on_cpu = unscaled(OP, shares, Goal(peer=1.0), providers=("torch", EAGER))
    return fit(found + [replace(case, providers=("triton", "cuda", "torch", EAGER)) for case in curves], device, on_cpu)


def providers(device: torch.device) -> dict[str, str | None]:
    ours = backends(device)
    launched = ours | {EAGER: None, COMPILED: absent(COMPILED, device)}
    no_graph = None if device.type == "cuda" else "a CUDA graph needs a GPU"
    return launched | {f"{name}{GRAPH}": ours[name] or no_graph for name in ("triton", "cuda")}


def make(case: Case, device: torch.device) -> Work:
    problem = Problem("flow_matching_loss", case.shape, case.dtype, device, published=True)
    peers, judged = flow_peers(problem)
    return work_of(problem, peers, judged=judged)


SUITE = Suite(OP, cases, make, providers, bounds=(PRODUCTS, LIMIT))


def test_flow_loss(race):
    race()
