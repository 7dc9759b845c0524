"""A linear layer's cross-entropy and its gradients, without logits for tokens that carry no loss."""

from dataclasses import replace

import torch

from .harness.composites import SMALL_FACTOR, backends, work_of
from .harness.errors import FACTOR
from .harness.problems import Problem
from .harness.shapes import BF16, FP16, FP32, MODELS, case_of, fit, shape_of, sweep, unscaled
from .harness.work import LIMIT, PRODUCTS, Case, Goal, Run, Suite, Work
from .peers import cross_entropy as ways

OP = "linear_cross_entropy"
LITTLE = "little memory"
# By model, tokens, share supervised and whether frozen, the most times of the products alone and the least of a peer;
# and how many lm_heads of memory beyond the returned gradients, by whether it is frozen.
GOALS = {
    ("Llama-3-8B", 8192, 0.5, False): (1.09, 1.9),
    ("Llama-3-8B", 8192, 0.5, True): (1.10, 1.9),
    ("Llama-3-8B", 8192, 1.0, False): (1.10, 1.0),
    ("Llama-3-8B", 8192, 1.0, True): (1.10, None),
    ("Qwen3-1.7B", 4096, 0.5, False): (1.12, 1.9),
    ("Qwen3-1.7B", 4096, 0.5, True): (1.15, None),
    (None, 16384, 0.5, False): (1.20, None),
    (None, 16384, 0.5, True): (1.15, None),
}
WEIGHTS = {False: 2.5, True: 0.5}
WITHOUT_COMPILE = ("triton", "cuda", "torch", "eager", "Liger", "cut-cross-entropy", "quack")


def cases(device: torch.device) -> list[Case]:
    found = []
    for frozen in (False, True):
        found.append(_case("Llama-3-8B", shape_of("Llama-3-8B", 8192, frozen=frozen), quick=True))
        for model in [name for name in MODELS if name != "Llama-3-8B"]:
            found.append(_case(model, shape_of(model, 8192, frozen=frozen)))
        found.append(_case("Llama-3-8B", shape_of("Llama-3-8B", 8192, 1.0, frozen=frozen)))
        found.append(_case("Qwen3-1.7B", shape_of("Qwen3-1.7B", 4096, frozen=frozen)))
        found.append(_case(None, shape_of((2048, 248320), 16384, frozen=frozen)))
    for dtype in (FP16, FP32):
        found.append(_case("Qwen3-0.6B", shape_of("Qwen3-0.6B", 8192), dtype))
    shape = shape_of("Llama-3-8B", 8192)
    goal = Goal(of_products=1.25, weights=0.3)
    found.append(case_of(OP, "Llama-3-8B", shape, note=LITTLE, goal=goal, providers=("triton", "cuda", "torch")))
    # at the model's own sizes, and at sizes that are no model's
    model, quick = "Qwen3-1.7B", dict(quick=True)
    curves = [
        *sweep(OP, "supervised", [shape_of(model, 8192, s) for s in (0.25, 0.5, 0.75, 1.0)], model, **quick),
        *sweep(OP, "supervised", [shape_of(model, 8192, 0.1)], model),
        *sweep(OP, "tokens", [shape_of(model, 1024 * n) for n in (2, 4, 8, 16)], model, **quick),
        *sweep(OP, "tokens", [shape_of(model, 1024 * n) for n in (1, 32)], model),
        *sweep(OP, "vocab", [shape_of((2048, v), 8192) for v in (32000, 64000, 128256, 262144)]),
        *sweep(OP, "hidden_size", [shape_of((h, 128256), 8192) for h in (1024, 2048, 4096, 8192)]),
    ]
    on_cpu = []
    for frozen in (False, True):
        common = dict(frozen=frozen, providers=("torch", ways.EAGER, ways.EAGER_ROWS))
        on_cpu += unscaled(OP, [(512, 0.5), (2048, 0.5)], Goal(of_products=1.12, peer=1.0), **common)
        on_cpu += unscaled(OP, [(512, 0.1), (512, 1.0)], Goal(rivals=((ways.EAGER, 1.0),)), **common)
    return fit(found + [replace(case, providers=WITHOUT_COMPILE) for case in curves], device, on_cpu)


def _case(model: str | None, shape, dtype: torch.dtype = BF16, *, quick: bool = False) -> Case:
    key = (model, shape.batch * shape.length, shape.supervised, shape.frozen)
    of_products, peer = GOALS.get(key, (None, None))
    goal = Goal(of_products=of_products, peer=peer, weights=WEIGHTS[shape.frozen] if dtype == BF16 else None)
    return case_of(OP, model, shape, dtype, goal=goal, quick=quick)


def providers(device: torch.device) -> dict[str, str | None]:
    waits = None if device.type == "cpu" else "on a GPU it waits for the number of rows"
    return backends(device) | ways.reasons(device) | {ways.EAGER_ROWS: waits}


def make(case: Case, device: torch.device) -> Work:
    small = case.sizes["note"] == LITTLE
    problem = Problem(OP, case.shape, case.dtype, device, small=small)
    names = [n for n in (*ways.reasons(device), ways.EAGER_ROWS) if providers(device)[n] is None]
    peers = {name: _peer(problem, name) for name in names}
    return work_of(problem, peers, factor=SMALL_FACTOR if small else FACTOR)


def _peer(problem: Problem, name: str) -> Run:
    loss_of, leaves = ways.loss_of(name), list(problem.leaves.values())
    labels = problem.labels.flatten()

    def run():
        loss = loss_of(problem.hidden.flatten(0, 1), problem.weight, labels)
        return [loss, *torch.autograd.grad(loss, leaves)]

    return run


SUITE = Suite(OP, cases, make, providers, bounds=(PRODUCTS, LIMIT))


def test_linear_cross_entropy(race):
    race()
