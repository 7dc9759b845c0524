"""Jobs side by side, each in a process of its own: what kills one of them ends no other, and nothing survives the
parent.

A process is forked from a server that has imported torch and has not touched the GPU, so it starts at once and brings a
fresh context. What a job tells comes through a pipe: what it told before it died is there. A job that is to be stopped
gets SIGINT, then a few seconds, so that it can still tell, and then SIGKILL together with all it has started.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path

GRACE = 5.0  # seconds between SIGINT and SIGKILL
POLL = 0.05


@dataclass(frozen=True)
class Job:
    name: str
    function: Callable  # called as function(tell, *arguments); tell takes a dict that can be pickled
    arguments: tuple = ()
    environment: dict[str, str] = field(default_factory=dict)
    limit: float = 600.0  # seconds in all
    silence: float | None = None  # seconds without telling anything
    log: Path | None = None  # file of what it prints


@dataclass(frozen=True)
class Ended:
    """The last that comes of a job. reason: None if its function returned, else why it did not."""

    reason: str | None


class _Running:
    def __init__(self, job: Job, context):
        self.job, self.error, self.why, self.kill_at = job, None, None, 0.0
        self.listening = True
        self.pipe, theirs = context.Pipe(duplex=False)
        self.process = context.Process(target=_work, args=(job, theirs), name=job.name)
        self.process.start()
        theirs.close()
        self.began = self.heard = time.monotonic()

    def told(self) -> Iterator[dict]:
        try:
            while self.listening and self.pipe.poll():
                kind, content = self.pipe.recv()
                self.heard = time.monotonic()
                if kind == "told":
                    yield content
                else:
                    self.error = content
        except (EOFError, OSError):
            self.listening = False

    def check(self, until: float | None) -> None:
        """Stops it where its time is up."""
        now = time.monotonic()
        if self.why is not None:
            if now > self.kill_at:
                self.signal(signal.SIGKILL)
        elif until is not None and now > until:
            self.stop("the deadline, stopped")
        elif now - self.began > self.job.limit:
            self.stop(f"time limit of {self.job.limit:g} s, stopped")
        elif self.job.silence is not None and now - self.heard > self.job.silence:
            self.stop(f"no word for {self.job.silence:g} s, stopped")

    def stop(self, why: str) -> None:
        self.why, self.kill_at = why, time.monotonic() + GRACE
        self.signal(signal.SIGINT)

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)

    def ended(self) -> Ended:
        self.process.join()
        self.signal(signal.SIGKILL)  # what it has left behind
        self.pipe.close()
        code = self.process.exitcode
        if self.why is None and self.error is None and code:
            self.why = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        return Ended(self.why or self.error)


def run(
    waiting: deque[Job],  # the caller may append while it iterates
    workers: int = 1,
    until: float | None = None,  # time.monotonic() at which no job begins any more, and those that run are stopped
) -> Iterator[tuple[Job, dict | Ended]]:
    """Everything that each job tells, as it comes, and at last its `Ended`. Jobs that were not begun stay in
    `waiting`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    running: dict[int, _Running] = {}  # by the sentinel of its process
    try:
        while waiting or running:
            while waiting and len(running) < workers and (until is None or time.monotonic() < until):
                one = _Running(waiting.popleft(), context)
                running[one.process.sentinel] = one
            if not running:
                return
            ready = wait([*running, *(one.pipe for one in running.values() if one.listening)], POLL)
            for sentinel, one in list(running.items()):
                for content in one.told():
                    yield one.job, content
                if sentinel in ready:
                    del running[sentinel]
                    for content in one.told():
                        yield one.job, content
                    yield one.job, one.ended()
                else:
                    one.check(until)
    finally:
        for one in running.values():
            one.stop("the caller stopped")
        for one in running.values():
            one.process.join(max(0.0, one.kill_at - time.monotonic()))
            one.signal(signal.SIGKILL)
            one.process.join()


def _work(job: Job, pipe) -> None:
    """In the process of a job."""
    os.setsid()  # a group of its own, for what it starts, and out of the terminal's reach
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=_follow, daemon=True).start()
    os.environ.update(job.environment)
    if job.log is not None:
        with open(job.log, "a") as log:
            sys.stdout.flush()
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
    try:
        job.function(lambda content: pipe.send(("told", content)), *job.arguments)
    except Exception as error:
        pipe.send(("error", message(error)))
        raise


def _follow() -> None:
    """Ends the job, and what it started, with the parent."""
    multiprocessing.parent_process().join()
    os.killpg(0, signal.SIGKILL)


def message(error: Exception) -> str:
    """One line. The error itself would keep alive what its frames hold, gigabytes if that is what it is about."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
