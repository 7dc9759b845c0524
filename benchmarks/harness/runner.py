"""Runs the benchmarks in a process of their own, with a progress bar, and goes on after what kills it.

An illegal memory access ends every later call of its process, a segmentation fault the process, a deadlock nothing at
all: each is put down to the provider that was running, in the result file, and a new process measures the rest.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from sfr_kernels.atomic import write_atomically

from .as_json import as_json
from .race import MAKING

HERE = Path(__file__).resolve().parents[1]
# from where sfr_kernels is imported: the checkout, or where the package is installed
ROOT = next(folder for folder in HERE.parents if not (folder / "__init__.py").exists())
# what is measured first is measured if the time does not suffice for all
ORDER = (
    "ceilings", "linear_cross_entropy", "flow_loss", "sfr_loss", "softmax_xent", "norm_act", "flow_mse", "flow_path",
    "velocity_head", "training_step", "targets",
)  # fmt: skip
SILENCE, HURRIED = 600.0, 120.0  # seconds for which a provider may run before that is called hanging; with --minutes
START = 300.0  # the same, for what no provider does: imports
POLL = 0.1


@dataclass(frozen=True)
class Run:
    """What is to be measured, into which file."""

    path: Path
    device: str
    full: bool = False
    only: tuple[str, ...] = ()
    minutes: float | None = None
    seconds: float | None = None


def path_in(folder: Path, device: str, date: str) -> Path:
    where = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    when = re.sub(r"[-:]|\+.*", "", date)
    return folder / f"bench-{where}-{when}.json"


def measure(run: Run, silence: float | None = None) -> str | None:
    """Measures all of it; None, or a line on why something is missing. KeyboardInterrupt ends the process first."""
    silence = silence or (SILENCE if run.minutes is None else HURRIED)
    until = None if run.minutes is None else time.time() + 60 * run.minutes
    with tempfile.TemporaryDirectory(prefix="sfr-bench-") as room, _bar() as bar:
        attempt = 0
        while True:
            attempt += 1
            journal, log = Path(room) / f"journal-{attempt}", Path(room) / f"log-{attempt}"
            before = reported(run.path)
            child = _start(run, until, journal, log, Path(room))
            last = Follower(journal, bar, before)
            reason = _wait(child, last, silence)
            if last.finished:
                return None
            if last.running is not None and not last.died:
                _blame(run.path, last.running, reason)
            elif not last.died:
                return _unexpected(reason, log)
            if reported(run.path) == before:  # nothing came of it: nor would it the next time
                return _unexpected(reason, log)
            bar.write(f"{last.running['group']}, {last.running['who']}: {reason}; going on without it")


def _bar() -> tqdm:
    """Where it is no terminal that it is shown on, a line now and then."""
    return tqdm(unit="result", dynamic_ncols=True, mininterval=0.1 if sys.stderr.isatty() else 10.0)


def files() -> list[Path]:
    return [HERE / f"bench_{op}.py" for op in ORDER]


def _start(run: Run, until: float | None, journal: Path, log: Path, room: Path) -> subprocess.Popen:
    found = files()
    command = [sys.executable, "-m", "pytest", *map(str, found), "-q", "--tb=short"]
    # none of the settings and plugins of whatever project is around
    command += ["-c", os.devnull, "--rootdir", str(ROOT), "--confcutdir", str(found[0].parent)]
    command += ["-p", "no:cacheprovider", "-p", "pytest_benchmark.plugin", "--benchmark-storage", f"file://{room}"]
    command += ["--sfr-device", run.device, "--sfr-results", str(run.path.absolute()), "--sfr-journal", str(journal)]
    command += ["--sfr-full"] * run.full + [part for text in run.only for part in ("--sfr-only", text)]
    command += [] if until is None else ["--sfr-until", str(until)]
    command += [] if run.seconds is None else ["--sfr-seconds", str(run.seconds)]
    environment = os.environ | dict(PYTEST_DISABLE_PLUGIN_AUTOLOAD="1", PYTEST_ADDOPTS="")
    # the same sfr_kernels as here, wherever pytest finds its root
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    journal.touch()
    with open(log, "w") as output:
        return subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
            env=environment,
        )  # fmt: skip


class Follower:
    """Reads a journal as it grows, and moves the bar."""

    def __init__(self, journal: Path, bar: tqdm, before: int):
        self.file, self.bar, self.before = open(journal), bar, before  # noqa: SIM115 (closed by `close`)
        self.running: dict | None = None  # who runs at this moment
        self.finished = self.died = False  # died: of a dead GPU, which it has put down itself
        self.heard, self.rest = time.monotonic(), ""

    def read(self) -> None:
        *lines, self.rest = (self.rest + self.file.read()).split("\n")
        if lines:
            self.heard = time.monotonic()
        for line in lines:
            self._take(json.loads(line))
        if self.running is not None:
            self.bar.set_description_str(self.running["group"], refresh=False)
            self.bar.set_postfix_str(self.running["who"], refresh=sys.stderr.isatty())

    def _take(self, event: dict) -> None:
        kind = event["event"]
        if kind == "plan":
            self.bar.total = self.before + event["tests"]
            self.bar.n = self.before
        elif kind == "running":
            self.running = event
        elif kind == "raced":
            self.running = None
        elif kind == "reported":
            self.bar.update()
        elif kind == "died":
            self.died, self.running = True, event
        elif kind == "finished":
            self.finished = True

    def close(self) -> None:
        self.file.close()


def _wait(child: subprocess.Popen, follower: Follower, silence: float) -> str:
    """Until the process ends; how it ended."""
    try:
        while child.poll() is None:
            follower.read()
            patience = silence if follower.running else START
            if time.monotonic() - follower.heard > patience:
                return f"no answer for {patience:.0f} s, stopped"
            time.sleep(POLL)
        follower.read()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # it, and what it started
        child.wait()
        follower.close()
    if child.returncode < 0:
        return f"the process was ended by {signal.Signals(-child.returncode).name}"
    return f"the process ended with status {child.returncode}"


def reported(path: Path) -> int:
    """How many results and failures a file has."""
    if not path.is_file():
        return 0
    content = json.loads(path.read_text())
    return len(content["benchmarks"]) + len(content["sfr_kernels"]["failed"])


def _blame(path: Path, running: dict, reason: str) -> None:
    """Puts a death down to who was running, unless the process has done so itself."""
    content = json.loads(path.read_text())
    failed, group = content["sfr_kernels"]["failed"], running["group"]
    whose = running["providers"] if running["who"] == MAKING else [running["who"]]
    known = {(f["group"], f["provider"]) for f in failed}
    for provider in whose:
        if (group, provider) not in known:
            ours = provider in running["ours"]
            failed.append(dict(op=running["op"], group=group, provider=provider, ours=ours, reason=reason))
    write_atomically(path, as_json(content).encode())


def _unexpected(reason: str, log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return "\n".join([f"The benchmarks did not finish: {reason}. Its last lines:", *lines[-20:]])
