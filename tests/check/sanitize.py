"""compute-sanitizer over every op of a backend, forward and backward, on small shapes."""

import re
import shutil
import subprocess
import sys

import torch

from benchmarks.jobs import Job
from benchmarks.machine import ROOT
from benchmarks.problem import OPS, Problem, Shape
from sfr_kernels.kernels.backend import unavailable

# Widths that no block divides, so that every mask is in use; one that fills blocks, with rows of logits for a cluster.
SHAPES = (Shape(2, 40, 72, 0.7, vocab=331, target_size=34, width=50, num_layers=3),
          Shape(1, 40, 64, 1.0, vocab=65536, target_size=64, width=128, num_layers=3))  # fmt: skip
KERNELS = dict(cuda=("csrc/*.cu", r"(\w+_kernel)\("),
               triton=("sfr_kernels/kernels/*/triton.py", r"^@kernel\ndef (\w+)"))  # fmt: skip


def watched(backend: str, device: str = "cuda") -> list[float]:
    """The losses of what is watched, in a process of its own."""
    return [Problem(op, shape, dtype, torch.device(device)).run(backend)[0].item()
            for shape in SHAPES for dtype in (torch.bfloat16, torch.float32) for op in OPS]  # fmt: skip


def jobs() -> list[Job]:
    """One for each backend and tool; none where compute-sanitizer is not installed."""
    program, found = shutil.which("compute-sanitizer"), []
    for backend, (files, kernel) in KERNELS.items() if program else ():
        if unavailable(backend):
            continue
        names = re.findall(kernel, "\n".join(file.read_text() for file in sorted(ROOT.glob(files))), re.M)
        ours = [part for name in names for part in ("--kernel-name", f"kns={name}")]
        # memcheck: torch asks the driver things that it may refuse, and without the caching allocator a read past the
        # end of a tensor leaves the allocation. The others: our kernels alone, not cuBLAS's ways to synchronise, nor
        # what torch leaves unwritten.
        tools = dict(memcheck=["--report-api-errors", "no"], racecheck=ours, initcheck=ours)
        for tool, options in tools.items() if backend == "cuda" else list(tools.items())[:2]:
            command = [program, "--tool", tool, "--target-processes", "application-only", *options, "--error-exitcode",
                       "1", "--launch-timeout", "120", "--port", str(49152 + 100 * len(found)), sys.executable, "-c",
                       f"from check import sanitize; print(sanitize.watched({backend!r}))"]  # fmt: skip
            environment = {} if tool == "racecheck" else {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            found.append(Job(f"sanitizers {tool} {backend}", watch, (command,), environment))
    return found


def watch(tell, command: list[str]) -> None:
    if status := subprocess.call(command, cwd=ROOT):
        raise RuntimeError(f"exit status {status}, see log.txt")
