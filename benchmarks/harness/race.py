"""One race: every provider of a case is judged, then all of them and what bounds them take turns.

Nothing is timed that has not been judged against float64. A provider that fails, at whatever moment, is left out and
named; the others go on. Where a kernel has left the GPU unusable, nothing in this process can go on: `DeadGPUError`.
"""

import gc
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from .environment import clocks
from .errors import message
from .floor import Floor
from .goals import misses
from .limit import bounds
from .timing import Candidate, Graph, Timing, compare, peak_extra
from .work import GRAPH, LIMIT, PRODUCTS, Case, Run, Suite, Work

MAKING = "making the case"  # in the place of a provider
LOADED_MS = 400  # of work in the queue while the clocks are read


class DeadGPUError(RuntimeError):
    """The GPU answers nothing any more, since `provider` ran."""

    def __init__(self, provider: str, reason: str):
        super().__init__(reason)
        self.provider = provider


@dataclass
class Result:
    samples: tuple[float, ...]  # milliseconds
    info: dict  # `extra_info` of the result file


@dataclass
class Race:
    results: dict[str, Result] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    clocks: dict | None = None  # of the GPU, under the load of this race


def race(
    suite: Suite,
    case: Case,
    device: torch.device,
    providers: Iterable[str],  # those that can run here
    bounded: Iterable[str] | None = None,  # of the suite's bounds, those that are still to be measured; None: all
    begin: Callable[[str], object] = lambda who: None,  # told who is about to run, or MAKING
    lost: Iterable[str] = (),  # that failed before
) -> Race:
    """DeadGPUError if the GPU answers nothing any more."""
    providers = list(providers)
    bounded = suite.bounds if bounded is None else tuple(bounded)
    try:
        return _race(suite, case, device, providers, bounded, begin, set(lost))
    except DeadGPUError:
        raise
    except Exception as error:  # of making the case, or of the race itself: named, and not run into by each of them
        reason = f"the race broke off: {_reason(MAKING, error, device)}"
        return Race(failed=dict.fromkeys([*providers, *bounded], reason))


def _race(
    suite: Suite,
    case: Case,
    device: torch.device,
    providers: list[str],
    bounded: tuple[str, ...],
    begin: Callable[[str], object],
    lost: set[str],
) -> Race:
    found = Race()
    torch.compiler.reset()  # limits of recompilation are counted per function, not per case
    begin(MAKING)
    work = suite.make(case, device)
    fields, runs = {}, {}
    for provider in providers:
        begin(provider)
        try:
            runs[provider], fields[provider] = _judged(work, provider, runs, lost | set(found.failed), device)
        except Exception as error:  # one that fails must not hide the others
            found.failed[provider] = _reason(provider, error, device)
    if work.judged is not None:
        work.judged()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()  # of what the eager ones have cut up
    candidates = {name: _candidate(work, run) for name, run in runs.items()}
    if bounded:
        begin(LIMIT)
        try:
            both = bounds(_floor(work, case, device), work.bytes, device)
            candidates |= {name: both[name] for name in bounded}
        except Exception as error:
            found.failed |= dict.fromkeys(bounded, _reason(LIMIT, error, device))
    raised: dict[str, Exception] = {}
    clock = torch.device("cpu") if case.on_host else device
    times = compare(candidates, clock, case.seconds, raised, least_runs=case.least_runs, begin=begin)
    found.failed |= {name: _reason(name, error, device) for name, error in raised.items()}
    if device.type == "cuda" and LIMIT in times:
        found.clocks = _loaded_clocks(candidates[LIMIT], times[LIMIT].ms, device)
    for name, fields_of in _extras(work, times, runs, begin, found, device).items():
        fields[name] = fields.get(name, {}) | fields_of
    peaks = {name: f["peak_bytes"] for name, f in fields.items() if f.get("peak_bytes") is not None}
    missed = work.goals({name: t.ms for name, t in times.items()}, peaks) if work.goals else {}
    for name, time in times.items():
        if name in found.failed:
            continue
        info = common(case, suite, name) | _measured(work, case, name, times) | fields.get(name, {})
        if clock.type == "cpu":
            info = dict(threads=torch.get_num_threads()) | info
        if suite.is_ours(name):
            info["goals"] = misses(case.goal, name, times, suite, info.get("peak_bytes"), work.weight_bytes)
            info["goals"] += missed.get(name, [])
        found.results[name] = Result(time.samples, info)
    return found


def common(case: Case, suite: Suite, provider: str) -> dict:
    """What a result says of itself, whether it was measured or not."""
    return dict(
        op=case.op, label=case.label, dtype=case.dtype_name, case=case.sizes, provider=provider,
        kind=suite.kind(provider), sweeps=list(case.sweeps), main=case.main, quick=case.quick,
    )  # fmt: skip


def _judged(work: Work, provider: str, runs: dict, lost: set[str], device: torch.device) -> tuple[Run | Graph, dict]:
    """A provider's run, or the graph of one, and what its judgement and its memory say of it."""
    if provider.endswith(GRAPH):
        base = provider.removesuffix(GRAPH)
        if base in lost:
            raise RuntimeError("the launched calls failed")
        launched = runs[base]
        graph = Graph(launched)
        if work.check_graph is not None:
            work.check_graph(graph, launched)
        return graph, {}
    run = work.run(provider)
    fields = dict(work.judge(provider, run))
    if work.measure_memory:
        prepare = work.prepare or (lambda: None)
        prepare()
        run()  # may compile, and try out
        prepare()
        fields["peak_bytes"] = peak_extra(run, device)
    return run, fields


def _candidate(work: Work, run: Run | Graph) -> Candidate:
    return Candidate(run.replay, work.draw) if isinstance(run, Graph) else Candidate(run, work.prepare)


def _floor(work: Work, case: Case, device: torch.device) -> Floor | None:
    if not work.gemms:
        return None
    factors = work.factors(work.gemms) if work.factors else None
    return Floor(work.gemms, case.dtype, device, factors)


def _extras(work: Work, times: dict, runs: dict, begin: Callable, found: Race, device: torch.device) -> dict[str, dict]:
    """What a work has to say of its providers besides."""
    fields = {}
    for name in [n for n in times if work.extra is not None and n in runs]:
        begin(name)
        try:
            fields[name] = work.extra(name, times[name].ms)
        except Exception as error:
            found.failed[name] = _reason(name, error, device)
    return fields


def _measured(work: Work, case: Case, name: str, times: dict[str, Timing]) -> dict:
    """What the work of a provider amounts to: bytes are those besides the products, traffic is all that must move."""
    time, flops = times[name], sum(gemm.flops for gemm in work.gemms)
    besides = 0 if name == PRODUCTS else work.bytes
    traffic = besides + case.dtype.itemsize * sum(gemm.numbers for gemm in work.gemms)
    found = dict(flops=flops, bytes=besides, traffic=traffic, issue_ms=round(time.issue_ms, 6))
    if flops:
        found["tflop_per_s"] = float(f"{flops / time.ms / 1e9:.5g}")
    if traffic:
        found["tb_per_s"] = float(f"{traffic / time.ms / 1e9:.5g}")
    return found | {f"{n}_ms": round(times[n].ms, 6) for n in (PRODUCTS, LIMIT) if n in times}


def _loaded_clocks(candidate: Candidate, ms: float, device: torch.device) -> dict | None:
    """The clocks while the GPU is at work."""
    for _ in range(min(100, math.ceil(LOADED_MS / ms))):
        candidate.run()
    found = clocks()
    torch.cuda.synchronize(device)
    return found


def _reason(provider: str, error: Exception, device: torch.device) -> str:
    """Why a provider failed, in a line. DeadGPUError if the GPU went with it."""
    reason = message(error)
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except Exception:
            raise DeadGPUError(provider, reason) from None
    return reason
