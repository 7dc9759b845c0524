"""Jobs side by side, each in a process of its own: what kills one ends no other, and nothing survives the parent.

A process is forked from a server that has imported torch but not touched the GPU: it starts at once, with a context of
its own. To stop it, it gets SIGINT, a few seconds to tell what it has, and SIGKILL with all it has started.
"""

import contextlib
import math
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
POLL = 0.1


@dataclass(frozen=True)
class Job:
    name: str
    function: Callable  # called as function(tell, *arguments), tell a `Tell`
    arguments: tuple = ()
    environment: dict[str, str] = field(default_factory=dict)
    limit: float = 600.0  # seconds in all
    silence: float = 600.0  # seconds without telling anything, after its first word
    log: Path | None = None  # file of what it prints


@dataclass(frozen=True)
class Ended:
    """The last that comes of a job."""

    reason: str | None  # None if its function returned, else why it did not
    late: bool = False  # stopped at the deadline or by an interrupt, and no fault of its own


class Tell:
    """`tell(content)` tells at once; `tell.begin(who)` when the parent next looks, and wakes nobody."""

    def __init__(self, pipe, status, at):
        self.send, self.status, self.at = pipe.send, status, at

    def __call__(self, content: dict) -> None:
        self.send(content)

    def begin(self, who: str) -> None:
        self.status.value, self.at.value = who.encode(), time.monotonic()


class _Process:
    def __init__(self, job: Job, context):
        self.job, self.listening, self.raised, self.stopped, self.kill_at = job, True, None, None, math.inf
        self.late, self.heard, self.seen = False, 0.0, 0.0
        self.status, self.at = context.RawArray("c", 500), context.RawValue("d")
        self.pipe, theirs = context.Pipe(duplex=False)
        arguments = job, theirs, self.status, self.at
        self.process = context.Process(target=_work, args=arguments, name=job.name)
        self.process.start()
        theirs.close()
        self.began = time.monotonic()

    def told(self) -> Iterator[tuple[Job, dict]]:
        try:
            while self.listening and self.pipe.poll():
                content, self.heard = self.pipe.recv(), time.monotonic()
                if isinstance(content, dict):
                    yield self.job, content
                else:
                    self.raised = content
        except (EOFError, OSError):
            self.listening = False
        if self.at.value > self.seen:
            self.seen, self.heard = self.at.value, time.monotonic()
            yield self.job, dict(begin=self.status.value.decode())

    def check(self, until: float) -> None:
        now, job = time.monotonic(), self.job
        if now > self.kill_at:
            self.signal(signal.SIGKILL)
        if self.stopped is not None:
            return
        if now > until:
            self.late = True
            self.stop("the deadline, stopped")
        elif now - self.began > job.limit:
            self.stop(f"time limit of {job.limit:g} s, stopped")
        elif self.heard and now - self.heard > job.silence:
            self.stop(f"no word for {job.silence:g} s, stopped")

    def stop(self, why: str) -> None:
        self.stopped, self.kill_at = why, time.monotonic() + GRACE
        self.signal(signal.SIGINT)

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)

    def ended(self) -> Ended:
        self.process.join()
        self.signal(signal.SIGKILL)  # what it has left behind
        self.pipe.close()
        code = self.process.exitcode
        died = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}" if code else None
        return Ended(self.stopped or self.raised or died, self.late)


def run(
    waiting: deque[Job],  # the caller may append while it iterates
    workers: int = 1,
    until: float = math.inf,  # time.monotonic() after which no job begins, and those that run are stopped
) -> Iterator[tuple[Job, dict | Ended]]:
    """Everything that each job tells, as it comes, and at last its `Ended`. Jobs that were not begun stay in
    `waiting`. An interrupt is a deadline, and raised when all have ended."""
    context, interrupted = multiprocessing.get_context("forkserver"), False
    context.set_forkserver_preload(["torch", f"{__package__}.race"])  # what cannot be imported, it leaves out
    running: dict[int, _Process] = {}  # by the sentinel of its process
    try:
        while running or (waiting and time.monotonic() < until):
            while waiting and len(running) < workers and time.monotonic() < until:
                one = _Process(waiting.popleft(), context)
                running[one.process.sentinel] = one
            try:
                ready = wait([*running, *(one.pipe for one in running.values() if one.listening)], POLL)
            except KeyboardInterrupt:
                ready, until, interrupted = [], -math.inf, True
            for sentinel, one in list(running.items()):
                if sentinel in ready:
                    del running[sentinel]
                    yield from one.told()
                    yield one.job, one.ended()
                else:
                    yield from one.told()
                    one.check(until)
    finally:
        for one in running.values():
            one.stop("the caller stopped")
        for one in running.values():
            one.process.join(max(0.0, one.kill_at - time.monotonic()))
            one.signal(signal.SIGKILL)
            one.ended()
    if interrupted:
        raise KeyboardInterrupt


def _work(job: Job, pipe, status, at) -> None:
    """In the process of a job."""

    def follow() -> None:  # ends the job, and what it started, with the parent
        multiprocessing.parent_process().join()
        os.killpg(0, signal.SIGKILL)

    os.setsid()  # a group of its own, for what it starts, and out of the terminal's reach
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=follow, daemon=True).start()
    os.environ.update(job.environment)
    if job.log is not None:
        with open(job.log, "a") as log:
            sys.stdout.flush()
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
    try:
        job.function(Tell(pipe, status, at), *job.arguments)
    except Exception as error:
        pipe.send(message(error))
        raise


def message(error: Exception) -> str:
    """One line. The error itself would keep alive what its frames hold, gigabytes if that is what it is about."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
