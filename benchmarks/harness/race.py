"""One race: every provider of a case is judged, then all of them and what bounds them take turns.

Nothing is timed that has not been judged against float64. A provider that fails, at whatever moment, is left out and
named; the others go on. Where a kernel has left the GPU unusable, nothing in this process can go on: `DeadGPUError`.
"""

import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from .errors import message
from .floor import Floor
from .goals import misses
from .limit import bounds
from .timing import Candidate, Graph, Timing, compare, peak_extra
from .work import GRAPH, LIMIT, PRODUCTS, Case, Run, Suite, Work

TURNS = "taking turns"  # what is under way while all of them are timed


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


def race(
    suite: Suite,
    case: Case,
    device: torch.device,
    providers: Iterable[str],  # those that can run here
    begin: Callable[[str], object] = lambda stage: None,  # told who is about to run, or TURNS
) -> Race:
    found = Race()
    torch.compiler.reset()  # limits of recompilation are counted per function, not per case
    try:
        work = suite.make(case, device)
    except Exception as error:
        return Race(failed=dict.fromkeys([*providers, *suite.bounds], f"the case cannot be made: {message(error)}"))
    fields, runs = {}, {}
    for provider in providers:
        begin(provider)
        base = provider.removesuffix(GRAPH)
        try:
            runs[provider], fields[provider] = _judged(work, provider, runs.get(base), device)
        except Exception as error:  # one that fails must not hide the others
            found.failed[provider] = _reason(provider, error, device)
            runs.pop(provider, None)
    if work.judged is not None:
        work.judged()
    gc.collect()
    candidates = {name: _candidate(work, name, run) for name, run in runs.items()}
    begin(TURNS)
    floor, raised = None, {}
    try:
        if work.gemms:
            floor = Floor(work.gemms, case.dtype, device)
        if suite.bounds:
            candidates |= bounds(floor, work.bytes, device)
    except Exception as error:
        raised = dict.fromkeys(suite.bounds, error)
    clock = torch.device("cpu") if case.on_host else device
    times = compare(candidates, clock, case.seconds, raised, least_runs=case.least_runs)
    found.failed |= {name: _reason(name, error, device) for name, error in raised.items()}
    peaks = {name: f["peak_bytes"] for name, f in fields.items() if f.get("peak_bytes") is not None}
    missed = work.goals({name: t.ms for name, t in times.items()}, peaks) if work.goals else {}
    for name, time in times.items():
        info = common(case, suite, name) | _measured(work, time, times, name) | fields.get(name, {})
        if floor is not None:
            info["floor_blocks"] = [floor.blocks[gemm] for gemm in floor.chain]
        if work.extra is not None and name in runs:
            info |= work.extra(name, time.ms)
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


def _judged(work: Work, provider: str, launched: Run | None, device: torch.device) -> tuple[object, dict]:
    """A provider's run, or its graph, and what its judgement and its memory say of it."""
    if provider.endswith(GRAPH):
        if launched is None:
            raise RuntimeError("the launched calls failed")
        graph = Graph(launched)
        if work.check_graph is not None:
            work.check_graph(graph, launched)
        return graph, {}
    run = work.run(provider)
    fields = dict(work.judge(provider, run))
    if work.measure_memory:
        if work.prepare is not None:
            work.prepare()
        fields["peak_bytes"] = max(0, peak_extra(run, device))
    return run, fields


def _candidate(work: Work, provider: str, run: object) -> Candidate:
    if isinstance(run, Graph):
        return Candidate(run.replay, work.draw)
    return Candidate(run, work.prepare)


def _measured(work: Work, time: Timing, times: dict[str, Timing], name: str) -> dict:
    flops = sum(gemm.flops for gemm in work.gemms)
    bounded = {f"{n}_ms": round(times[n].ms, 6) for n in (PRODUCTS, LIMIT) if n in times}
    rates = {}
    if flops:
        rates["tflop_per_s"] = float(f"{flops / time.ms / 1e9:.5g}")
    elif work.bytes:
        rates["tb_per_s"] = float(f"{work.bytes / time.ms / 1e9:.5g}")
    return dict(flops=flops, bytes=work.bytes, issue_ms=round(time.issue_ms, 6)) | rates | bounded


def _reason(provider: str, error: Exception, device: torch.device) -> str:
    """Why a provider failed, in a line. DeadGPUError if the GPU went with it."""
    reason = message(error)
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except Exception:
            raise DeadGPUError(provider, reason) from None
    return reason
