"""Runs generated programs where they can do no harm, and says which are right.

Every process is a sandbox of its own, made by bubblewrap: namespaces that share nothing with the machine, no network,
no files but the Python installation and the system's libraries, read-only. What bubblewrap leaves open, a seccomp
filter and resource limits close: no second process, no other program, bounded memory and files. The tests of an answer
run in a sandbox beside the answer's, so that it can neither read them nor say that they passed (`harness`).
"""

import json
import os
import platform
import resource
import select
import shutil
import struct
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path

from tqdm import tqdm

from .harness import ENDS
from .problems import Problem, extract_code

HARNESS = Path(__file__).with_name("harness.py")
GRACE = 0.5  # seconds
THREADS = 1024  # before Linux 5.14, of all the user's processes together
DESCRIPTORS = 12  # that judging an answer may have open at once


@dataclass(frozen=True)
class Limits:
    """What an answer may use. It has one process, of at most `THREADS` threads, save those of root, which memory and
    time alone bound. Only time bounds how many files it makes; they are gone when it ends."""

    seconds: float = 10.0  # of wall time, for each test and each standard input
    memory_bytes: int = 2**30  # of address space
    file_bytes: int = 2**24  # of all files together
    output_bytes: int = 2**24  # of standard output, and of one returned value with the arguments it changed

    def __post_init__(self):
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"{name} must be positive, not {value}")


@dataclass(frozen=True)
class Verdict:
    passed: bool
    reason: str  # "passed", "wrong answer", "timed out", "out of memory", "exited early", "raised KeyError", …


def judge(
    problems: Sequence[Problem],
    answers: Sequence[Sequence[str]],  # of each problem
    *,
    limits: Limits = Limits(),
    workers: int | None = None,
    progress: bool = False,
) -> list[list[Verdict]]:
    """A verdict on every answer of a chat model to every problem, up to `workers` at once (as many as there are CPUs).

    A right answer passes all tests of its problem and, for each of its standard inputs, ends by itself after
    printing the wanted output (`same_output`). ValueError for answers that do not pair with problems, TypeError for one
    that is no string; RuntimeError, of which `why_not` tells beforehand, where no sandbox can be made: nothing is ever
    run without one."""
    if len(problems) != len(answers) or any(isinstance(a, str) for a in answers):
        raise ValueError(f"expected a list of answers for each of {len(problems)} problems, not {len(answers)} items")
    for i, group in enumerate(answers):
        for j, answer in enumerate(group):
            if not isinstance(answer, str):
                raise TypeError(f"answers[{i}][{j}] must be a string, not {type(answer).__name__}")
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1, not {workers}")
    command = sandbox_command(limits)
    todo = [(problem, answer) for problem, group in zip(problems, answers, strict=True) for answer in group]
    pool = ThreadPoolExecutor(min(workers or os.cpu_count(), _most_workers()))
    try:
        done = pool.map(lambda pair: _judge_one(command, limits, *pair), todo)
        verdicts = iter(list(tqdm(done, "judging", len(todo), unit="answer", disable=not progress)))
    finally:
        pool.shutdown(cancel_futures=True)
    return [[next(verdicts) for _ in group] for group in answers]


def _most_workers() -> int:
    """How many answers this process has file descriptors for."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    most = sys.maxsize if most == resource.RLIM_INFINITY else most - len(os.listdir("/proc/self/fd"))
    return max(1, most // DESCRIPTORS)


def why_not() -> str | None:
    """Why no sandbox can be made here, and what to do about it; None where one can."""
    try:
        sandbox_command(Limits())
    except RuntimeError as error:
        return str(error)
    return None


def sandbox_command(limits: Limits) -> list[str]:
    """The start of a command line that runs `harness` in a sandbox, seen to work. RuntimeError where none does."""
    if sys.platform != "linux" or platform.machine() not in MACHINES:
        here = f"{sys.platform} on {platform.machine()}"
        raise RuntimeError(
            f"generated code runs in a sandbox on Linux on {' or '.join(MACHINES)} alone; this is {here}"
        )
    if shutil.which("bwrap") is None:
        raise RuntimeError(
            "generated code runs in a sandbox of bubblewrap, and there is no bwrap here: apt install bubblewrap, or "
            "dnf install bubblewrap (0.8 or newer)"
        )
    for options in (["--disable-userns"], []):  # which some containers forbid; the seccomp filter does the same
        command = _bwrap(limits, options)
        job = {"role": "program", "prelude": "", "programs": ["print('works')"]}
        with ExitStack() as stack:
            process = _start(stack, command, limits, job, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            out, errors = process.communicate(timeout=60)
        if out == b"works\n":
            return command
    raise RuntimeError(
        f"bubblewrap could not make a sandbox here: {errors.decode(errors='replace').strip()[-500:]}. It must be 0.8 "
        "or newer and may need to be allowed user namespaces: sysctl kernel.unprivileged_userns_clone=1, "
        "kernel.apparmor_restrict_unprivileged_userns=0, user.max_user_namespaces above 0; in Docker, "
        "--security-opt seccomp=unconfined"
    )


def _bwrap(limits: Limits, options: list[str]) -> list[str]:
    python = os.path.realpath(sys._base_executable)  # a virtual environment's own is a link into somebody's home
    stdlib = Path(sysconfig.get_path("stdlib", vars={"installed_base": sys.base_prefix}))
    command = ["bwrap", "--unshare-all", "--unshare-user", "--uid", "65534", "--gid", "65534", "--cap-drop", "ALL"]
    command += ["--as-pid-1", "--die-with-parent", "--new-session", "--clearenv", "--hostname", "sandbox", *options]
    command += ["--size", str(limits.file_bytes), "--tmpfs", "/tmp", "--chdir", "/tmp"]
    for folder in ("/usr/lib", "/usr/lib64", "/lib", "/lib64"):
        if os.path.islink(folder):
            command += ["--symlink", os.readlink(folder), folder]
        else:
            command += ["--ro-bind-try", folder, folder]
    for path in (python, str(stdlib.parent), "/etc/ld.so.cache", "/usr/share/zoneinfo"):
        command += ["--ro-bind-try", path, path]
    for folder in {*stdlib.glob("*-packages"), *Path("/usr/lib").glob("python*/*-packages")}:
        command += ["--size", "4096", "--tmpfs", str(folder), "--remount-ro", str(folder)]
    command += ["--ro-bind", str(HARNESS), "/harness.py", "--remount-ro", "/"]
    return [*command, "--", python, "-I", "-S", "-B", "-X", "utf8", "/harness.py"]


# By platform.machine(): the kernel's number for the architecture, and those of the system calls `clone` and `prctl`.
MACHINES = {"x86_64": (0xC000003E, 56, 157), "aarch64": (0xC00000B7, 220, 167)}
# System calls that are denied, with their numbers on these machines.
DENIED = {
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281), "ptrace": (101, 117),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "unshare": (272, 97), "setns": (308, 268),
    "bpf": (321, 280), "userfaultfd": (323, 282), "perf_event_open": (298, 241), "io_uring_setup": (425, 425),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    # memory that RLIMIT_AS does not count
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "msgget": (68, 186),
    "semget": (64, 190),
    "socket": (41, 198),  # AF_VSOCK reaches past network namespaces; socketpair is a call of its own
}  # fmt: skip


def seccomp_filter(machine: str) -> bytes:
    """A classic BPF program (seccomp(2)) that denies new processes, the calls in `DENIED` and outliving bwrap.
    Threads are allowed."""
    LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
    ALLOW, KILL, EPERM, ENOSYS = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026
    NUMBER, ARCHITECTURE, FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data
    CLONE_THREAD, CLONE3, X32, PR_SET_PDEATHSIG = 0x00010000, 435, 0x40000000, 1
    (audit, clone, prctl), column = MACHINES[machine], list(MACHINES).index(machine)
    program = [(LOAD, 0, 0, ARCHITECTURE), (EQUAL, 1, 0, audit), (RETURN, 0, 0, KILL), (LOAD, 0, 0, NUMBER)]
    program += [(AT_LEAST, 0, 1, X32), (RETURN, 0, 0, KILL)]  # x86-64's other set of numbers
    program += [(EQUAL, 0, 1, CLONE3), (RETURN, 0, 0, ENOSYS)]  # its flags cannot be seen; libc falls back to clone
    for number in filter(None, (numbers[column] for numbers in DENIED.values())):
        program += [(EQUAL, 0, 1, number), (RETURN, 0, 0, EPERM)]
    # the signal with which this process dies when bwrap does
    program += [(EQUAL, 0, 4, prctl), (LOAD, 0, 0, FIRST_ARGUMENT), (EQUAL, 0, 1, PR_SET_PDEATHSIG)]
    program += [(RETURN, 0, 0, EPERM), (LOAD, 0, 0, NUMBER)]
    program += [(EQUAL, 0, 3, clone), (LOAD, 0, 0, FIRST_ARGUMENT), (ANY_BIT, 1, 0, CLONE_THREAD)]
    program += [(RETURN, 0, 0, EPERM), (RETURN, 0, 0, ALLOW)]
    return b"".join(struct.pack("HBBI", *instruction) for instruction in program)


def _memory_file(stack: ExitStack, data: bytes):
    """A file for a sandbox to read; unlike a pipe, it takes all of the data at once."""
    file = stack.enter_context(os.fdopen(os.memfd_create("input"), "r+b"))
    file.write(data)
    file.seek(0)
    return file


def _start(stack: ExitStack, command: list[str], limits: Limits, job: dict, fds: Sequence[int] = (), **streams):
    """Begins a sandbox that has these file descriptors, streams and no other. The end of `stack` is its end."""
    bounds = dict(RLIMIT_AS=limits.memory_bytes, RLIMIT_FSIZE=limits.file_bytes, RLIMIT_CORE=0, RLIMIT_NOFILE=64)
    bounds["RLIMIT_NPROC"] = THREADS
    job = job | {"limits": bounds, "seccomp": seccomp_filter(platform.machine()).hex(), "fds": fds}
    file = _memory_file(stack, json.dumps(job | {"most": limits.output_bytes}).encode())
    streams = dict(stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) | streams
    process = subprocess.Popen(
        [*command, str(file.fileno())], executable=shutil.which("bwrap"), env={}, cwd="/",
        pass_fds=(file.fileno(), *fds), **streams,
    )  # fmt: skip
    stack.enter_context(process)
    stack.callback(_end, process)
    return process


def _end(process: subprocess.Popen) -> None:
    """Kills bwrap, with which all inside dies (--die-with-parent), unless it ends by itself: then it reaps what was
    inside, which otherwise is left to the machine's init, and in a container that may never do it."""
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        process.kill()


def _read(pipe: int, most: int, deadline: float, renewed: float | None = None) -> bytes | str:
    """All that comes until `deadline` of time.monotonic(), also what waits then, since this process may be the slow
    one; or why not all was read. Where `renewed` is given, what comes puts the deadline off by so many seconds."""
    poll, data = select.poll(), bytearray()
    poll.register(pipe, select.POLLIN)
    while poll.poll(max(deadline - time.monotonic(), 0) * 1000):
        part = os.read(pipe, 2**16)
        if not part:
            return bytes(data)
        data += part
        if renewed is not None:
            deadline = time.monotonic() + renewed
        if len(data) > most:
            return "too much output"
    return "timed out"


def _judge_one(command: list[str], limits: Limits, problem: Problem, answer: str) -> Verdict:
    programs = extract_code(answer, problem.names, problem.prelude if problem.continued else "")
    job = {"prelude": problem.prelude, "programs": programs}
    verdict = Verdict(True, "passed")
    if problem.tests:
        verdict = _test(command, limits, problem, job)
    for given, wanted in problem.runs:
        if verdict.passed:
            verdict = _run(command, limits, job, given, wanted)
    return verdict


def _test(command: list[str], limits: Limits, problem: Problem, job: dict) -> Verdict:
    """Runs the tests of a problem: two sandboxes, a pipe each way between them, and one for the verdict."""
    tests = {"role": "tests", "names": problem.names, "setup": problem.setup, "tests": problem.tests}
    deadline = time.monotonic() + limits.seconds
    with ExitStack() as stack:
        ends = [stack.enter_context(open(fd, "wb" if i % 2 else "rb", 0)) for i, fd in enumerate(_pipes(3))]
        ask, asked, reply, replied, verdict, decided = (end.fileno() for end in ends)
        _start(stack, command, limits, job | {"role": "answer"}, [ask, replied])
        _start(stack, command, limits, tests, [reply, asked, decided])
        for end in ends:
            if end.fileno() != verdict:
                end.close()  # a process sees the other's end only when nobody else holds the pipe
        found = _read(verdict, 4096 + len(problem.tests), deadline, limits.seconds)  # a line after every test
    if isinstance(found, str):
        return Verdict(False, found)
    return Verdict(*json.loads(found)) if found else Verdict(False, "the tests broke off")


def _pipes(count: int) -> list[int]:
    return [fd for _ in range(count) for fd in os.pipe()]


def _run(command: list[str], limits: Limits, job: dict, given: str, wanted: str) -> Verdict:
    """Runs an answer as a program with one standard input."""
    deadline = time.monotonic() + limits.seconds
    with ExitStack() as stack:
        stdin = _memory_file(stack, given.encode())
        process = _start(stack, command, limits, job | {"role": "program"}, stdin=stdin, stdout=subprocess.PIPE)
        found = _read(process.stdout.fileno(), limits.output_bytes, deadline)
        if isinstance(found, str):
            return Verdict(False, found)
        try:
            status = process.wait(max(deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            return Verdict(False, "timed out")
    if status:
        return Verdict(False, ENDS.get(status, f"ended with status {status}"))
    passed = same_output(found.decode(errors="replace"), wanted)
    return Verdict(passed, "passed" if passed else "wrong answer")


def same_output(found: str, wanted: str) -> bool:
    """Whether two texts agree as LiveCodeBench has it: stripped, they have as many lines, and each line, stripped, is
    the same text or, split at white space, the same decimal numbers (1.0 is 1.00, and 1 is not 1.0000001)."""
    lines = [[line.strip() for line in text.strip().split("\n")] for text in (found, wanted)]
    if len(lines[0]) != len(lines[1]):
        return False
    return all(a == b or _same_numbers(a, b) for a, b in zip(*lines, strict=True))


def _same_numbers(a: str, b: str) -> bool:
    try:
        return [Decimal(word) for word in a.split()] == [Decimal(word) for word in b.split()]
    except InvalidOperation:
        return False
