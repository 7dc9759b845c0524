"""`make gpu-check` on planted test files: what crashes, hangs or kills the GPU is named, and costs nothing but itself."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from benchmarks import jobs
from benchmarks.check import gpu_check, plugin, sanitize

CPU = torch.device("cpu")
HEAD = "import os, signal, time\nimport pytest, torch\npytestmark = pytest.mark.gpu\n"
CRASH = "os.kill(os.getpid(), signal.SIGSEGV)"
PLANTED = {
    "test_crash.py": f"def test_a(): pass\ndef test_b(): {CRASH}\ndef test_c(): pass\ndef test_d(): {CRASH}\n",
    "test_fail.py": """def test_wrong(): assert 1 + 1 == 3, "planted"
def test_away(): pytest.skip("not here")
def test_stumbles(record_property): record_property("worst", "hidden")
@pytest.fixture
def broken():
    yield
    raise OSError("while clearing up")
def test_twice(broken): assert False, "first"
""",
    "test_gpu_dead.py": """from benchmarks.check import plugin
def test_kills():
    plugin.gpu_error = lambda: "CUDA error: planted"
    assert False, "a wrong number"
def test_lives(): assert plugin.gpu_error() is None
""",
    "test_import.py": "import no_such_module\n",
    "test_hang.py": "def test_hangs(): time.sleep(60)\ndef test_rest(): pass\n",
    "test_whole.py": 'pytest.skip("all of it", allow_module_level=True)\n',
}


def checked(tmp_path, monkeypatch, planted, *options, silence=4.0) -> tuple[int, dict, list[dict]]:
    """Exit status, and lines by name and in order, of a check of these files alone."""
    folder, out = tmp_path / "tests", tmp_path / "out"
    (folder / "triton_leaves").mkdir(parents=True)
    for name, text in planted.items():
        (folder / name).write_text(HEAD + text)
    monkeypatch.setattr(gpu_check, "FOLDER", folder)
    monkeypatch.setattr(gpu_check, "SILENCE", silence)
    status = gpu_check.main(["--device", "cpu", "--out", str(out), *(options or ("--only", "tests"))])
    assert sorted(file.name for file in out.iterdir()) == ["gpu-check.jsonl", "junit.xml", "log.txt"]
    run, *lines = (json.loads(line) for line in (out / "gpu-check.jsonl").read_text().splitlines())
    assert run["line"] == "run" and run["device"]["kind"] == "cpu" and run["versions"]["torch"] == torch.__version__
    cases = ElementTree.parse(out / "junit.xml").getroot().findall("testcase")
    assert [(c.get("classname"), c.get("name")) for c in cases] == [(line["job"], line["name"]) for line in lines]
    assert [c.find("failure") is not None for c in cases] == [line["outcome"] == "failed" for line in lines]
    return status, {line["name"]: line for line in lines if line["name"]}, lines


def test_each_fault_costs_its_own_test_and_the_rest_goes_on(tmp_path, monkeypatch, capfd):
    status, tests, lines = checked(tmp_path, monkeypatch, PLANTED)
    outcomes = {name: test["outcome"] for name, test in tests.items()}
    passed, failed = (sorted(n for n, outcome in outcomes.items() if outcome == which) for which in ("passed", "failed"))
    assert status == 1
    assert passed == ["test_a", "test_c", "test_lives", "test_rest", "test_stumbles"]
    assert failed == ["test_b", "test_d", "test_hangs", "test_import.py", "test_kills", "test_twice", "test_wrong"]
    assert tests["test_away"]["reason"] == "not here" and tests["test_whole.py"]["reason"] == "all of it"
    assert {n for n, t in tests.items() if t.get("culprit")} == {"test_b", "test_d", "test_hangs", "test_kills"}
    reasons = {
        "test_b": ["ended by SIGSEGV"], "test_hangs": ["no word for 4 s"], "test_wrong": ["planted", "assert (1 + 1) == 3"],
        "test_twice": ["first", "while clearing up"], "test_import.py": ["no_such_module"],
        "test_kills": ["a wrong number", "leaves the GPU dead: CUDA error: planted"],
    }  # fmt: skip
    said = capfd.readouterr().out
    for name, words in reasons.items():
        assert all(word in tests[name]["reason"] for word in words), tests[name]
        assert f"{name}: {tests[name]['reason']}" in said.split("\n\n")[-1]  # the summary
    assert tests["test_stumbles"]["worst"] == "hidden" and tests["test_stumbles"]["seconds"] >= 0
    assert {line["job"]: line["outcome"] for line in lines if line["line"] == "job"} == {
        f"{name} gpu": "passed" for name in PLANTED
    }
    log = (tmp_path / "out/log.txt").read_text()
    assert "Segmentation fault" in log and log.rindex("======== test_hang") < log.index("======== test_whole")


def test_at_the_deadline_reasons_are_kept_and_what_is_left_is_counted(tmp_path, monkeypatch):
    text = """@pytest.fixture
def slow():
    yield
    time.sleep(60)
def test_first(): pass
def test_known(slow): assert False, "known by then"
def test_later(): pass
"""
    began = time.monotonic()
    status, tests, lines = checked(
        tmp_path, monkeypatch, {"test_slow.py": text, "test_z.py": "def test_z(): pass"}, "--only", "tests", "--minutes",
        "0.15", "--workers", "1", silence=60.0,
    )  # fmt: skip
    assert status == 1 and time.monotonic() - began < 30
    assert tests["test_first"]["outcome"] == "passed" and tests["test_known"]["outcome"] == "failed"
    assert "known by then" in tests["test_known"]["reason"] and "the deadline" in tests["test_known"]["reason"]
    left = {line["job"]: line["reason"] for line in lines if line["line"] == "job"}
    assert left["test_slow.py gpu"].startswith("1 tests not come to") and left["test_z.py gpu"] == "not come to"


def test_timing_tests_run_alone_after_the_others(tmp_path, monkeypatch):
    text = "@pytest.mark.timing\ndef test_times(): pass\ndef test_else(): pass\n"
    status, _, lines = checked(tmp_path, monkeypatch, {"test_t.py": text}, "--only", "timing", "--only", "tests")
    assert status == 0 and [line["name"] for line in lines if line["name"]] == ["test_else", "test_times"]


def test_nothing_survives_a_parent_that_is_killed(tmp_path):
    (tmp_path / "tests").mkdir()
    pids = tmp_path / "pids"
    text = f"import subprocess\ndef test_child():\n    child = subprocess.Popen(['sleep', '100'])\n    open({str(pids)!r}, 'w')"
    text += ".write(f'{os.getpid()} {child.pid} ')\n    time.sleep(100)\n"
    (tmp_path / "tests/test_child.py").write_text(HEAD + text)
    script = tmp_path / "script.py"
    script.write_text(
        f"from pathlib import Path\nfrom benchmarks.check import gpu_check\ngpu_check.FOLDER = Path({str(tmp_path / 'tests')!r})\n"
        f"if __name__ == '__main__': gpu_check.main(['--device', 'cpu', '--only', 'tests', '--out', {str(tmp_path / 'out')!r}])\n"
    )
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    parent = subprocess.Popen([sys.executable, str(script)], env=os.environ | {"PYTHONPATH": path})
    wait_for(lambda: pids.exists() and pids.read_text().endswith(" "), 60)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    for pid in map(int, pids.read_text().split()):
        wait_for(lambda pid=pid: not running(pid), 20)


def wait_for(condition, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
