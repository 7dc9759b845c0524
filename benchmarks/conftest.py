"""Makes a test of every case and provider of `bench_*.py`, measured as `race.py` says.

    pytest benchmarks                          the five-minute selection, with pytest-benchmark's own table and options
    pytest benchmarks/bench_softmax_xent.py --sfr-full
    python -m sfr_kernels bench                the same, with a result file, a table, and a report

The providers of a case take turns, so their race is run at the first of its tests; each test then hands its own samples
to pytest-benchmark.
"""

import gc
import os
import re
from pathlib import Path

import pytest
import torch

from .harness.race import DeadGPUError
from .harness.session import Session, entered_in
from .harness.work import GRAPH

SESSION = pytest.StashKey[Session]()


def pytest_addoption(parser):
    add = parser.getgroup("sfr_kernels").addoption
    add("--sfr-device", choices=("cuda", "cpu"), help="default: a GPU if there is one")
    add("--sfr-full", action="store_true", help="every case, not the five-minute selection")
    add("--sfr-only", action="append", default=[], help="cases that contain this, by op, label and dtype")
    add("--sfr-until", type=float, help="no case is begun after this Unix time")
    add("--sfr-seconds", type=float, help="of timing for each case")
    add("--sfr-results", type=Path, help="result file, gone on with if it exists")
    add("--sfr-journal", type=Path, help="file that is told what goes on")


def pytest_configure(config):
    option = config.getoption
    device = torch.device(option("sfr_device") or ("cuda" if torch.cuda.is_available() else "cpu"))
    gc.freeze()  # what is imported need not be looked through each time memory is weighed
    try:
        config.stash[SESSION] = Session(
            device, option("sfr_results"), option("sfr_journal"), full=option("sfr_full"),
            only=tuple(option("sfr_only")), until=option("sfr_until"), seconds=option("sfr_seconds"),
        )  # fmt: skip
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None


def pytest_generate_tests(metafunc):
    if "race" not in metafunc.fixturenames:
        return
    suite, option, session = metafunc.module.SUITE, metafunc.config.getoption, metafunc.config.stash[SESSION]
    cases = [c for c in suite.cases(session.device) if option("sfr_full") or c.quick]
    cases = [c for c in cases if not option("sfr_only") or any(_holds(c.group, text) for text in option("sfr_only"))]
    found = []
    for case in cases:
        providers = [n for n in suite.providers(session.device) if entered_in(case, n)]
        able = [n for n in providers if suite.providers(session.device)[n] is None]
        session.settle(case.group, [*able, *suite.bounds])
        found += [(suite, case, provider) for provider in (*providers, *suite.bounds)]
    session.selected += len(found)
    found = [f for f in found if not session.is_done(f[1].group, f[2])]
    metafunc.parametrize("race", found, indirect=True, ids=[_slug(f"{c.group} {p}") for _, c, p in found])


def _slug(text: str) -> str:
    return re.sub(r"[^\w.]+", "-", text.replace("%", "pct")).strip("-")


def _holds(group: str, text: str) -> bool:
    """Whether a case contains a text, as whole words: float16 is not in bfloat16."""
    return re.search(rf"(?<!\w){re.escape(text)}(?!\w)", group) is not None


def pytest_collection_modifyitems(config, items):
    """Of a file with nothing to measure pytest makes a test that is skipped."""
    items[:] = [item for item in items if not _is_empty(item)]


def _is_empty(item) -> bool:
    return "race" in getattr(item, "fixturenames", ()) and not isinstance(item.callspec.params["race"], tuple)


def pytest_collection_finish(session):
    own, only = session.config.stash[SESSION], session.config.getoption("sfr_only")
    if only and not own.selected:
        raise pytest.UsageError(f"no case of the selection contains {' or '.join(only)}")
    own.tell(event="plan", tests=len(session.items))


def pytest_benchmark_update_machine_info(config, machine_info):
    """A result file is published: it names the processor, not the machine."""
    for name in ("node", "release"):
        machine_info.pop(name, None)
    machine_info.get("cpu", {}).pop("flags", None)


def pytest_benchmark_update_commit_info(config, commit_info):
    """Of this library's checkout, not of the folder that it happens to be run from."""
    own = config.stash[SESSION].own
    commit_info.clear()
    commit_info |= dict(id=own["revision"], dirty=own["modified"])


@pytest.fixture(scope="session")
def results(request) -> Session:
    session, hook = request.config.stash[SESSION], request.config.hook
    session.compile()
    if "machine_info" not in session.content:
        machine = hook.pytest_benchmark_generate_machine_info(config=request.config)
        hook.pytest_benchmark_update_machine_info(config=request.config, machine_info=machine)
        commit = hook.pytest_benchmark_generate_commit_info(config=request.config)
        hook.pytest_benchmark_update_commit_info(config=request.config, commit_info=commit)
        session.head(
            hook.pytest_benchmark_generate_json(
                config=request.config, benchmarks=[], include_data=True, machine_info=machine, commit_info=commit
            )
        )
    return session


class Replay:
    """A timer that gives pytest-benchmark durations that were measured before: at every second call one of them has
    passed."""

    def __init__(self, milliseconds: tuple[float, ...], name: str):
        self.__name__ = name
        self.seconds, self.now, self.running = [round(ms / 1e3, 10) for ms in reversed(milliseconds)], 0.0, False

    def __call__(self) -> float:
        if self.running:
            self.now += self.seconds.pop()
        self.running = not self.running
        return self.now


@pytest.fixture
def race(request, results):
    """What the test of a case and provider calls: judges, times, and reports."""
    suite, case, provider = request.param

    def report() -> None:
        if reason := results.absence(suite, case, provider):
            results.absent(suite, case, provider, reason)
            pytest.skip(f"{provider}: {reason}")
        try:
            found = results.race(suite, case)
        except DeadGPUError as error:
            if request.config.getoption("sfr_journal") is None:
                pytest.exit(f"{case.group}, {error.provider}: {error}; the GPU answers nothing any more", returncode=1)
            os._exit(1)  # the starter goes on in a new process
        if provider in found.failed:
            results.failed(suite, case, provider, found.failed[provider])
            pytest.fail(f"{case.group}, {provider}: {found.failed[provider]}", pytrace=False)
        result = found.results[provider]
        clock = "CUDA events" if results.device.type == "cuda" and not case.on_host else "perf_counter"
        timer = Replay(result.samples, "CUDA graph, events" if provider.endswith(GRAPH) else clock)
        request.node.add_marker(pytest.mark.benchmark(group=case.group, timer=timer))
        benchmark = request.getfixturevalue("benchmark")
        benchmark.extra_info |= result.info
        benchmark.pedantic(lambda: None, rounds=len(result.samples))
        if benchmark.enabled:  # --benchmark-disable: judged and tried, nothing more
            results.measured(benchmark.stats.as_dict(include_data=True) | dict(params=case.sizes))

    yield report
    results.tell(event="reported")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session, exitstatus):
    if SESSION not in session.config.stash or session.config.option.collectonly:
        return
    own = session.config.stash[SESSION]
    if exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED):
        own.finish()
        own.tell(event="finished")
