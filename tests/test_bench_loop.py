"""A run of the benchmarks, from its start to its file: what kills a provider ends nothing else, and nothing is lost.

And the jobs that it is made of, each in a process of its own: none outlives its time or its parent.
"""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

import pytest
import torch

from benchmarks import jobs, loop, machine
from benchmarks.jobs import Ended, Job
from sfr_kernels import commands

ROOT = Path(__file__).resolve().parents[1]
EVERYONE = {"triton", "torch", "eager"}


@pytest.fixture
def planted(monkeypatch, tmp_path):
    """What each provider does → the planted suite is measured in the place of the real ones."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loop, "BENCHES", ("planted_bench",))

    def plant(**what: str) -> Path:
        Path("planted.json").write_text(json.dumps(what))
        return tmp_path / "bench.jsonl"

    return plant


def wait_until(happened, process: subprocess.Popen | None = None) -> None:
    """Fails where the process ends before, or after a minute."""
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline and (process is None or process.poll() is None)
        time.sleep(0.02)


def measure(path: Path, minutes: float = math.inf, **selection) -> bool:
    return loop.measure(path, loop.described("cpu", **selection), minutes)


def found(path: Path, kind: str) -> dict[str, set[str]]:
    """Case → providers that have such a line."""
    found = {}
    for line in loop.lines_of(path):
        if line["line"] == kind:
            found.setdefault(line["label"], set()).add(line.get("provider"))
    return found


def test_a_run_writes_where_it_was_made_and_every_sample_in_the_order_of_worth(planted):
    path = planted()
    assert measure(path)
    head, *lines, end = loop.lines_of(path)
    assert head["line"] == "run" and head["selection"] == "quick" and end == {"line": "end"}
    assert head["versions"]["torch"] == torch.__version__ and head["device"]["threads"] >= 1
    assert found(path, "result") == {"first": EVERYONE, "second": EVERYONE} and not found(path, "failed")
    assert list(dict.fromkeys(line["label"] for line in lines)) == ["first", "second"], "by worth, not as listed"
    assert {(x["provider"], x["reason"]) for x in lines if x["line"] == "absent"} == {("quack", "not installed")}
    result = next(line for line in lines if line["line"] == "result")
    assert len(result["samples_ms"]) >= 10 and sorted(result["samples_ms"])[0] < 5 and result["kind"] == "ours"


ILLEGAL = "DeadGPUError: illegal memory access; the GPU answered nothing after that"


@pytest.mark.parametrize(
    "planned",
    [
        dict(eager=("crash", "ended by SIGSEGV"), triton=("wrong", "WrongResultError: hidden: error 1.0e+00")),
        dict(torch=("late-dead", ILLEGAL), eager=("late-memory", "OutOfMemoryError: planted")),
        dict(eager=("dead", ILLEGAL)),
        dict(torch=("memory", "OutOfMemoryError: planted"), eager=("late-crash", "ended by SIGSEGV")),
        dict(eager=("hang", "no word for 8 s")),
    ],
    ids=lambda planned: ", ".join(how for how, _ in planned.values()),
)
def test_what_kills_or_fails_a_provider_costs_it_one_case_and_nobody_else(planned, planted, monkeypatch):
    monkeypatch.setattr(loop, "SILENCE", dict(cpu=8.0))
    path = planted(**{who: how for who, (how, _) in planned.items()})
    assert measure(path) == (set(planned) == {"eager"}), "a peer's failure is not ours"
    assert found(path, "result") == {"first": EVERYONE - set(planned), "second": EVERYONE}
    assert found(path, "failed") == {"first": set(planned)} and loop.lines_of(path)[-1] == {"line": "end"}
    for line in loop.lines_of(path):
        if line["line"] == "failed":
            assert planned[line["provider"]][1] in line["reason"] and "\n" not in line["reason"]


def test_a_case_that_kills_the_process_as_it_is_made_ends_nothing_else(planted):
    path = planted(making="crash")
    assert not measure(path)
    assert found(path, "result") == {"second": EVERYONE} and found(path, "failed") == {"first": EVERYONE}


def test_a_run_that_was_killed_has_what_it_had_and_goes_on_where_it_was(planted, capsys):
    path = planted()
    assert measure(path)
    whole = path.read_text()
    until_second = whole[: whole.index('"second"')]  # half a line at its end
    path.write_text(until_second)
    assert commands.main(["bench", "--resume", str(path)]) == 0
    after = path.read_text()
    assert after.startswith(until_second[: until_second.rindex("\n") + 1])
    assert found(path, "result") == {"first": EVERYONE, "second": EVERYONE}
    assert after.count('"first"') == whole.count('"first"'), "what it had is not measured again"
    assert "first" in capsys.readouterr().out


def test_an_interrupt_leaves_the_finished_cases_and_says_how_to_go_on(planted):
    planted(case="second", eager="hang")
    code = "import sys; from benchmarks import loop; loop.BENCHES = 'planted_bench',"
    code += "\nfrom sfr_kernels.commands import main\n"
    code += "if __name__ == '__main__': sys.exit(main(['bench', '--device', 'cpu', '--full', '--out', 'out']))"
    Path("run.py").write_text(code)
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    heard = dict(preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler), stderr=subprocess.PIPE)
    process = subprocess.Popen([sys.executable, "run.py"], text=True, env=os.environ | {"PYTHONPATH": path}, **heard)
    wait_until(lambda: any('"result"' in p.read_text() for p in Path("out").glob("*.jsonl")), process)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "--resume" in said, said
    (file,) = Path("out").glob("*.jsonl")
    assert found(file, "result") == {"first": EVERYONE} and not found(file, "failed")


def test_another_machine_version_or_revision_is_not_gone_on_with(planted):
    path, head = planted(), loop.described("cpu")
    for where, name in (("versions", "torch"), ("device", "name"), (None, "revision")):
        changed = json.loads(json.dumps(head))
        (changed if where is None else changed[where])[name] = "1.0"
        path.write_text(json.dumps(changed) + "\n")
        with pytest.raises(ValueError, match=rf"cannot be gone on with: {name} 1\.0, now"):
            loop.measure(path, head)


def test_what_the_time_does_not_suffice_for_is_said_and_made_up_for(planted):
    path = planted()
    assert measure(path, minutes=0.0)
    assert not found(path, "result") and set(found(path, "skipped")) == {"first", "second"}
    assert "end" not in [line["line"] for line in loop.lines_of(path)]
    assert measure(path, minutes=5.0) and found(path, "result") == {"first": EVERYONE, "second": EVERYONE}


def test_a_selection_is_of_whole_words_of_all_cases(planted):
    path = planted()
    assert measure(path, only=("third", "planted: fir"))
    assert set(found(path, "result")) == {"third"}
    with pytest.raises(ValueError, match="no case contains thir or bfloat16"):
        measure(path.with_name("none"), only=("thir", "bfloat16"))


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
    code += "from test_bench_loop import stubborn\n"
    code += "if __name__ == '__main__': list(jobs.run(deque([jobs.Job('x', stubborn, (sys.argv[1],))])))"
    (tmp_path / "run.py").write_text(code)
    pid = tmp_path / "pid"
    parent = subprocess.Popen([sys.executable, tmp_path / "run.py", pid, ROOT, ROOT / "tests"])
    wait_until(lambda: pid.is_file() and pid.read_text(), parent)
    parent.kill()
    wait_until(lambda: is_gone(int(pid.read_text())))


def test_bad_input_is_one_line(tmp_path, capsys):
    (tmp_path / "not.json").write_text("{")
    missing, wrong = str(tmp_path / "none"), str(tmp_path / "not.json")
    for arguments in (["--resume", missing], ["--resume", wrong], ["compare", "x", "y"], ["report", wrong]):
        assert commands.main(["bench", *arguments]) == 2
        said = capsys.readouterr().err
        assert said.strip() and "Traceback" not in said
    if not torch.cuda.is_available():
        assert commands.main(["bench", "--device", "cuda"]) == 2 and "no GPU" in capsys.readouterr().err


def test_where_it_ran_is_read_from_nvidia_smi(monkeypatch):
    monkeypatch.setattr(machine, "_output", lambda *command: "1980, 2619, 1980, 2619, [N/A]")
    assert list(machine.clocks().values()) == [1980.0, 2619.0, 1980.0, 2619.0, None]
    monkeypatch.setattr(machine, "_output", lambda *command: None)
    assert machine.clocks() is None


def test_the_real_benchmarks_through_the_command_of_a_wheel(tmp_path):
    """One kernel, from the command to the report, outside of any checkout."""
    source, site = tmp_path / "source", tmp_path / "site-packages"
    for name in ("sfr_kernels", "csrc", "benchmarks"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "setup.py", "-q", "bdist_wheel", "--dist-dir", str(site)]
    subprocess.run(build, cwd=source, env=os.environ | dict(SFR_BUILD_CUDA="0"), check=True, capture_output=True)
    shutil.unpack_archive(next(site.glob("*.whl")), site, "zip")
    assert not (site / "sfr_kernels/benchmarks/results").exists()
    assert all((site / "sfr_kernels" / name).is_file() for name in ("py.typed", "kernels/fastest.json"))
    arguments = ["--device", "cpu", "--out", "here", "--only", "flow_mse"]
    done = subprocess.run([sys.executable, "-m", "sfr_kernels", "bench", *arguments], cwd=tmp_path, text=True,
                          capture_output=True, env=os.environ | dict(PYTHONPATH=str(site)))  # fmt: skip
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "here").glob("bench-*.jsonl")
    assert loop.lines_of(path)[0]["revision"] is None
    assert {line["provider"] for line in loop.lines_of(path) if line["line"] == "result"} == {"torch", "eager", "limit"}
    assert "flow_mse" in done.stdout and path.with_suffix(".html").stat().st_size > 10**6


@pytest.mark.slow
def test_pytest_times_a_case_with_pytest_benchmark(tmp_path):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "benchmarks", "-k", "flow_mse and torch",
               f"--benchmark-json={tmp_path / 'found.json'}"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    (entry,) = json.loads((tmp_path / "found.json").read_text())["benchmarks"]
    assert entry["stats"]["rounds"] >= 10 and entry["extra_info"]["errors"]["loss"]["ratio"] <= 1
