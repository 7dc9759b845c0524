"""Times that can be compared, and peak memory.

All candidates take turns, so that a machine that slows down slows all of them. On a GPU every run starts from an idle
device and a cold L2: a buffer larger than it is written first, as often as it takes the CPU to issue the run.
"""

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

ROUNDS, MOST_ROUNDS, WARM_UP = 10, 100, 3
FLUSH = 256 * 2**20  # bytes at least
FLUSH_AT_MOST = 3.0  # ms; who issues for longer, or waits for the device, has gaps in any case


@dataclass(frozen=True)
class Timing:
    ms: float  # median
    samples: tuple[float, ...]  # ms of every round
    issue_ms: float  # median time until the CPU was free again


@dataclass
class Candidate:
    run: Callable[[], object]
    prepare: Callable[[], object] = lambda: None  # before each run, outside the measured time
    issued: float = FLUSH_AT_MOST  # least ms of the warm-up's runs until the CPU was free
    flushes: int = 1

    def warm(self, device: torch.device, flush: Tensor) -> None:
        self.prepare()
        start = time.perf_counter()
        self.run()
        self.issued = min(self.issued, 1e3 * (time.perf_counter() - start))
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            flush.zero_()
            end.record()
            torch.cuda.synchronize(device)
            self.flushes = max(1, math.ceil(1.5 * self.issued / begin.elapsed_time(end)))

    def time(self, device: torch.device, flush: Tensor) -> tuple[float, float]:  # ms of one run, and until issued
        self.prepare()
        if device.type != "cuda":
            start = time.perf_counter()
            self.run()
            elapsed = 1e3 * (time.perf_counter() - start)
            return elapsed, elapsed
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        for _ in range(self.flushes):
            flush.zero_()
        begin.record()
        start = time.perf_counter()
        self.run()
        issued = 1e3 * (time.perf_counter() - start)
        end.record()
        torch.cuda.synchronize(device)
        return begin.elapsed_time(end), issued


def compare(
    candidates: dict[str, Candidate],
    device: torch.device,
    seconds: float = 2.0,  # for all of them together, unless the least rounds take longer
    rounds: int = ROUNDS,  # at least; fewer where a run takes so long that one suffices to warm up
    fail: Callable[[str, Exception], object] | None = None,  # told what a candidate raised, which then is out
    begin: Callable[[str], object] = lambda name: None,  # told who runs next, outside of anyone's time
) -> dict[str, Timing]:
    """Every candidate's time, in rounds of one run each, in turn forwards and backwards."""
    size = max(FLUSH, 4 * torch.cuda.get_device_properties(device).L2_cache_size) if device.type == "cuda" else 0
    flush, found = torch.empty(size, dtype=torch.uint8, device=device), {name: [] for name in candidates}

    def attempt(name: str, act: Callable[[Candidate], object]) -> None:
        begin(name)
        try:
            found[name].append(act(candidates[name]))
        except Exception as error:
            if fail is None:
                raise
            del found[name]
            fail(name, error.with_traceback(None))

    for name in candidates:
        for _ in range(WARM_UP if rounds >= ROUNDS else 1):
            if name in found:
                attempt(name, lambda candidate: candidate.warm(device, flush))
    found, start = {name: [] for name in found}, time.perf_counter()
    gc.collect()
    gc.disable()  # a collection would fall into somebody's time
    try:
        for turn in range(MOST_ROUNDS):
            for name in list(found)[:: 1 if turn % 2 == 0 else -1]:
                attempt(name, lambda candidate: candidate.time(device, flush))
            if turn + 1 >= rounds and time.perf_counter() - start > seconds:
                break
    finally:
        gc.enable()
    pairs, median = {name: tuple(zip(*samples, strict=True)) for name, samples in found.items()}, statistics.median
    return {name: Timing(median(times), times, median(issued)) for name, (times, issued) in pairs.items()}


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
        self.replay = self.graph.replay


def allocated(function: Callable[[], object], device: torch.device) -> tuple[int, int, object]:
    """Bytes that a call leaves behind, the most it had at once, and its result, by the allocator's own count."""
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
