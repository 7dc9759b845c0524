"""`make gpu-check` on planted test files: what crashes, hangs or kills the GPU is named, and costs only itself."""

import json
import sys
import time
from xml.etree import ElementTree

import pytest
import torch
from check import gpu_check, sanitize

from benchmarks import problem

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
    "test_gpu_dead.py": """def die(): raise RuntimeError("CUDA error: planted")
def test_kills():
    torch.cuda.is_initialized, torch.cuda.synchronize = lambda: True, die
    assert False, "a wrong number"
def test_lives(): assert torch.cuda.synchronize is not die
""",
    "test_import.py": "import no_such_module\n",
    "test_hang.py": "def test_hangs(): time.sleep(60)\ndef test_rest(): pass\n",
    "test_whole.py": 'pytest.skip("all of it", allow_module_level=True)\n',
}


def checked(tmp_path, monkeypatch, planted, *options, silence=4.0) -> tuple[int, dict, list[dict]]:
    """Exit status, and lines by name and in order, of a check of these files alone."""
    folder, out = tmp_path / "tests", tmp_path / "out"
    (folder / "kernels").mkdir(parents=True)
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
    of = {which: sorted(n for n, test in tests.items() if test["outcome"] == which) for which in ("passed", "failed")}
    assert of["passed"] == ["test_a", "test_c", "test_lives", "test_rest", "test_stumbles"]
    wrong = ["test_b", "test_d", "test_hangs", "test_import.py", "test_kills", "test_twice", "test_wrong"]
    assert status == 1 and of["failed"] == wrong
    assert "not here" in tests["test_away"]["reason"] and "all of it" in tests["test_whole.py"]["reason"]
    assert {n for n, t in tests.items() if t.get("culprit")} == {"test_b", "test_d", "test_hangs", "test_kills"}
    reasons = {
        "test_b": ["ended by SIGSEGV"], "test_hangs": ["no word for 4 s"], "test_wrong": ["planted", "(1 + 1) == 3"],
        "test_twice": ["first", "while clearing up"], "test_import.py": ["no_such_module"],
        "test_kills": ["a wrong number", "leaves the GPU dead: RuntimeError: CUDA error: planted"],
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
    planted = {"test_slow.py": text, "test_z.py": "def test_z(): pass"}
    options = "--only", "tests", "--minutes", "0.25", "--workers", "1"
    status, tests, lines = checked(tmp_path, monkeypatch, planted, *options, silence=60.0)
    assert status == 1 and time.monotonic() - began < 30
    assert tests["test_first"]["outcome"] == "passed" and tests["test_known"]["outcome"] == "failed"
    assert "known by then" in tests["test_known"]["reason"] and "the deadline" in tests["test_known"]["reason"]
    left = {line["job"]: line["reason"] for line in lines if line["line"] == "job"}
    assert left["test_slow.py gpu"].startswith("1 tests not come to") and left["test_z.py gpu"] == "not come to"


def test_timing_tests_run_alone_after_the_others(tmp_path, monkeypatch):
    text = "@pytest.mark.timing\ndef test_times(): pass\ndef test_else(): pass\n"
    status, _, lines = checked(tmp_path, monkeypatch, {"test_t.py": text}, "--only", "timing", "--only", "tests")
    assert status == 0 and [line["name"] for line in lines if line["name"]] == ["test_else", "test_times"]


@pytest.mark.parametrize("fault", [None, "value", "gradient", "nan", "drift"])
def test_a_wrong_row_fails_with_its_reason(fault, monkeypatch):
    import test_gpu_errors

    right, told, calls = problem.linear_cross_entropy, {}, []

    def op(hidden, *arguments, backend, **options):
        loss = right(hidden, *arguments, backend=backend, **options)
        if backend == "reference" or fault is None:
            return loss
        wrong = 0.01 * (hidden.sum() - hidden.sum().detach())
        calls.append(fault)
        drift = loss * (1 + len(calls) * 2.0**-20)  # less than any error that is looked for
        return dict(value=loss * 1.02, gradient=loss + wrong, nan=loss * float("nan"), drift=drift)[fault]

    monkeypatch.setattr(problem, "linear_cross_entropy", op)
    monkeypatch.setattr(test_gpu_errors, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(test_gpu_errors, "ON_GPU", False)
    row = "linear_cross_entropy", test_gpu_errors.TINY, torch.bfloat16, 6, "torch", told.__setitem__
    if fault is None:
        test_gpu_errors.test_errors(*row)
        assert 0 < told["errors"][told["worst"]]["ratio"] <= 1
    else:
        drift = "from run to run differ .'loss'"
        words = dict(value="error", gradient="hidden: error", nan="not finite", drift=drift)[fault]
        with pytest.raises(AssertionError, match=words):
            test_gpu_errors.test_errors(*row)


def test_what_the_sanitizers_watch(monkeypatch):
    assert len(sanitize.watched("torch", "cpu")) == len(sanitize.SHAPES) * 2 * len(problem.OPS)
    monkeypatch.setattr(sanitize.shutil, "which", lambda name: f"/opt/{name}")
    monkeypatch.setattr(sanitize, "unavailable", lambda backend: None)
    found = {job.name: job for job in sanitize.jobs()}
    tools = dict(cuda=("memcheck", "racecheck", "initcheck"), triton=("memcheck", "racecheck"))
    assert list(found) == [f"sanitizers {tool} {backend}" for backend, of in tools.items() for tool in of]
    assert found["sanitizers memcheck cuda"].environment == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for backend, kernel in (("cuda", "cluster_kernel"), ("triton", "_softmax_xent_kernel")):
        (command,) = found[f"sanitizers racecheck {backend}"].arguments
        assert command[:3] == ["/opt/compute-sanitizer", "--tool", "racecheck"] and f"kns={kernel}" in command
        assert command.count("--kernel-name") > 10 and f"watched('{backend}')" in command[-1]
    monkeypatch.setattr(sanitize.shutil, "which", lambda name: None)
    assert sanitize.jobs() == []


def test_a_sanitizer_informs_and_fails_nothing(tmp_path, monkeypatch):
    wrong = gpu_check.Job("sanitizers planted", sanitize.watch, ([sys.executable, "-S", "-c", "raise SystemExit(3)"],))
    monkeypatch.setattr(sanitize, "jobs", lambda: [wrong])
    status, _, (line,) = checked(tmp_path, monkeypatch, {}, "--only", "sanitizers")
    assert status == 0 and line["outcome"] == "failed" and "exit status 3" in line["reason"]


def test_without_a_gpu_it_says_so(capfd, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        gpu_check.main([])
    said = capfd.readouterr()
    assert "needs an NVIDIA GPU" in said.err and said.err.count("\n") == 1 and not said.out
