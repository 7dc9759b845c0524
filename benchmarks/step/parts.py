"""Where a training step's time goes: the step run again with marks between its parts, apart from the timed runs.

A mark is an event on the device's stream (on a CPU, the time), so a part lasts until the device is done with it, also
where it waits for the CPU. What an encoder computes on a stream beside the decoder's counts where it is waited for.
Ours compute their gradients with respect to the hidden states together with the loss: much of what others do in
"backward" is in "loss" there, and only the sum of the two can be compared.
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

TARGETS, LOOPS, FORWARD, LOSS, BACKWARD, OPTIMIZER = (
    "targets", "per-token loops", "trunk forward", "loss", "backward", "optimizer",
)  # fmt: skip


def unmarked(part: str) -> None:
    """The mark of a run that is not taken apart."""


class Marks:
    """Called with the name of a part when it ends."""

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self.start, self.ends = self._now(), []

    def __call__(self, part: str) -> None:
        self.ends.append((part, self._now()))

    def _now(self) -> "torch.cuda.Event | float":
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self) -> dict[str, float]:
        """Of each part, summed over where it occurs."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        found, last = {}, self.start
        for part, end in self.ends:
            elapsed = 1e3 * (end - last) if isinstance(end, float) else last.elapsed_time(end)
            found[part] = found.get(part, 0.0) + elapsed
            last = end
        return found


def measure_parts(
    run: Callable[[Callable[[str], None]], object],  # a step that marks its parts, but for the end of the trunk's
    lm_head: nn.Module,  # with whose call that ends
    device: torch.device,
    runs: int,
) -> dict[str, float]:
    """The median of each part in milliseconds."""
    found: dict[str, list[float]] = {}
    for _ in range(runs):
        marks = Marks(device)
        hook = lm_head.register_forward_pre_hook(lambda module, args, mark=marks: mark(FORWARD))
        try:
            run(marks)
        finally:
            hook.remove()
        for part, ms in marks.milliseconds().items():
            found.setdefault(part, []).append(ms)
    return {part: statistics.median(values) for part, values in found.items()}
