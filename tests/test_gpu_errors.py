"""Errors of every op, dtype and backend against float64, launched and in a CUDA graph, and the same bits in every run;
without a GPU, tiny ones."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from benchmarks.oracle import judge, verdict
from benchmarks.problem import OPS, Problem, Shape, check_replay
from benchmarks.timing import Graph
from sfr_kernels.kernels.backend import unavailable

pytestmark = pytest.mark.gpu
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
BACKENDS = [b for b in ("triton", "cuda", "torch") if unavailable(b, DEVICE) is None]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Nothing here is a multiple of a block; four layers, so that a block follows a block.
ODD = Shape(3, 61, 72, 0.7, vocab=331, target_size=34, width=50, num_layers=4)
FLOWS = Shape(2, 512, 4096, 0.75), Shape(4, 2048, 4096, 0.75), Shape(8, 2048, 5120, 0.75)
SMALL, DECODER = Shape(2, 1024, 2048, 0.5, vocab=32768), Shape(4, 2048, 4096, 0.5, vocab=128256)
TINY = Shape(2, 24, 20, 0.7, vocab=37, target_size=10, width=12, num_layers=3)
FLOW, *DECODERS = OPS
# Op, shape, dtype, draws. A group shares a process in `make gpu-check`: no two large problems are on the GPU at once.
GROUPS = {
    "large": [(op, replace(DECODER, frozen=frozen), BF16, 2) for op in DECODERS for frozen in (False, True)],
    "small": [(op, SMALL, dtype, 3) for op in DECODERS for dtype in (FP16, FP32)],
    "flow": [(FLOW, shape, BF16, 3) for shape in FLOWS] + [(FLOW, FLOWS[0], dtype, 3) for dtype in (FP16, FP32)],
    "odd": [(op, ODD, dtype, 6) for op in OPS for dtype in (BF16, FP16, FP32)],
} if ON_GPU else {"tiny": [(op, TINY, dtype, 6) for op in OPS for dtype in (BF16, FP32)]}  # fmt: skip


def cases():
    for group, problems in GROUPS.items():
        for op, s, dtype, draws in problems:
            vocab = "" if op == FLOW else f" V{s.vocab}{' frozen' if s.frozen else ''}"
            name = f"{group}, {op}, B{s.batch} L{s.length} H{s.hidden_size}{vocab}, {str(dtype).split('.')[1]}"
            for backend in BACKENDS:
                yield pytest.param(op, s, dtype, draws, backend, id=f"{name}, {backend}")


@pytest.fixture
def room(request):
    if request.node.callspec.params["shape"].vocab > 100_000:
        request.getfixturevalue("large")


@pytest.mark.usefixtures("room")
@pytest.mark.parametrize("op, shape, dtype, draws, backend", [*cases()])
def test_errors(op, shape, dtype, draws, backend, record_property):
    if ON_GPU:
        torch.cuda.empty_cache()  # other processes need what the last problem has left
    problem = Problem(op, shape, dtype, DEVICE)
    found = verdict(judge(problem, backend, draws))
    for name, value in found.items():
        record_property(name, value)
    if shape.vocab > 100_000:
        assert all(e["eager"] is not None for e in found["errors"].values()), "eager torch ran out of memory"
    pairs = zip(["loss", *problem.leaves], problem.judged(backend), problem.judged(backend), strict=True)
    assert not (changed := [name for name, a, b in pairs if not torch.equal(a, b)]), f"from run to run differ {changed}"
    if ON_GPU and op != "linear_cross_entropy":  # which counts its labels, and no graph can wait for the CPU
        run = partial(problem.run, backend)
        check_replay(problem, Graph(run), run)
