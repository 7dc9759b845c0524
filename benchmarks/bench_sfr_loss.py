"""The joint loss: cross-entropy and flow loss on one gather of the rows, with one gradient of the hidden states."""

from dataclasses import replace

import torch

from .harness.composites import backends, work_of
from .harness.problems import Problem
from .harness.shapes import FP16, FP32, case_of, fit, shape_of, sweep, unscaled
from .harness.work import LIMIT, OURS, PRODUCTS, Case, Goal, Suite, Work
from .peers.cross_entropy import COMPILED, EAGER, reasons
from .peers.flow import WITH_HEAD, joint_peers

OP = "sfr_loss"
APART = "one after the other"  # our two losses in turn


def cases(device: torch.device) -> list[Case]:
    goal = Goal(of_products=1.10, rivals=((APART, 1.0),), backends=("triton", "cuda"))
    found = []
    for frozen in (False, True):
        shape = shape_of("Llama-3-8B", 8192, frozen=frozen)
        found.append(case_of(OP, "Llama-3-8B", shape, goal=goal, quick=not frozen))
        for model in ("Qwen2.5-7B", "Qwen3-0.6B", "Qwen3-32B", "Gemma-3-4B", "SmolLM2-135M"):
            found.append(case_of(OP, model, shape_of(model, 8192, frozen=frozen)))
    found += [case_of(OP, "Qwen3-0.6B", shape_of("Qwen3-0.6B", 4096), dtype) for dtype in (FP16, FP32)]
    shapes = [shape_of("Qwen3-1.7B", 8192, s) for s in (0.1, 0.25, 0.5, 0.75, 1.0)]
    curve = sweep(OP, "supervised", shapes, "Qwen3-1.7B")
    shares, compared = [(512, 0.5), (2048, 0.5)], ("torch", EAGER)
    on_cpu = [
        case
        for frozen in (False, True)
        for case in unscaled(OP, shares, Goal(peer=1.0), frozen=frozen, providers=compared)
    ]
    return fit(found + [replace(case, providers=(*OURS, APART, EAGER)) for case in curve], device, on_cpu)


def providers(device: torch.device) -> dict[str, str | None]:
    alone = {EAGER, COMPILED}
    others = {name if name in alone else name + WITH_HEAD: reason for name, reason in reasons(device).items()}
    return backends(device) | {APART: None} | others


def make(case: Case, device: torch.device) -> Work:
    problem = Problem(OP, case.shape, case.dtype, device, published=True)
    able = [name for name, reason in providers(device).items() if reason is None]
    peers, judged = joint_peers(problem, able)
    backend = "triton" if device.type == "cuda" else "torch"
    apart = {APART: lambda judged: problem.apart(backend, judged=judged)}
    return work_of(problem, peers, ours=apart, judged=judged)


SUITE = Suite(OP, cases, make, providers, ours=(*OURS, APART), bounds=(PRODUCTS, LIMIT))


def test_sfr_loss(race):
    race()
