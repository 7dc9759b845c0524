"""Every op of the triton backend once, forward and backward, on small shapes: for compute-sanitizer to watch.

It is run as `compute-sanitizer --tool memcheck python -m benchmarks.sanitize`, and so by gpu_check.
"""

import argparse
import re
import shutil
import sys
from pathlib import Path

import torch

from .problems import OPS, Problem, Shape

ROOT = Path(__file__).resolve().parents[1]
# Widths that no block divides, so that every mask is in use, and one that fills blocks.
SHAPES = (
    Shape(2, 40, 72, 0.7, vocab=331, target_size=34, width=50, num_layers=3),
    Shape(1, 40, 64, 1.0, vocab=256, target_size=64, width=128, num_layers=3),
)
DTYPES = (torch.bfloat16, torch.float32)
TOOLS = ("memcheck", "racecheck")


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


def kernel_names() -> list[str]:
    """The names of the package's Triton kernels, read from their files."""
    text = "\n".join(f.read_text() for f in sorted(ROOT.glob("sfr_kernels/leaves/triton/*.py")))
    return re.findall(r"@triton\.jit[^\n]*\ndef (\w+_kernel)\(", text)


def commands() -> list[tuple[str, list[str], dict[str, str]]]:
    """(name, command, environment) of each tool; none where compute-sanitizer is not installed."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        return []
    found = []
    for number, tool in enumerate(TOOLS):
        options = ["--tool", tool, "--error-exitcode", "1", "--target-processes", "application-only"]
        options += ["--launch-timeout", "120", "--port", str(49152 + 100 * number)]
        if tool == "memcheck":
            # torch asks the driver things that it may refuse: not an error of ours
            options += ["--report-api-errors", "no"]
        else:
            # our kernels alone: it cannot follow every way in which cuBLAS synchronises
            options += [part for name in kernel_names() for part in ("--kernel-name", f"kns={name}")]
        # without the caching allocator, a read past the end of a tensor leaves the allocation
        environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool == "memcheck" else {}
        found.append((tool, [program, *options, sys.executable, "-m", "benchmarks.sanitize"], environment))
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", default="triton")
    arguments = parser.parse_args()
    print(f"{run(torch.device(arguments.device), arguments.backend)} calls")
