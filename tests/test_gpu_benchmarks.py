"""The benchmarks on a GPU: times that can be trusted, every op and peer at small sizes, and a GPU that dies."""

from collections import deque
from dataclasses import replace

import pytest
import torch
from test_bench_training_step import LORA

from benchmarks import loop
from benchmarks.bench_losses import NOT_IN_CURVES
from benchmarks.case import LIMIT, Case, Suite, Work
from benchmarks.jobs import Ended, Job, run
from benchmarks.limit import Copy
from benchmarks.race import race

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
CUDA = torch.device("cuda")
LOSS = dict(batch=2, length=128, hidden_size=128, target_size=64, width=64)
SMALL = {  # shapes
    "benchmarks.bench_kernels": (66, 1032), "benchmarks.bench_losses": None, "benchmarks.bench_training_step": LORA,
    "check.experiments": (66, 1024),
}  # fmt: skip


def raced(runs: dict) -> dict[str, dict]:
    """The result of each; what they compute is nothing to judge."""
    suite = Suite(lambda _: [], lambda *_: Work(run=runs.get, judge=lambda *_: {}), lambda _: dict.fromkeys(runs))
    case = Case("planted", "known", {}, torch.float32, seconds=1.0)
    return {line["provider"]: line for line in race(suite, case, CUDA, dict.fromkeys(runs))}


@pytest.mark.timing
def test_a_copy_of_known_bytes_has_the_rate_that_many_in_a_row_have():
    copy = Copy(2**31, CUDA)
    found = raced({"ours": lambda: copy() or []})["ours"]
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(20):
        copy()
    end.record()
    torch.cuda.synchronize()
    assert found["clock"] == "CUDA events" and found["ms"] == pytest.approx(begin.elapsed_time(end) / 20, rel=0.1)


@pytest.mark.timing
def test_a_kernel_that_waits_takes_as_long_as_it_waits():
    times = {"short": 20_000_000, "long": 60_000_000}
    found = raced({name: lambda cycles=cycles: torch.cuda._sleep(cycles) or [] for name, cycles in times.items()})
    assert found["long"]["ms"] / found["short"]["ms"] == pytest.approx(3.0, rel=0.1)


OPS = {(case.op, bench): case for bench in SMALL for case in reversed(loop.suite_of(bench).cases(CUDA))}


@pytest.mark.parametrize("case, bench", [pytest.param(case, bench, id=op) for (op, bench), case in OPS.items()])
def test_every_op_of_every_provider(case, bench, device=CUDA):
    """All but what compiles with torch, which takes long."""
    suite = loop.suite_of(bench)
    shape = SMALL[bench] or replace(case.shape, **LOSS, vocab=512 * (case.op != "flow_loss"))
    small = replace(case, shape=shape, seconds=0.0, rounds=2)
    providers = {name: why for name, why in loop.entered(bench, small, device).items() if name not in NOT_IN_CURVES}
    lines = race(suite, small, device, providers)
    assert not [line for line in lines if line["line"] == "failed"]
    able = {name for name, why in providers.items() if why is None}
    assert {line["provider"] for line in lines if line["line"] == "result"} >= able | ({LIMIT} & {*suite.bounds})


def _die(tell) -> None:
    raced({"dead": lambda: [torch.zeros(1, device=CUDA)[torch.tensor([7], device=CUDA)].sum().item()]})


def test_a_gpu_that_dies_is_lost_to_its_process_alone():
    ((_, ended),) = run(deque([Job("dead", _die)]))
    assert isinstance(ended, Ended) and "DeadGPUError" in ended.reason and "the GPU answered nothing" in ended.reason
    assert raced({"nothing": list})["nothing"]["line"] == "result"
