"""A run of the benchmarks, from its start to its file: what kills a provider ends nothing else, and nothing is lost."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import loop, machine
from sfr_kernels import cli

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
    assert cli.main(["bench", "--resume", str(path)]) == 0
    after = path.read_text()
    assert after.startswith(until_second[: until_second.rindex("\n") + 1])
    assert found(path, "result") == {"first": EVERYONE, "second": EVERYONE}
    assert after.count('"first"') == whole.count('"first"'), "what it had is not measured again"
    assert "first" in capsys.readouterr().out


def test_an_interrupt_leaves_the_finished_cases_and_says_how_to_go_on(planted):
    planted(case="second", eager="hang")
    code = "import sys; from benchmarks import loop; from sfr_kernels import cli; loop.BENCHES = ('planted_bench',)\n"
    code += "if __name__ == '__main__': sys.exit(cli.main(['bench', '--device', 'cpu', '--full', '--out', 'out']))"
    Path("run.py").write_text(code)
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    heard = dict(preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler), stderr=subprocess.PIPE)
    process = subprocess.Popen([sys.executable, "run.py"], text=True, env=os.environ | {"PYTHONPATH": path}, **heard)
    deadline = time.monotonic() + 60
    while not (files := list(Path("out").glob("*.jsonl"))) or '"result"' not in files[0].read_text():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "--resume" in said, said
    assert found(files[0], "result") == {"first": EVERYONE} and not found(files[0], "failed")


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


def test_bad_input_is_one_line(tmp_path, capsys):
    (tmp_path / "not.json").write_text("{")
    missing, wrong = str(tmp_path / "none"), str(tmp_path / "not.json")
    for arguments in (["--resume", missing], ["--resume", wrong], ["compare", "x", "y"], ["report", wrong]):
        assert cli.main(["bench", *arguments]) == 2
        said = capsys.readouterr().err
        assert said.strip() and "Traceback" not in said
    if not torch.cuda.is_available():
        assert cli.main(["bench", "--device", "cuda"]) == 2 and "no GPU" in capsys.readouterr().err


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
