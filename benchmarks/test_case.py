"""Main cases through pytest-benchmark, which does the timing: a test for each provider, judged first.

pytest benchmarks -k "flow_loss and torch"
"""

import pytest
import torch

from . import loop
from .case import GRAPH, MAIN, Case

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def tests() -> list:
    found = []
    for bench, case in [(bench, case) for bench, case in loop.selected(DEVICE) if case.worth == MAIN]:
        for name, why in loop.entered(bench, case, DEVICE).items():
            why = why or ("the loop captures graphs" if name.endswith(GRAPH) else None)
            marks = [pytest.mark.skip(reason=why)] if why else []
            found.append(pytest.param(bench, case, name, id=f"{case.name}: {name}", marks=marks))
    return found


@pytest.mark.parametrize("bench, case, provider", tests())
def test_case(bench: str, case: Case, provider: str, benchmark) -> None:
    work = loop.suite_of(bench).make(case, DEVICE)
    run = work.run(provider)
    benchmark.group = case.name
    benchmark.extra_info |= work.judge(provider, run) | dict(sizes=case.sizes)
    work.judged()

    def prepare() -> None:
        work.prepare()

    def once() -> None:
        run()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(once, setup=prepare, rounds=case.rounds, warmup_rounds=1)
