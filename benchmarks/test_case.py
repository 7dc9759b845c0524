"""Main cases through pytest-benchmark, which does the timing: a test for each provider, judged first.

pytest benchmarks -k "flow_loss and torch"
"""

import functools

import pytest
import torch

from . import loop
from .case import MAIN, Case, Work

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PAIRS = [(bench, case) for bench, case in loop.selected(DEVICE) if case.worth == MAIN]


@functools.lru_cache(maxsize=1)
def work_of(number: int) -> Work:
    """Shared by the providers of a case."""
    bench, case = PAIRS[number]
    return loop.suite_of(bench).make(case, DEVICE)


def tests() -> list:
    found = []
    for number, (bench, case) in enumerate(PAIRS):
        for name, reason in loop.entered(bench, case, DEVICE).items():
            marks = [pytest.mark.skip(reason=reason)] if reason else []
            found.append(pytest.param(number, case, name, id=f"{case.name}: {name}".replace("/", "_"), marks=marks))
    return found


@pytest.mark.parametrize("number, case, provider", tests())
def test_case(number: int, case: Case, provider: str, benchmark) -> None:
    work = work_of(number)
    run = work.run(provider)
    benchmark.group = case.name
    benchmark.extra_info |= work.judge(provider, run) | dict(sizes=case.sizes)

    def once() -> None:
        run()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(once, setup=work.prepare, rounds=case.rounds, warmup_rounds=1)
