"""Every GPU test, then each op's error, at odd sizes and at large ones, launched and in a CUDA graph: `make gpu-check`.

    python -m benchmarks.check.gpu_check [--quick] [--minutes 8] [--out FOLDER]

Runs from a checkout, with torch, Triton and pytest. Exits with 0 if all went well, 1 on a failed test, a wrong result
or a part that the time did not suffice for, 2 without a GPU. A result file is kept under benchmarks/results/, rewritten
after every row.
"""

import argparse
import faulthandler
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path

import torch

from sfr_kernels.ops.dispatch import unavailable

from ..harness.composites import check_replay
from ..harness.errors import describe, judge, message
from ..harness.problems import OPS, Problem, Shape
from ..harness.timing import Graph
from . import sanitize
from .results import FOLDER, ResultFile, render
from .steps import Step, gpu_tests

MINUTES = 8.0
MARGIN = 15.0  # seconds kept back for starting and ending
# Shares of the time: when tests and sanitizers have to be done, and when the last row may begin.
TESTS_UNTIL, ROWS_UNTIL = 0.5, 0.92
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Case:
    """One problem whose errors are judged."""

    op: str
    shape: Shape
    dtype: torch.dtype
    draws: int
    graphs: bool = False  # a replay must be the launched call

    @property
    def fields(self) -> dict:
        dtype = str(self.dtype).removeprefix("torch.")
        return dict(op=self.op, label=self.shape.label(self.op), dtype=dtype, shape=asdict(self.shape))


# Nothing here is a multiple of a block; four layers, so that a block follows a block.
ODD = Shape(3, 61, 72, 0.7, vocab=331, target_size=34, width=50, num_layers=4)
FLOW = Shape(4, 2048, 4096, 0.75)
SMALL_FLOW = Shape(2, 512, 4096, 0.75)
LARGE_FLOW = Shape(8, 2048, 5120, 0.75)
DECODER = Shape(4, 2048, 4096, 0.5, vocab=128256)
SMALL_DECODER = Shape(2, 1024, 2048, 0.5, vocab=32768)
TINY = Shape(2, 24, 20, 0.7, vocab=37, target_size=10, width=12, num_layers=3)


def gpu_cases() -> list[Case]:
    decoders = ("linear_cross_entropy", "sfr_loss")
    return [
        *(Case(op, ODD, dtype, draws=6) for op in OPS for dtype in (BF16, FP16, FP32)),
        *(Case("flow_matching_loss", s, BF16, draws=3, graphs=True) for s in (FLOW, SMALL_FLOW, LARGE_FLOW)),
        *(Case("flow_matching_loss", SMALL_FLOW, dtype, draws=3) for dtype in (FP16, FP32)),
        *(Case(op, SMALL_DECODER, dtype, draws=3) for op in decoders for dtype in (FP16, FP32)),
        *(Case(op, replace(DECODER, frozen=frozen), BF16, draws=2) for op in decoders for frozen in (False, True)),
    ]


def cpu_cases() -> list[Case]:
    """Every way through the harness that needs no GPU."""
    return [
        Case("flow_matching_loss", TINY, FP32, draws=6),
        Case("linear_cross_entropy", TINY, BF16, draws=6),
        Case("sfr_loss", replace(TINY, frozen=True), FP32, draws=6),
        Case("sfr_loss", TINY, BF16, draws=6),
    ]


def check(case: Case, backends: tuple[str, ...], device: torch.device) -> list[dict]:
    """The rows of a case, one for each backend."""
    rows, failures = {b: case.fields | dict(candidate=b) for b in backends}, {}
    try:
        if device.type == "cuda":
            torch.cuda.empty_cache()  # what the last case has left
        problem = Problem(case.op, case.shape, case.dtype, device)
        errors, failures = judge(problem, backends, case.draws)
        for backend, found in errors.items():
            worst = max(found, key=lambda name, f=found: f[name].ratio)
            rows[backend] |= dict(errors={name: e.to_dict() for name, e in found.items()}, worst=worst)
            if found[worst].ratio > 1:
                failures[backend] = describe(worst, found[worst])
            elif case.graphs:
                _check_graph(problem, backend, failures)
    except Exception as error:  # the reference: nothing can be said of any backend
        failures |= {b: message(error) for b in backends if b not in failures}
    return [dict(ok=b not in failures, failure=failures.get(b)) | row for b, row in rows.items()]


def _check_graph(problem: Problem, backend: str, failures: dict[str, str]) -> None:
    run = partial(problem.run, backend)
    try:
        check_replay(problem, Graph(run), run)
    except Exception as error:
        failures[backend] = f"in a graph: {message(error)}"


def progress(row: dict) -> str:
    words = [row["op"], row["label"], row["dtype"], row["candidate"]]
    if row.get("worst"):
        worst = row["errors"][row["worst"]]
        words.append("not finite" if worst["ratio"] is None else f"error at {worst['ratio']:.2f} of its bound")
    if row.get("ms"):
        words.append(f"{row['ms']:.3f} ms, floor {row['floor_ms']:.3f}")
    return ", ".join([*words, "ok" if row["ok"] else f"FAILED: {row['failure']}"])


def tests(file: ResultFile, deadline: float) -> None:
    """The GPU tests, and beside them the sanitizers, which need the same GPU but no quiet."""
    with ExitStack() as stack:
        watched = []
        for name, command, environment in sanitize.commands():
            watched.append(Step(name, command, **environment))
            stack.callback(watched[-1].stop)
        if not watched:
            skipped = dict(name="compute-sanitizer", ok=True, seconds=0.0, detail="skipped: it is not on PATH")
            print(f"{skipped['name']}: {skipped['detail']}", flush=True)
            file.add("steps", skipped)
        for name, command, environment in gpu_tests():
            print(f"{name}: {' '.join(command)}", flush=True)
            step = Step(name, command, **environment)
            stack.callback(step.stop)
            file.add("steps", step.finish(deadline, live=True))
        for step in watched:
            entry = step.finish(deadline)
            print(f"{step.name}: {'ok' if entry['ok'] else 'FAILED'}: {entry['detail']}", flush=True)
            file.add("steps", entry)


def experiments(device: torch.device) -> Iterator[dict]:
    """What the package might do instead: each against what it does."""
    for name in ("fused_output", "one_read"):
        try:
            yield from import_module(f".{name}", __package__).measure(device)  # both need Triton
        except Exception as error:
            names = dict(op=name, label="", dtype="", candidate="")
            yield names | dict(ok=False, failure=message(error))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="errors only: no tests, no experiments")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: try the harness, nothing more")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="when it has to be done (default %(default)g)")
    parser.add_argument("--out", type=Path, help="folder of the result file (default benchmarks/results/)")
    options = parser.parse_args(argv)
    start = time.monotonic()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("gpu_check: needs an NVIDIA GPU, and torch sees none (--device cpu tries the harness)", file=sys.stderr)
        return 2
    device, whole = torch.device(options.device), 60 * options.minutes - MARGIN
    on_gpu = device.type == "cuda"
    backends, cases = ("torch",), cpu_cases()
    if on_gpu:
        backends, cases = tuple(b for b in ("triton", "cuda", "torch") if unavailable(b) is None), gpu_cases()
        if "cuda" not in backends:
            print(f"The cuda backend is left out: {unavailable('cuda')}", flush=True)
    # a kernel that hangs cannot be interrupted from Python; every row before it is in the file
    faulthandler.dump_traceback_later(60 * options.minutes - MARGIN / 3, exit=True, file=sys.__stderr__)
    with ExitStack() as stack:
        stack.callback(faulthandler.cancel_dump_traceback_later)
        folder = options.out or FOLDER
        if not on_gpu and options.out is None:  # numbers of a CPU are no results
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        file = ResultFile(folder, "gpu_check", device)
        if on_gpu and not options.quick:
            tests(file, start + TESTS_UNTIL * whole)
        for case in cases:
            if time.monotonic() > start + ROWS_UNTIL * whole:
                reason = f"not run: {options.minutes:g} minutes did not suffice (--minutes)"
                rows = [case.fields | dict(candidate=b, ok=False, failure=reason) for b in backends]
            else:
                rows = check(case, backends, device)
            for row in rows:
                print(progress(row), flush=True)
                file.add("rows", row)
        if on_gpu and not options.quick and time.monotonic() < start + ROWS_UNTIL * whole:
            for row in experiments(device):
                print(progress(row), flush=True)
                file.add("rows", row)
        print(f"\n{render(file.content)}\n")
        failed = [e for kind in ("steps", "rows") for e in file.content[kind] if not e["ok"]]
        print(f"{len(failed)} of {len(file.content['steps'] + file.content['rows'])} failed" if failed else "All well.")
        if folder == (options.out or FOLDER):
            print(f"Kept in {file.path}, after {time.monotonic() - start:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
