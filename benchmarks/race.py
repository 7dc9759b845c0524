"""One race: every provider of a case is judged, then all of them and what bounds them take turns.

Nothing is timed that has not been judged. A provider that fails, at whatever moment, is left out and named; the others
go on. Where it has left the GPU unusable nothing in this process can go on: DeadGPUError.
"""

import gc
import math
from collections.abc import Callable, Iterable

import torch

from . import machine
from .case import GRAPH, LIMIT, PRODUCTS, Case, Run, Suite, Work
from .jobs import message
from .limit import bounds
from .timing import Candidate, Graph, Timing, compare, peak_extra

MAKING = "making the case"  # in the place of a provider
LOADED_MS = 400  # of work in the queue while the clocks are read


class DeadGPUError(RuntimeError):
    """The GPU answers nothing any more."""


def race(
    suite: Suite,
    case: Case,
    device: torch.device,
    providers: dict[str, str | None],  # name → why it cannot run here, or None
    without: Iterable[str] = (),  # providers that have brought a process of this case down
    begin: Callable[[str], object] = lambda who: None,  # told who is about to run, or MAKING
) -> list[dict]:
    """Lines of a result file: "result", "failed" and "absent". Where making the case fails, everyone has."""
    lines = [_line("absent", suite, case, name, reason=why) for name, why in providers.items() if why]
    entered = [name for name, why in providers.items() if not why and name not in without]
    failed: dict[str, str] = {}
    try:
        results = _raced(suite, case, device, entered, failed, begin, without)
    except DeadGPUError:
        raise
    except Exception as error:
        failed |= dict.fromkeys([*entered, *suite.bounds], _reason(error, device))
        results = []
    return [*lines, *results, *(_line("failed", suite, case, name, reason=why) for name, why in failed.items())]


def _line(kind: str, suite: Suite, case: Case, provider: str, **fields) -> dict:
    return dict(line=kind, **case.fields, provider=provider, kind=suite.kind(provider)) | fields


def _raced(suite: Suite, case: Case, device: torch.device, entered: list[str], failed: dict[str, str],
           begin: Callable[[str], object], without: Iterable[str]) -> list[dict]:  # fmt: skip
    begin(MAKING)
    work = suite.make(case, device)
    runs: dict[str, Run | Graph] = {}
    fields: dict[str, dict] = {}
    for name in entered:
        begin(name)
        try:
            base = name.removesuffix(GRAPH)
            if base != name and (base in failed or base in without):
                raise RuntimeError("the launched calls failed")
            runs[name], fields[name] = _judged(work, name, runs.get(base), device)
        except Exception as error:  # one that fails must not hide the others
            failed[name] = _reason(error, device)
    if work.judged is not None:
        work.judged()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()  # of what the eager ones have cut up
    candidates = {name: Candidate(run, work.prepare) for name, run in runs.items() if not isinstance(run, Graph)}
    candidates |= {name: Candidate(run.replay, work.draw) for name, run in runs.items() if isinstance(run, Graph)}
    if suite.bounds:
        begin(LIMIT)
        try:
            candidates |= {n: c for n, c in bounds(work, case.dtype, device).items() if n in suite.bounds}
        except Exception as error:
            failed |= dict.fromkeys(suite.bounds, _reason(error, device))
    raised: dict[str, Exception] = {}
    clock = torch.device("cpu") if case.on_host else device
    times = compare(candidates, clock, case.seconds, case.rounds, raised, begin)
    failed |= {name: _reason(error, device) for name, error in raised.items()}
    common = dict(work.fields) | ({} if clock.type == "cuda" else dict(threads=torch.get_num_threads()))
    if device.type == "cuda" and LIMIT in times:
        common["sm_mhz"] = _loaded_clock(candidates[LIMIT], times[LIMIT].ms)
    for name in [n for n in times if work.extra is not None and n in runs]:
        begin(name)
        try:
            fields[name] |= work.extra(name, times[name].ms)
        except Exception as error:
            failed[name] = _reason(error, device)
    return [
        _line("result", suite, case, name, reference=case.reference if case.reference in times else None,
              worth=case.worth, axes=list(case.axes), sizes=case.sizes, goals=case.goals.get(name, {}),
              clock=_clock(name, clock), **_measured(work, case, name, time), **common | fields.get(name, {}))
        for name, time in times.items() if name not in failed
    ]  # fmt: skip


def _judged(work: Work, name: str, launched: Run | None, device: torch.device) -> tuple[Run | Graph, dict]:
    """A provider's run, or the graph of one, and what its judgement and its memory say of it."""
    if name.endswith(GRAPH):
        graph = Graph(launched)
        if work.check_graph is not None:
            work.check_graph(graph, launched)
        return graph, {}
    run, prepare = work.run(name), work.prepare or (lambda: None)
    fields = dict(work.judge(name, run))
    if work.measure_memory:
        prepare()
        run()  # may compile, and try out
        prepare()
        fields["peak_bytes"] = peak_extra(run, device)
    return run, fields


def _clock(name: str, clock: torch.device) -> str:
    if clock.type != "cuda":
        return "perf_counter"
    return "CUDA graph, events" if name.endswith(GRAPH) or name == PRODUCTS else "CUDA events"


def _measured(work: Work, case: Case, name: str, time: Timing) -> dict:
    """Times, and what the work amounts to: bytes are those besides the products, traffic is all that must move."""
    besides = 0 if name == PRODUCTS else work.bytes
    return dict(
        ms=round(time.ms, 6), samples_ms=[round(ms, 6) for ms in time.samples], issue_ms=round(time.issue_ms, 6),
        flops=sum(gemm.flops for gemm in work.gemms), bytes=besides,
        traffic=besides + case.dtype.itemsize * sum(gemm.numbers for gemm in work.gemms),
    )  # fmt: skip


def _loaded_clock(candidate: Candidate, ms: float) -> float | None:
    """The SM clock while the GPU is at work, MHz."""
    for _ in range(min(100, math.ceil(LOADED_MS / ms))):
        candidate.run()
    found = machine.clocks() or {}
    torch.cuda.synchronize()
    return found.get("sm_mhz")


def _reason(error: Exception, device: torch.device) -> str:
    """Why a provider failed, in a line. DeadGPUError if the GPU went with it."""
    reason = message(error)
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except Exception:
            raise DeadGPUError(f"{reason}; the GPU answered nothing after that") from None
    return reason
