"""One race: every provider of a case is judged, then all of them and what bounds them take turns.

Nothing is timed that has not been judged. A provider that fails, at whatever moment, is left out and named; the others
go on. Where it has left the GPU unusable nothing in this process can go on: DeadGPUError.
"""

import gc
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch

from . import machine
from .case import GRAPH, LIMIT, PRODUCTS, Case, Run, Suite, Work
from .jobs import message
from .limit import bounds
from .timing import Candidate, Graph, Timing, allocated, compare

MAKING = "making the case"  # in the place of a provider
LOADED_MS = 400  # of work in the queue while the clock is read


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
    """Lines of a result file: "result", "failed" and "absent"."""
    failed, runs, fields, times = {}, {}, {}, {}
    entered = [name for name, why in providers.items() if not why and name not in without]
    bounded = suite.bounds if not {*suite.bounds} & {*without} else ()

    @contextmanager
    def trying(who: str, names: Iterable[str]) -> Iterator[None]:
        begin(who)
        try:
            yield
        except Exception as error:  # what fails must not hide the others
            failed.update(dict.fromkeys(names, _reason(error, device)))

    with trying(MAKING, (*entered, *bounded)):  # where this fails, everyone has
        work = suite.make(case, device)
        for name in entered:
            with trying(name, [name]):
                base = name.removesuffix(GRAPH)
                if base != name and base not in runs:
                    raise RuntimeError("the launched calls failed")
                runs[name], fields[name] = _judged(work, case, name, runs.get(base), device)
        work.judged()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()  # of what the eager ones have cut up
        captured = {name: Candidate(run.replay, work.draw) for name, run in runs.items() if isinstance(run, Graph)}
        candidates = {name: captured.get(name) or Candidate(run, work.prepare) for name, run in runs.items()}
        if bounded:
            with trying(LIMIT, bounded):
                candidates |= {n: c for n, c in bounds(work, case.dtype, device).items() if n in bounded}
        clock = torch.device("cpu") if case.on_host else device
        fail = lambda name, error: failed.update({name: _reason(error, device)})  # noqa: E731
        times = compare(candidates, clock, case.seconds, case.rounds, fail, begin)
        common = dict(work.fields) | ({} if clock.type == "cuda" else dict(threads=torch.get_num_threads()))
        if device.type == "cuda" and LIMIT in times and times[LIMIT].ms > LOADED_MS / 1000:
            common["sm_mhz"] = _loaded_clock(candidates[LIMIT], times[LIMIT].ms)
        for name in [n for n in times if work.extra is not None and n in runs]:
            with trying(name, [name]):
                fields[name] |= work.extra(name, times[name].ms)

    def line(kind: str, name: str, **more) -> dict:
        return dict(line=kind, **case.fields, provider=name, kind=suite.kind(name), **more)

    about = dict(reference=case.reference if case.reference in times else None, worth=case.worth, axes=list(case.axes),
                 sizes=case.sizes)  # fmt: skip
    lines = [line("absent", name, reason=why) for name, why in providers.items() if why]
    for name in [n for n in times if n not in failed]:
        measured = _measured(work, case, name, times[name], clock) | common | fields.get(name, {})
        lines.append(line("result", name, **about, goals=case.goals.get(name, {}), **measured))
    return lines + [line("failed", name, reason=why) for name, why in failed.items()]


def _judged(work: Work, case: Case, name: str, launched: Run | None, device: torch.device) -> tuple[Run | Graph, dict]:
    """A provider's run, or the graph of one, and what its judgement and its memory say of it."""
    if name.endswith(GRAPH):
        graph = Graph(launched)
        if work.check_graph is not None:
            work.check_graph(graph, launched)
        return graph, {}
    run, prepare = work.run(name), work.prepare
    fields = dict(work.judge(name, run))
    if not case.on_host:
        prepare()
        run()  # may compile, and try out
        prepare()
        gc.collect()
        left, peak, _ = allocated(lambda: list(run()), device)  # the results, which are left, live until here
        fields["peak_bytes"] = peak - left
    return run, fields


def _measured(work: Work, case: Case, name: str, time: Timing, clock: torch.device) -> dict:
    """Times, and what the work amounts to: bytes are those besides the products, traffic is all that must move."""
    besides, gemms = 0 if name == PRODUCTS else work.bytes, work.gemms
    numbers = sum(g.m * g.k + g.k * g.n + g.m * g.n for g in gemms)  # of factors and products
    return dict(
        ms=round(time.ms, 6), samples_ms=[round(ms, 6) for ms in time.samples], issue_ms=round(time.issue_ms, 6),
        clock="CUDA events" if clock.type == "cuda" else "perf_counter", flops=sum(2 * g.m * g.k * g.n for g in gemms),
        bytes=besides, traffic=besides + case.dtype.itemsize * numbers,
    )  # fmt: skip


def _loaded_clock(candidate: Candidate, ms: float) -> float | None:
    """The SM clock while the GPU is at work, MHz."""
    for _ in range(math.ceil(LOADED_MS / ms)):
        candidate.run()
    found = machine.clocks() or {}
    torch.cuda.synchronize()
    return found.get("sm_mhz")


def _reason(error: Exception, device: torch.device) -> str:
    """Why something failed, in a line. DeadGPUError if the GPU went with it."""
    if isinstance(error, DeadGPUError):
        raise error
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except Exception:
            raise DeadGPUError(f"{message(error)}; the GPU answered nothing after that") from None
    return message(error)
