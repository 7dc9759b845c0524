"""Jobs side by side, each in a process of its own: none outlives its time, its parent, or leaves anything behind."""

import signal
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

from benchmarks import jobs
from benchmarks.jobs import Ended, Job

ROOT = Path(__file__).resolve().parents[1]


def sleep(tell, seconds: float) -> None:
    began = time.monotonic()
    time.sleep(seconds)
    tell(dict(began=began, ended=time.monotonic()))


def stubborn(tell, path: str) -> None:
    """Starts a process that would outlive it, and hears no SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
    Path(path).write_text(str(child.pid))
    time.sleep(600)


def is_gone(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().split()[2] == "Z"


def test_jobs_run_side_by_side_and_one_added_meanwhile_is_waited_for():
    waiting, seen = deque(Job(str(i), sleep, (1.0,)) for i in range(4)), []
    for job, said in jobs.run(waiting, workers=4):
        seen.append((job.name, said))
        if job.name == "0" and isinstance(said, Ended):
            waiting.append(Job("late", sleep, (0.0,)))
    told = [said for name, said in seen if isinstance(said, dict) and name != "late"]
    assert max(said["began"] for said in told) < min(said["ended"] for said in told), "all four at the same time"
    assert seen.count(("late", Ended(None))) == 1 and len(seen) == 10


def test_a_job_that_is_stopped_takes_with_it_what_it_started(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "GRACE", 0.3)
    job = Job("stubborn", stubborn, (str(tmp_path / "pid"),), limit=2.0)
    ((_, ended),) = jobs.run(deque([job]))
    assert ended == Ended("time limit of 2 s, stopped") and is_gone(int((tmp_path / "pid").read_text()))


def test_nothing_survives_the_parent(tmp_path):
    code = "import sys; sys.path[:0] = sys.argv[2:]\nfrom collections import deque\nfrom benchmarks import jobs\n"
    code += "from test_jobs import stubborn\n"
    code += "if __name__ == '__main__': list(jobs.run(deque([jobs.Job('x', stubborn, (sys.argv[1],))])))"
    (tmp_path / "run.py").write_text(code)
    pid = tmp_path / "pid"
    parent = subprocess.Popen([sys.executable, tmp_path / "run.py", pid, ROOT, ROOT / "tests"])
    while not (pid.is_file() and pid.read_text()):
        assert parent.poll() is None
        time.sleep(0.02)
    parent.kill()
    deadline = time.monotonic() + 10
    while not is_gone(int(pid.read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.05)
