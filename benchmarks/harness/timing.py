"""Times that can be compared, and peak memory.

All candidates of a comparison take turns in one run, so that a machine that slows down slows all of them. Every run
starts from an idle device and a cold L2: a buffer larger than it is written first. While that write runs, about 0.1 ms,
the CPU issues ahead, as it does in a training step; `issue_ms` says what issuing the work cost the CPU in all. On a CPU
runs are timed by the wall clock, from whatever its caches hold.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

LEAST_RUNS, MOST_RUNS, WARM_UP = 10, 100, 3
LEAST_FLUSH = 256 * 2**20  # bytes


@dataclass(frozen=True)
class Timing:
    ms: float  # median
    spread_ms: float  # between the quartiles
    issue_ms: float  # median time until the CPU was free again
    runs: int
    samples: tuple[float, ...] = ()  # every run's milliseconds


@dataclass(frozen=True)
class Candidate:
    run: Callable[[], object]
    prepare: Callable[[], object] | None = None  # before each run, outside the measured time


class Flush:
    """Writes more than L2 holds."""

    def __init__(self, device: torch.device):
        size = 0
        if device.type == "cuda":
            size = max(LEAST_FLUSH, 4 * torch.cuda.get_device_properties(device).L2_cache_size)
        self.buffer = torch.empty(size, dtype=torch.uint8, device=device)

    def __call__(self) -> None:
        self.buffer.zero_()


def compare(
    candidates: dict[str, Candidate],
    device: torch.device,
    seconds: float = 2.0,  # for all of them together, unless the least runs of each take longer
    raised: dict[str, Exception] | None = None,  # gets what candidates raise, which then take no further part
    *,
    least_runs: int = LEAST_RUNS,  # of each; fewer where a run takes so long that one suffices to warm up
    begin: Callable[[str], object] = lambda name: None,  # told who runs next, outside of anyone's time
) -> dict[str, Timing]:
    """Every candidate's time, in rounds of one run each, in turn forwards and backwards."""
    flush, samples = Flush(device), {name: [] for name in candidates}

    def once(name: str) -> None:
        begin(name)
        try:
            samples[name].append(_once(candidates[name], flush, device))
        except Exception as error:
            if raised is None:
                raise
            raised[name] = error.with_traceback(None)
            del samples[name]

    for name in candidates:
        for _ in range(WARM_UP if least_runs >= LEAST_RUNS else 1):
            if name in samples:
                once(name)
    samples = {name: [] for name in samples}
    collecting = gc.isenabled()
    gc.disable()  # a collection would fall into somebody's time
    try:
        start = time.perf_counter()
        for turn in range(MOST_RUNS):
            for name in list(samples)[:: 1 if turn % 2 == 0 else -1]:
                once(name)
            if turn + 1 >= least_runs and time.perf_counter() - start > seconds:
                break
    finally:
        if collecting:
            gc.enable()
    return {name: _summary(s) for name, s in samples.items()}


def _once(candidate: Candidate, flush: Flush, device: torch.device) -> tuple[float, float]:
    """Milliseconds of one run, and those until the CPU was free."""
    if candidate.prepare is not None:
        candidate.prepare()
    if device.type != "cuda":
        start = time.perf_counter()
        candidate.run()
        elapsed = 1e3 * (time.perf_counter() - start)
        return elapsed, elapsed
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    flush()
    begin.record()
    start = time.perf_counter()
    candidate.run()
    issued = 1e3 * (time.perf_counter() - start)
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end), issued


def _summary(samples: list[tuple[float, float]]) -> Timing:
    times, issued = zip(*samples, strict=True)
    low, middle, high = statistics.quantiles(times, n=4)
    return Timing(middle, high - low, statistics.median(issued), len(times), times)


class Graph:
    """A callable captured in a CUDA graph, and the tensors that each replay writes."""

    def __init__(self, run: Callable[[], Iterable[Tensor]]):
        # kernels compile, and libraries take their workspaces, before the capture and on another stream
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                run()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = list(run())

    def replay(self) -> None:
        self.graph.replay()


def peak_extra(
    run: Callable[[], Iterable[Tensor]],  # returns what it leaves behind: the loss and the gradients
    device: torch.device,
) -> int:
    """Bytes allocated at the peak beyond what was there before and what is left behind."""
    gc.collect()
    left, peak, _ = allocated(lambda: list(run()), device)  # the results live until here
    return peak - left


def allocated(function: Callable[[], object], device: torch.device) -> tuple[int, int, object]:
    """Bytes that a call leaves behind, the most it had at once, and what it returned: by the allocator's own account,
    which a CPU keeps as well as a GPU does."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        out = function()
        torch.cuda.synchronize(device)
        return torch.cuda.memory_allocated(device) - before, torch.cuda.max_memory_allocated(device) - before, out
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        out = function()
    now = peak = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return now, peak, out
