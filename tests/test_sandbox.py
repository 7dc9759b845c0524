"""What generated code tries beside answering reaches nothing, and does not pass."""

import contextlib
import ctypes
import errno
import os
import platform
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from sfr_kernels.evaluation import sandbox
from sfr_kernels.evaluation.harness import NOT_CARRIED
from sfr_kernels.evaluation.problems import Problem
from sfr_kernels.evaluation.sandbox import Limits, judge, why_not

contained = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
SMALL = Limits(seconds=4.0, memory_bytes=2**28, file_bytes=2**20, output_bytes=2**20)
SQUARE = Problem("square", "", names=("f",), tests=("assert f(2) == 4", "assert f(-3) == 9"))


def reasons(*answers: str) -> list[str]:
    (verdicts,) = judge([SQUARE], [answers], limits=SMALL, workers=2)
    assert all(v.passed == (v.reason == "passed") for v in verdicts)
    return [v.reason for v in verdicts]


# Each says whether it got what it wanted; outside a sandbox, it does.
CURIOUS = {
    "see a file": "import os\ndef got(): return os.path.lexists(SECRET)",
    "read a file": "def got(): return bool(open(SECRET).read())",
    "see the tests": "import os\ndef got(): return os.stat(TESTS).st_size > 0",
    "see a folder": "import os\ndef got(): return bool(os.listdir(os.path.dirname(TESTS)))",
    "see users": "import os\ndef got(): return os.path.exists('/etc/passwd')",
    "see processes": "import os\ndef got(): return os.path.exists('/proc/self')",
    "read the environment": "import os\ndef got(): return bool(set(os.environ) - {'PWD', 'LC_CTYPE'})",
    "connect": "import socket\ndef got(): return bool(socket.create_connection(('127.0.0.1', PORT), 1))",
    "connect to an abstract socket":
        "import socket\ndef got(): return socket.socket(socket.AF_UNIX).connect(ABSTRACT) is None",
    "fork": "import os\ndef got():\n    pid = os.fork()\n    if pid == 0: os._exit(0)\n    return pid > 0",
    "fork past Python": """
import ctypes, os
def got():
    pid = ctypes.CDLL(None).fork()
    if pid == 0: os._exit(0)
    return pid > 0""",
    "spawn": "import subprocess, sys\ndef got(): return subprocess.run([sys.executable, '-c', '']).returncode == 0",
    "execute": "import os, sys\ndef got(): os.execv(sys.executable, [sys.executable, '-c', 'raise SystemExit(0)'])",
    "hide memory": "import os\ndef got(): return os.memfd_create('x') > 0",
    "survive": "import ctypes\ndef got(): return ctypes.CDLL(None).prctl(1, 0, 0, 0, 0) == 0",  # PR_SET_PDEATHSIG
    "start many threads":
        "import resource\ndef got(): return resource.getrlimit(resource.RLIMIT_NPROC)[0] not in range(1, 1025)",
    "trace": "import ctypes\ndef got(): return ctypes.CDLL(None).ptrace(0, 0, 0, 0) == 0",
    "take much memory": "def got(): return len(bytearray(2**29)) > 0",
    "write much": """
import tempfile
def got():
    with tempfile.TemporaryDirectory() as folder:
        for i in range(8):
            with open(f"{folder}/{i}", "wb") as file: file.write(bytes(2**19))
    return True""",
    "write a large file": """
import tempfile
def got():
    with tempfile.TemporaryFile() as file: return file.write(bytes(2**21)) and file.flush() is None""",
    "write beside": """
import os
def got():
    os.mkdir(os.path.join(os.path.dirname(SECRET), 'made'))
    return True""",
}  # fmt: skip
# Each would harm, or lies about how it did. With the reason, or where it depends on the moment, none.
HOSTILE = {
    "fork bomb": ("import os\nwhile True: os.fork()", "raised PermissionError"),
    "kill all": ("import os\nos.kill(-1, 9)", "raised ProcessLookupError"),
    "kill the sandbox": ("import os\nos.kill(1, 9)\nos.kill(os.getppid(), 15)", "raised NameError"),
    "delete": ("import os\nos.remove(SECRET)", "raised FileNotFoundError"),
    "delete a folder": ("import os, shutil\nshutil.rmtree(os.path.dirname(SECRET))", "raised FileNotFoundError"),
    "delete all": ("import shutil\nshutil.rmtree('/')", "raised OSError"),
    "overwrite Python": ("import os\nopen(os.__file__, 'w')", "raised OSError"),
    "write beside its folder": ("open('/x', 'w')", "raised OSError"),
    "write into Python": ("import os\nopen(os.path.dirname(os.__file__) + '/site-packages/x', 'w')", "raised OSError"),
    "endless file": ("file = open('x', 'wb')\nwhile True: file.write(bytes(2**16))", "raised OSError"),
    "endless printing": ("while True: print('passed' * 999)", "timed out"),
    "endless reply": (
        "import os\nwhile True:\n    for fd in range(3, 64):\n"
        "        try: os.write(fd, b'x' * 65536)\n        except OSError: pass",
        "too much output"),
    "large value": ("def f(x): return 'x' * 2**21", "raised ValueError"),
    "endless iterator": ("import itertools\ndef f(x): return itertools.count()", NOT_CARRIED),
    "endless nesting": ("def f(x):\n    x = []\n    x.append(x)\n    return x", NOT_CARRIED),
    "memory bomb": ("x = [0]\nwhile True: x += x", "out of memory"),
    "one large block": ("x = bytearray(2**40)", "out of memory"),
    "endless loop": ("while True: pass", "timed out"),
    "recursion": ("def f(x): return f(x)", "raised RecursionError"),
    "recursion of the C stack": (
        "import sys\nsys.setrecursionlimit(10**9)\nclass A:\n"
        "    def __getattr__(self, n): return getattr(self, n + '')\ndef f(x): return A().y", None),
    "thread bomb": (
        "import threading, time\nthreading.stack_size(2**16)\n"
        "while True: threading.Thread(target=time.sleep, args=(99,)).start()", None),
    "leave": ("import sys\nsys.exit(0)", "exited early"),
    "leave in a call": ("import sys\ndef f(x): sys.exit(0)", "exited early"),
    "leave at once": ("import os\nos._exit(0)", "exited early"),
    "leave halfway": ("import os\ndef f(x): return 4 if x == 2 else os._exit(0)", "exited early"),
    "crash": ("import ctypes\nctypes.string_at(0)", "exited early"),
    "interrupt": ("def f(x): raise KeyboardInterrupt", "raised KeyboardInterrupt"),
    "print marks": ("for mark in ('passed', '[true, \"passed\"]', 'ok'): print(mark)\ndef f(x): pass", "wrong answer"),
    "write marks": (
        "import os\nfor fd in range(64):\n    try: os.write(fd, b'[true, \"passed\"]\\n')\n    except OSError: pass",
        "broken reply"),
    "deep reply": (
        "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'[' * 60000 + b'\\n')\n    except OSError: pass",
        "broken reply"),
    "no assertions": (
        "import builtins\nbuiltins.AssertionError = type('A', (BaseException,), {})\n"
        "builtins.__build_class__ = None\ndef f(x): return 5", "wrong answer"),
    "patched builtins": (
        "import builtins\nbuiltins.isinstance = builtins.hasattr = builtins.abs = lambda *a: True\ndef f(x): return 5",
        None),
    "own tests": ("def check(*a): pass\ntests = None\n__name__ = 'tests'\ndef f(x): return 5", "wrong answer"),
    "patched harness": (
        "import sys\nfor name in ('encode', 'raised', 'update', 'Tests'):\n"
        "    setattr(sys.modules['__main__'], name, lambda *a: {'value': True})\ndef f(x): return 5", None),
    "equal to all": ("class E:\n    def __eq__(self, o): return True\ndef f(x): return E()", "wrong answer"),
    "lying int": ("class L(int):\n    def __eq__(self, o): return True\ndef f(x): return L(5)", "wrong answer"),
    "deaf to signals": (  # also to that of the parent's death
        "import ctypes, signal, time\nctypes.CDLL(None).prctl(1, 0, 0, 0, 0)\n"
        "for s in set(signal.valid_signals()) - {9, 19}: signal.signal(s, signal.SIG_IGN)\nsignal.alarm(1)\n"
        "while True: time.sleep(9)", "timed out"),
    "stopped": ("import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)", "raised NameError"),  # an init, it goes on
    "close all": ("import os\nos.closerange(0, 999)", "exited early"),
    "look for the tests": ("""
import gc, sys
def f(x):  # the text it looks for stands here backwards, since it would find itself
    frame, seen = sys._getframe(), gc.get_objects()
    while frame:
        seen += [frame.f_locals, frame.f_globals]
        frame = frame.f_back
    texts = (str(vars(o) if hasattr(o, '__dict__') else o) for o in seen)
    return x * x if any('2(f tressa' in text[::-1] for text in texts) else 5""", "wrong answer"),
}  # fmt: skip


@pytest.fixture
def world(tmp_path, monkeypatch):
    """What an answer could want: a file, a secret in the environment, listening sockets. As definitions for answers."""
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    monkeypatch.setenv("SFR_SECRET", "secret")
    name = f"\0sfr-{os.getpid()}-{tmp_path}"
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as local:
        local.bind(name)
        local.listen()
        for listening in (server, local):
            listening.setblocking(False)
        places = dict(SECRET=str(secret), TESTS=__file__, PORT=server.getsockname()[1], ABSTRACT=name)
        yield "".join(f"{k} = {v!r}\n" for k, v in places.items()), secret, (server, local)


@contained
def test_what_is_denied_would_be_had_outside(world):
    definitions, secret, listening = world
    for what, code in CURIOUS.items():
        code = f"{definitions}{code}\nraise SystemExit(0 if got() else 1)"
        assert subprocess.run([sys.executable, "-c", code]).returncode == 0, what
    assert (secret.parent / "made").is_dir() and all(server.accept() for server in listening)
    finding = HOSTILE["look for the tests"][0] + "\ntests = 'assert f(2) == 4'\nexec(tests)"
    assert subprocess.run([sys.executable, "-I", "-S", "-c", finding]).returncode == 0


@contained
def test_nothing_is_had_inside(world):
    definitions, secret, listening = world
    answers = [f"{definitions}{code}\ndef f(x): return x * x if got() else None" for code in CURIOUS.values()]
    found = reasons(*answers, "def f(x): return x * x")
    assert found.pop() == "passed"
    for what, reason in zip(CURIOUS, found, strict=True):
        assert reason.startswith(("wrong answer", "raised ", "out of memory")), (what, reason)
        assert reason != "raised NameError", what  # a slip in the answer
    for server in listening:
        with pytest.raises(BlockingIOError):
            server.accept()
    assert [path.name for path in secret.parent.iterdir()] == ["secret.txt"]


def inside(name: str) -> list[int]:
    """Processes that have a file of this name mounted."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            found += [int(folder.name)] if name in (folder / "mountinfo").read_text() else []
    return found


@contained
@pytest.mark.slow
def test_the_hostile_fail_and_nothing_is_left_of_them(world, tmp_path, monkeypatch):
    definitions, secret, _ = world
    mine = Path(__file__).read_bytes()
    marked = tmp_path / f"harness-{os.getpid()}-{time.time_ns()}.py"
    shutil.copy(sandbox.HARNESS, marked)
    monkeypatch.setattr(sandbox, "HARNESS", marked)
    answers = [definitions + code for code, _ in HOSTILE.values()]
    found, seen = [], set()
    judging = threading.Thread(target=lambda: found.extend(reasons(*answers)))
    judging.start()
    while judging.is_alive():
        seen |= set(inside(marked.name))
        judging.join(0.2)
    for (what, (_, reason)), got in zip(HOSTILE.items(), found, strict=True):
        assert got != "passed" and reason in (None, got), (what, got)
    assert secret.read_text() == "secret" and Path(__file__).read_bytes() == mine
    deadline = time.monotonic() + 5
    while inside(marked.name) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert seen and not inside(marked.name)


def children() -> set[str]:
    """This process's, and who was left to it."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            found |= {folder.name} if f"PPid:\t{os.getpid()}\n" in (folder / "status").read_text() else set()
    return found


def test_what_waits_at_the_deadline_is_read():
    read, write = os.pipe()
    os.write(write, b"x" * 2**16)
    assert sandbox._read(read, 2**17, time.monotonic() - 1) == "timed out"
    os.write(write, b"x" * 9)
    os.close(write)
    assert sandbox._read(read, 2**17, time.monotonic() - 1) == b"x" * 9
    os.close(read)


@contained
def test_answers_that_end_leave_nothing_for_init_to_reap():
    """In many containers nobody does."""
    PR_SET_CHILD_SUBREAPER = 36
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    try:
        before = children()
        reasons(*["def f(x): return x * x", "import os\nos._exit(0)"] * 5)
        assert children() == before
    finally:
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 0)


def no_sandbox(monkeypatch, reason):
    if reason == "Linux":
        monkeypatch.setattr(sys, "platform", "darwin")
    elif reason == "x86_64 or aarch64":
        monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    elif reason == "apt install bubblewrap":
        monkeypatch.setattr(shutil, "which", lambda name: None)
    else:  # a bwrap that is forbidden to make namespaces
        said = "echo bwrap: No permissions to create new namespace >&2; exit 1"
        monkeypatch.setattr(sandbox, "_bwrap", lambda *args: ["sh", "-c", said])
        monkeypatch.setattr(shutil, "which", lambda name: "/bin/sh")


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in sandbox.MACHINES, reason="needs such a machine"
)
@pytest.mark.parametrize("reason", ["Linux", "x86_64 or aarch64", "apt install bubblewrap", "No permissions to create"])
def test_without_a_sandbox_nothing_runs_and_the_reason_is_in_words(reason, monkeypatch, tmp_path):
    no_sandbox(monkeypatch, reason)
    assert reason in why_not()
    with pytest.raises(RuntimeError, match=reason):
        judge([SQUARE], [[f"open({str(tmp_path / 'ran')!r}, 'w')"]])
    assert not (tmp_path / "ran").exists()
    assert reason != "No permissions to create" or "unprivileged_userns_clone" in why_not()


def filtered(program: bytes, architecture: int, number: int, argument: int = 0) -> int:
    """What a classic BPF program returns for a system call, by the manual of seccomp(2)."""
    data = struct.pack("<iIQQ", number, architecture, 0, argument)
    at, value = 0, None
    while True:
        code, yes, no, k = struct.unpack_from("HBBI", program, 8 * at)
        if code == 0x06:  # BPF_RET | BPF_K
            return k
        if code == 0x20:  # BPF_LD | BPF_W | BPF_ABS
            (value,) = struct.unpack_from("<I", data, k)
            at += 1
        else:
            met = {0x15: value == k, 0x35: value >= k, 0x45: bool(value & k)}[code]  # BPF_JMP: JEQ, JGE, JSET
            at += 1 + (yes if met else no)


# A call that is allowed; clone; prctl; and the numbers of those denied, as the kernel's headers have them.
CALLS = {
    "x86_64": (
        0xC000003E, 0, 56, 157,
        {57: "fork", 58: "vfork", 59: "execve", 101: "ptrace", 319: "memfd_create", 64: "semget", 41: "socket"}),
    "aarch64": (
        0xC00000B7, 56, 220, 167,
        {221: "execve", 117: "ptrace", 279: "memfd_create", 281: "execveat", 190: "semget", 198: "socket"}),
}  # fmt: skip


@pytest.mark.parametrize("machine", CALLS)
def test_the_filter_lets_threads_through_and_processes_not(machine):
    program = sandbox.seccomp_filter(machine)
    here, read, clone, prctl, denied = CALLS[machine]
    allow, refuse, kill = 0x7FFF0000, 0x00050000, 0x80000000
    thread = 0x00010000
    assert filtered(program, here, read) == allow
    assert filtered(program, here, clone, thread | 0x100) == allow
    assert filtered(program, here, clone, 17) == refuse | errno.EPERM
    assert filtered(program, here, 435, thread) == refuse | errno.ENOSYS  # clone3
    assert filtered(program, here, prctl, 1) == refuse | errno.EPERM  # PR_SET_PDEATHSIG
    assert filtered(program, here, prctl, 15) == allow  # PR_SET_NAME, for threads
    assert {filtered(program, here, number) for number in denied} == {refuse | errno.EPERM}
    assert filtered(program, 0x40000003, read) == filtered(program, here, 0x40000000 | read) == kill
