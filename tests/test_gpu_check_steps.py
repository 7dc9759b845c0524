"""What a check runs beside its own measurements: the GPU tests of every backend, and the sanitizers."""

import sys
import time

import pytest
import torch

from benchmarks.check import gpu_check, results, sanitize, steps
from benchmarks.harness import problems

CPU = torch.device("cpu")


def python(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", code]


def test_a_step_shows_its_output_and_says_how_it_ended(capfd):
    entry = steps.Step("good", python("print('one'); print('2 passed')")).finish(time.monotonic() + 30, live=True)
    assert entry["ok"] and entry["detail"] == "2 passed" and capfd.readouterr().out == "one\n2 passed\n"
    step = steps.Step("bad", python("import os; print(os.environ['WORD']); raise SystemExit(3)"), WORD="no")
    entry = step.finish(time.monotonic() + 30)
    assert not entry["ok"] and entry["exit_code"] == 3 and capfd.readouterr().out == "no\n"


def test_a_step_that_takes_too_long_is_stopped():
    step = steps.Step("slow", python("import time; print('began', flush=True); time.sleep(60)"))
    entry = step.finish(time.monotonic() + 0.5)
    assert not entry["ok"] and "stopped after" in entry["detail"] and step.process.poll() is not None


@pytest.mark.parametrize("installed", [True, False])
def test_the_sanitizers_run_beside_the_tests_and_any_of_them_can_fail(installed, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(gpu_check, "gpu_tests", lambda: [("GPU tests", python("print('1 passed')"), {})])
    tools = [("memcheck", python("print('0 errors')"), {}), ("racecheck", python("raise SystemExit(1)"), {})]
    monkeypatch.setattr(sanitize, "commands", lambda: tools if installed else [])
    file = results.ResultFile(tmp_path, "gpu_check", CPU)
    gpu_check.tests(file, time.monotonic() + 30)
    found = {step["name"]: step["ok"] for step in results.read(file.path)["steps"]}
    if installed:
        assert found == {"GPU tests": True, "memcheck": True, "racecheck": False}
    else:
        assert found == {"compute-sanitizer": True, "GPU tests": True} and "skipped" in capfd.readouterr().out


def test_what_the_sanitizers_watch(monkeypatch):
    assert sanitize.run(CPU, "torch") == len(sanitize.SHAPES) * len(sanitize.DTYPES) * len(problems.OPS)
    monkeypatch.setattr(sanitize.shutil, "which", lambda name: f"/opt/{name}")
    monkeypatch.setattr(sanitize, "unavailable", lambda backend: None)
    memory, race, *cuda = sanitize.commands()
    assert memory[0] == "triton memcheck" and memory[2] == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    assert race[1][:3] == ["/opt/compute-sanitizer", "--tool", "racecheck"] and race[1][-2:] == ["--backend", "triton"]
    assert race[1].count("--kernel-name") == len(sanitize.kernel_names("triton")) > 10
    assert [name for name, *_ in cuda] == ["cuda memcheck", "cuda racecheck", "cuda initcheck"]
    assert f"kns={'cluster_kernel'}" in cuda[2][1] and len(sanitize.kernel_names("cuda")) > 15
    monkeypatch.setattr(sanitize, "unavailable", lambda backend: "no nvcc" if backend == "cuda" else None)
    assert [name for name, *_ in sanitize.commands()] == ["triton memcheck", "triton racecheck"]
    monkeypatch.setattr(sanitize.shutil, "which", lambda name: None)
    assert sanitize.commands() == []


def test_the_gpu_tests_are_found():
    (name, command, _), *_ = steps.gpu_tests()
    assert name == "GPU tests" and "tests/test_gpu.py" in command and "tests/test_rows.py" not in command


def test_the_kernels_of_each_backend_that_is_there_are_tested(monkeypatch):
    monkeypatch.setattr(steps, "unavailable", lambda backend: None)
    assert [e for *_, e in steps.gpu_tests()][1:] == [{"SFR_TEST_LEAVES": b} for b in ("triton", "cuda")]
    monkeypatch.setattr(steps, "unavailable", lambda backend: "no nvcc" if backend == "cuda" else None)
    assert [name for name, *_ in steps.gpu_tests()] == ["GPU tests", "triton kernels"]
