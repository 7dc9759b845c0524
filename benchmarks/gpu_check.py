"""Every GPU test, then each op's error, time, share of its GEMM floor and peak memory: `make gpu-check`.

    python -m benchmarks.gpu_check [--quick] [--minutes 8] [--out FOLDER]

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
from importlib import import_module
from pathlib import Path

import torch

from sfr_kernels.ops.dispatch import unavailable

from . import sanitize
from .errors import FACTOR, Error, judge, message
from .problems import OPS, Problem, Shape
from .results import FOLDER, ResultFile, render
from .speed import measure
from .steps import Step, gpu_tests

MINUTES = 8.0
MARGIN = 15.0  # seconds kept back for starting and ending
# Shares of the time: when tests and sanitizers have to be done, and when the last row may begin.
TESTS_UNTIL, ROWS_UNTIL = 0.5, 0.92
SMALL_FACTOR = 3.0  # where dW is accumulated in 16 bit: every chunk rounds it once more
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Case:
    """One problem: its errors, and unless it is too small for that its times."""

    op: str
    shape: Shape
    dtype: torch.dtype
    draws: int
    timed: bool = True
    peers: bool = False
    graphs: bool = False
    seconds: float = 2.0
    small: bool = False  # the setting of the least memory

    @property
    def fields(self) -> dict:
        dtype = str(self.dtype).removeprefix("torch.")
        label = self.shape.label(self.op) + (" small" if self.small else "")
        return dict(op=self.op, label=label, dtype=dtype, shape=asdict(self.shape))


# Nothing here is a multiple of a block; four layers, so that a block follows a block.
ODD = Shape(3, 61, 72, 0.7, vocab=331, target_size=34, width=50, num_layers=4)
FLOW = Shape(4, 2048, 4096, 0.75)
SMALL_FLOW = Shape(2, 512, 4096, 0.75)
LARGE_FLOW = Shape(8, 2048, 5120, 0.75)
DECODER = Shape(4, 2048, 4096, 0.5, vocab=128256)
SMALL_DECODER = Shape(2, 1024, 2048, 0.5, vocab=32768)
TINY = Shape(2, 24, 20, 0.7, vocab=37, target_size=10, width=12, num_layers=3)


def gpu_cases() -> list[Case]:
    flow = dict(peers=True, graphs=True)
    return [
        *(Case(op, ODD, dtype, draws=6, timed=False) for op in OPS for dtype in (BF16, FP16, FP32)),
        *(Case("flow_matching_loss", s, BF16, draws=3, **flow) for s in (FLOW, SMALL_FLOW, LARGE_FLOW)),
        *(Case("flow_matching_loss", SMALL_FLOW, dtype, draws=3) for dtype in (FP16, FP32)),
        *(
            Case(op, SMALL_DECODER, dtype, draws=3, seconds=1.0)
            for op in ("linear_cross_entropy", "sfr_loss")
            for dtype in (FP16, FP32)
        ),
        *(
            Case(op, replace(DECODER, frozen=frozen), BF16, draws=2, seconds=3.0)
            for op in ("linear_cross_entropy", "sfr_loss")
            for frozen in (False, True)
        ),
    ]


def cpu_cases() -> list[Case]:
    """Every way through the harness that needs no GPU."""
    common = dict(draws=6, seconds=0.02)
    return [
        Case("flow_matching_loss", TINY, FP32, peers=True, **common),
        Case("linear_cross_entropy", TINY, BF16, **common),
        Case("sfr_loss", replace(TINY, frozen=True), FP32, **common),
        Case("sfr_loss", TINY, BF16, timed=False, **common),
    ]


def describe(name: str, error: Error) -> str:
    e = error.to_dict()
    ours, eager = ("not finite" if e[k] is None else f"{e[k]:.1e}" for k in ("ours", "eager"))
    return f"{name}: error {ours}, eager torch {eager}"


def check(case: Case, backends: tuple[str, ...], device: torch.device, quick: bool) -> list[dict]:
    """The rows of a case, one for each candidate."""
    rows, failures = {b: case.fields | dict(candidate=b) for b in backends}, {}
    try:
        if device.type == "cuda":
            torch.cuda.empty_cache()  # what the last case has left
        problem = Problem(case.op, case.shape, case.dtype, device, small=case.small)
        errors, raised = judge(problem, backends, case.draws, SMALL_FACTOR if case.small else FACTOR)
        failures |= raised
        for backend, found in errors.items():
            worst = max(found, key=lambda name, f=found: f[name].ratio)
            rows[backend] |= dict(errors={name: e.to_dict() for name, e in found.items()}, worst=worst)
            if found[worst].ratio > 1:
                failures[backend] = describe(worst, found[worst])
        if case.timed and not quick:
            alive = [b for b in backends if b not in raised]
            measured, raised = measure(problem, alive, peers=case.peers, graphs=case.graphs, seconds=case.seconds)
            for name, values in measured.items():
                rows[name] = rows.get(name, case.fields | dict(candidate=name)) | values
            failures |= raised
    except Exception as error:  # the reference or the floor: nothing can be said of any backend
        failures |= {b: message(error) for b in backends if b not in failures}
    for name, failure in failures.items():
        rows.setdefault(name, case.fields | dict(candidate=name, peer=name not in backends))["failure"] = failure
    return [dict(ok="failure" not in row, failure=None) | row for row in rows.values()]


def progress(row: dict) -> str:
    words = [row["op"], row["label"], row["dtype"], row["candidate"]]
    if row.get("worst"):
        worst = row["errors"][row["worst"]]
        words.append("not finite" if worst["ratio"] is None else f"error at {worst['ratio']:.2f} of its bound")
    if row.get("ms"):
        words.append(f"{row['ms']:.3f} ms, floor {row['floor_ms']:.3f}")
    if row.get("graph_ms"):
        words.append(f"in a graph {row['graph_ms']:.3f}")
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
    parser.add_argument("--quick", action="store_true", help="errors only: no tests, no times")
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
                rows = check(case, backends, device, options.quick)
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
