"""Errors against float64 and every GPU test side by side, then what must have the GPU to itself: `make gpu-check`.

Needs a copy of the tracked files, torch, Triton and pytest, its experiments tqdm. Exits with 0 if all is well, 1 if
something failed or was not come to, 2 without a GPU. A test that crashes, hangs or kills the GPU is named; the rest
goes on in a new process.
"""

import argparse
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict, deque
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import torch

from benchmarks import loop
from benchmarks.jobs import Ended, Job, message, run
from benchmarks.machine import ROOT
from sfr_kernels.atomic import write_atomically
from sfr_kernels.kernels.backend import unavailable

from . import sanitize
from .plugin import run_tests

# Phases, those of a line side by side, and the share of the time after which they are stopped.
PHASES = {("rows", "tests"): 0.65, ("timing",): 0.75, ("experiments",): 1.0, ("sanitizers",): 1.0}
SANITIZERS = 5.0  # minutes for them
FOLDER = ROOT / "tests"
ROWS, GROUPS = "test_gpu_errors.py", ("large", "small", "flow", "odd", "tiny")  # a process each
SILENCE = 60.0  # seconds that a test may take


def jobs_of(phase: str) -> list[Job]:
    """Test files: those with tests of that mark, and those of the kernels, once for each backend."""
    if phase == "rows":
        return [Job(f"{ROWS} {g}", run_tests, (str(FOLDER / ROWS), "gpu", f"[{g}"), silence=SILENCE) for g in GROUPS]
    mark, marks = ("gpu", "gpu and not timing") if phase == "tests" else (phase, phase)
    backends = [backend for backend in ("triton", "cuda") if phase == "tests" and unavailable(backend) is None]
    kernels = sorted(FOLDER.glob("kernels/test_*.py"))
    found = [(file, b, "not timing", {"SFR_TEST_KERNELS": b}) for b in backends for file in kernels]
    found += [(file, mark, marks, {}) for file in sorted(FOLDER.glob("test_*.py"))
              if f"mark.{mark}" in file.read_text() and file.name != ROWS]  # fmt: skip
    return [Job(f"{file.name} {name}", run_tests, (str(file), marks, ""), environment, silence=SILENCE)
            for file, name, marks, environment in found]  # fmt: skip


class Check:
    """Runs jobs, and puts down what they tell in gpu-check.jsonl, junit.xml and log.txt."""

    def __init__(self, folder: Path, logs: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.logs, self.lines, self.failed = folder, logs, [], []
        self.open, self.items, self.done = {}, {}, defaultdict(list)  # by job: its test that runs; all; those that ran
        self.file = open(folder / "gpu-check.jsonl", "w", buffering=1)  # noqa: SIM115

    def add(self, line: str, **fields) -> None:
        self.lines.append(dict(line=line) | fields)
        self.file.write(json.dumps(self.lines[-1], allow_nan=False) + "\n")
        if fields.get("outcome") == "failed":
            culprit = " (the end of its process)" if "culprit" in fields else ""
            self.failed.append("FAILED{}: {job} {name}: {reason}".format(culprit, **fields))
            print(self.failed[-1], flush=True)

    def add_experiments(self, path: Path) -> None:
        """What came of them: a candidate that fails is no failure of ours."""
        for line in loop.lines_of(path)[1:] if path.exists() else ():
            self.add(**line)
            if line["line"] in ("failed", "skipped"):
                bad = line["line"] == "skipped" or line["kind"] == "ours"
                name, outcome = f"{line['op']} {line.get('provider', '')}", "failed" if bad else "skipped"
                self.add("experiment", job="experiments", name=name, outcome=outcome, reason=line["reason"])

    def run(self, jobs: list[Job], workers: int, until: float) -> None:
        waiting = deque(replace(job, log=self.logs / job.name) for job in jobs)
        try:
            with contextlib.closing(run(waiting, workers, until)) as told:
                for job, said in told:
                    if not isinstance(said, Ended):
                        self.hear(job, **said)
                    elif self.ended(job, said.reason, said.late):
                        waiting.appendleft(replace(job, arguments=(*job.arguments[:3], tuple(self.done[job.name]))))
        finally:
            for job, *_ in list(self.open.values()):
                self.ended(job, "interrupted", late=True)
            for job in waiting:
                self.add("job", job=job.name, name="", outcome="failed", reason="not come to")
            self.write()

    def hear(self, job: Job, items=None, begin=None, fail=None, end=None) -> None:
        if begin:
            self.open[job.name] = job, begin, []
        elif fail is not None:
            self.open[job.name][2].append(fail)
        elif end is not None:
            self.close(job, **end)
        else:
            self.items[job.name] = items

    def close(self, job: Job, skipped: str | None = None, **fields) -> None:
        _, name, reasons = self.open.pop(job.name)
        self.done[job.name].append(name)
        self.add("row" if job.name.startswith(ROWS) else "test", job=job.name,
                 name=name.partition("::")[2] or Path(name).name, reason="; ".join(reasons) or skipped,
                 outcome="failed" if reasons else "skipped" if skipped else "passed", **fields)  # fmt: skip

    def ended(self, job: Job, reason: str | None, late: bool = False) -> bool:
        """Whether a culprit has left tests that are to go on in a new process."""
        culprit = job.name in self.open
        if culprit:
            self.open[job.name][2].append(reason or "its process ended")
            self.close(job, **{} if late else dict(culprit=True))
        left = len(set(self.items.get(job.name, ())) - set(self.done[job.name]))
        if culprit and left and not late:
            return True
        reason = f"{left} tests not come to: {reason}" if left else None if culprit else reason
        self.add("job", job=job.name, name="", outcome="failed" if reason else "passed", reason=reason)
        self.write()
        return False

    def write(self) -> None:
        """The latter two files, whole; first the logs of jobs of which something failed."""
        suite, lines = ElementTree.Element("testsuite", name="gpu-check"), [x for x in self.lines if "outcome" in x]
        failed = {line["job"] for line in lines if line["outcome"] == "failed"}
        for line in lines:
            case = dict(classname=line["job"], name=line["name"], time=str(line.get("seconds", 0)))
            case = ElementTree.SubElement(suite, "testcase", case)
            if line["outcome"] != "passed":
                reason = "".join(c if c.isprintable() else " " for c in line["reason"])
                ElementTree.SubElement(case, line["outcome"].replace("failed", "failure"), message=reason)
        write_atomically(self.folder / "junit.xml", ElementTree.tostring(suite))
        logs = sorted(self.logs.iterdir(), key=lambda log: (log.name not in failed, log.name))
        texts = (f"\n======== {log.name}\n\n{log.read_text(errors='replace')}" for log in logs)
        write_atomically(self.folder / "log.txt", "".join(texts).encode())


def main(argv: list[str] | None = None) -> int:
    phases = [phase for group in PHASES for phase in group]
    parser = argparse.ArgumentParser(prog="gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", choices=phases, help="of its phases, again for more; default: all")
    parser.add_argument("--minutes", type=float, default=3.5, help="for all but the sanitizers (default %(default)g)")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-check"), help="a folder (default %(default)s)")
    parser.add_argument("--workers", type=int, default=max(1, min(8, (os.cpu_count() or 1) // 2)))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: to try the check itself")
    options = parser.parse_args(argv)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's & would have it ignore
    chosen = options.only or phases[: 5 if options.device == "cuda" else 3]  # the last two need a GPU
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // options.workers)))
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.exit(2, "gpu_check: needs an NVIDIA GPU, and torch sees none (--device cpu tries the harness)\n")
    loop.compile_kernels(torch.device(options.device))  # those of csrc/, in nobody's time
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        check, experiments = Check(options.out, Path(folder)), options.out / "experiments.jsonl"
        experiments.unlink(missing_ok=True)
        head = loop.described(options.device, full=True)
        check.add(**head | dict(selection=", ".join(chosen)))
        for backend in ("triton", "cuda") if options.device == "cuda" else ():
            if why := unavailable(backend):
                outcome = "failed" if backend == "triton" else "skipped"  # CUDA's need nvcc, or a wheel that has them
                check.add("job", job=f"{backend} kernels", name="", outcome=outcome, reason=why)
        try:
            for group, share in PHASES.items():
                most = max(share for group, share in PHASES.items() if {*group} & {*chosen})
                until = start + 60 * options.minutes * share / most
                found = [phase for phase in group if phase in chosen]
                if found == ["sanitizers"]:
                    jobs = sanitize.jobs()
                    check.run(jobs, options.workers, time.monotonic() + 60 * SANITIZERS)
                    if not jobs:
                        check.add("job", job="sanitizers", name="", outcome="skipped", reason="no compute-sanitizer")
                elif found == ["experiments"]:
                    minutes = max(0.0, until - time.monotonic()) / 60
                    try:
                        loop.measure(experiments, head, minutes, benches=("check.experiments",))
                    finally:
                        check.add_experiments(experiments)
                else:
                    jobs = [job for phase in found for job in jobs_of(phase)]
                    check.run(jobs, 1 if found == ["timing"] else options.workers, until)
        except (KeyboardInterrupt, Exception) as error:
            check.add("job", job="gpu_check", name="", outcome="failed", reason=message(error))
        check.write()
    words = {"passed": "{line}s passed", "failed": "{line}s failed", "skipped": "{line}s {reason}"}
    counts = Counter(words[line["outcome"]].format(**line) for line in check.lines if "outcome" in line)
    print("", *check.failed, *(f"{number} {what}" for what, number in counts.items()), sep="\n")
    return int(any(not text.startswith("FAILED: sanitizers") for text in check.failed))  # which inform


if __name__ == "__main__":
    sys.exit(main())
