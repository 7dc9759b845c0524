"""Every op of a backend once, forward and backward, on small shapes: for compute-sanitizer to watch.

It is run as `compute-sanitizer --tool memcheck python -m benchmarks.check.sanitize`, and so by gpu_check.
"""

import argparse
import re
import shutil
import sys
from pathlib import Path

import torch

from sfr_kernels.ops.dispatch import unavailable

from ..harness.problems import OPS, Problem, Shape

ROOT = Path(__file__).resolve().parents[2]
# Widths that no block divides, so that every mask is in use; one that fills blocks, with rows of logits for a cluster.
SHAPES = (
    Shape(2, 40, 72, 0.7, vocab=331, target_size=34, width=50, num_layers=3),
    Shape(1, 40, 64, 1.0, vocab=65536, target_size=64, width=128, num_layers=3),
)
DTYPES = (torch.bfloat16, torch.float32)
TOOLS = {"triton": ("memcheck", "racecheck"), "cuda": ("memcheck", "racecheck", "initcheck")}


def run(device: torch.device, backend: str) -> int:
    """Runs them all; the number of calls."""
    calls = 0
    for shape in SHAPES:
        for dtype in DTYPES:
            for op in OPS:
                Problem(op, shape, dtype, device).run(backend)
                calls += 1
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return calls


def kernel_names(backend: str) -> list[str]:
    """The names of a backend's kernels, read from their files."""
    if backend == "cuda":
        text = "\n".join(f.read_text() for f in sorted(ROOT.glob("csrc/*.cu")))
        return re.findall(r"(\w+_kernel)\(", text)
    text = "\n".join(f.read_text() for f in sorted(ROOT.glob("sfr_kernels/leaves/triton/*.py")))
    return re.findall(r"^@kernel\ndef (\w+)\(", text, re.M)


def commands() -> list[tuple[str, list[str], dict[str, str]]]:
    """(name, command, environment) of each tool; none where compute-sanitizer is not installed."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        return []
    found = []
    both = [(b, tool) for b, tools in TOOLS.items() if unavailable(b) is None for tool in tools]
    for number, (backend, tool) in enumerate(both):
        options = ["--tool", tool, "--error-exitcode", "1", "--target-processes", "application-only"]
        options += ["--launch-timeout", "120", "--port", str(49152 + 100 * number)]
        if tool == "memcheck":
            # torch asks the driver things that it may refuse: not an error of ours
            options += ["--report-api-errors", "no"]
        else:
            # our kernels alone: it cannot follow every way in which cuBLAS synchronises
            options += [part for name in kernel_names(backend) for part in ("--kernel-name", f"kns={name}")]
        # without the caching allocator, a read past the end of a tensor leaves the allocation
        environment = {} if tool == "racecheck" else {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        command = [program, *options, sys.executable, "-m", "benchmarks.check.sanitize", "--backend", backend]
        found.append((f"{backend} {tool}", command, environment))
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", default="triton")
    arguments = parser.parse_args()
    print(f"{run(torch.device(arguments.device), arguments.backend)} calls")
