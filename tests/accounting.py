"""Bytes, by the allocator's own account, which a CPU keeps as well as a GPU does."""

import torch
from torch.profiler import ProfilerActivity, profile

ON_GPU = torch.cuda.is_available()


def allocated(function) -> tuple[int, int, object]:
    """Bytes that a call leaves behind, the most it had at once, and what it returned."""
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = function()
        return torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before, out
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        out = function()
    now = peak = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return now, peak, out
