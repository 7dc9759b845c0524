"""A run of the benchmarks, from its start to its report: what kills a provider ends nothing else, nothing is lost."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import command
from benchmarks.harness import environment, runner
from benchmarks.harness.session import Session
from benchmarks.report import fastest
from sfr_kernels import cli

ROOT = Path(__file__).resolve().parents[1]
PLUGIN = "from benchmarks.conftest import *\n"
CPU = torch.device("cpu")
RUN = dict(device="cpu", seconds=0.0)


@pytest.fixture
def planted(monkeypatch, tmp_path_factory):
    """What PLANTED says → the planted benchmarks run instead of the real ones. Returns their file."""
    folder = tmp_path_factory.mktemp("planted")
    (folder / "conftest.py").write_text(PLUGIN)
    file = Path(shutil.copy(ROOT / "tests" / "planted_bench.py", folder / "bench_planted.py"))

    def plant(**what: str) -> Path:
        monkeypatch.setattr(runner, "files", lambda: [file])
        monkeypatch.setenv("PLANTED", ",".join(f"{name}={how}" for name, how in what.items()))
        return file

    return plant


def measured(path: Path) -> dict[str, set[str]]:
    found = {}
    for entry in json.loads(path.read_text())["benchmarks"]:
        found.setdefault(entry["extra_info"]["label"], set()).add(entry["extra_info"]["provider"])
    return found


def failed(path: Path) -> dict[tuple[str, str], str]:
    rows = json.loads(path.read_text())["sfr_kernels"]["failed"]
    return {(row["group"].split(": ")[1].split(",")[0], row["provider"]): row["reason"] for row in rows}


EVERYONE = {"triton", "torch", "eager"}


def test_a_run_without_trouble(planted, tmp_path):
    planted()
    path = tmp_path / "results" / "bench.json"
    assert runner.measure(runner.Run(path, **RUN)) is None
    content = json.loads(path.read_text())
    assert measured(path) == {"first": EVERYONE, "second": EVERYONE} and not failed(path)
    own = content["sfr_kernels"]
    assert own["complete"] and own["selection"] == "quick" and own["versions"]["torch"] == torch.__version__
    assert own["device"] == environment.device_of(CPU) and own["device"]["clocks"] is None
    assert {(a["provider"], a["reason"], a["ours"]) for a in own["absent"]} == {
        ("quack", "quack is not installed", False)
    }
    assert len(own["absent"]) == 2, "at every case"
    # pytest-benchmark's format, without the name of the machine
    assert {"machine_info", "commit_info", "benchmarks", "datetime", "version"} <= set(content)
    assert not {"node", "release"} & set(content["machine_info"]) and content["commit_info"]["id"] == own["revision"]
    entry = content["benchmarks"][0]
    assert entry["stats"]["rounds"] == len(entry["stats"]["data"]) >= 10
    assert sorted(entry["stats"]["data"])[0] == entry["stats"]["min"] < 0.1
    assert entry["extra_info"]["kind"] == "ours" and entry["extra_info"]["bytes"] == 1000
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@pytest.mark.parametrize(
    "who, how, words",
    [
        ("eager", "crash", "ended by SIGSEGV"),
        ("torch", "dead", "illegal memory access was encountered; the GPU answered nothing after that"),
        ("torch", "hang", "no answer for 3 s"),
        ("eager", "late", "ended by SIGSEGV"),
        ("eager", "late-dead", "illegal memory access was encountered; the GPU answered nothing after that"),
    ],
)
def test_results_survive_what_kills_the_process(who, how, words, planted, tmp_path):
    """The one that was running is put down as failed; everyone else is measured, at that case too."""
    planted(**{who: how})
    path = tmp_path / "bench.json"
    assert runner.measure(runner.Run(path, **RUN), silence=3.0) is None
    assert measured(path) == {"first": EVERYONE - {who}, "second": EVERYONE}
    ((where, reason),) = failed(path).items()
    assert where == ("first", who) and words in reason
    content = json.loads(path.read_text())["sfr_kernels"]
    assert content["complete"] and [row["ours"] for row in content["failed"]] == [who != "eager"]


def test_a_case_that_kills_the_process_as_it_is_made_ends_nothing_else(planted, tmp_path):
    planted(making="crash")
    path = tmp_path / "bench.json"
    assert runner.measure(runner.Run(path, **RUN)) is None
    assert measured(path) == {"second": EVERYONE} and set(failed(path)) == {("first", who) for who in EVERYONE}


def test_a_wrong_result_is_a_failure_and_the_exit_status_says_whose(planted, tmp_path, capsys):
    planted(eager="wrong")
    arguments = ["bench", "--device", "cpu", "--out", str(tmp_path)]
    assert cli.main(arguments) == 0, "a peer's failure is not ours"
    assert "quack is not installed" in capsys.readouterr().out
    planted(triton="wrong")
    (first,) = tmp_path.glob("*.json")
    first.rename(tmp_path / "peer")
    assert cli.main(arguments) == 1
    (path,) = tmp_path.glob("bench-*.json")
    assert failed(path) == {("first", "triton"): "WrongResultError: hidden: error 1.0e+00"}
    out = capsys.readouterr().out
    assert "hidden: error 1.0e+00" in out and str(path) in out
    page = path.with_suffix(".html").read_text()
    assert "hidden: error 1.0e+00" in page and "quack is not installed" in page


def test_a_run_that_was_stopped_goes_on_where_it_was(planted, tmp_path, capsys):
    """Stopped by the user at its first case's last provider; what it has is not measured again."""
    arguments = [sys.executable, "-c", STOPPED, str(planted()), str(tmp_path)]
    environment = os.environ | dict(PLANTED="eager=interrupt", PYTHONPATH=str(ROOT))
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 130 and "--resume" in done.stderr, done.stderr
    (path,) = tmp_path.glob("*.json")
    assert not json.loads(path.read_text())["sfr_kernels"]["complete"]
    content = json.loads(path.read_text())
    planted()
    assert cli.main(["bench", "--resume", str(path)]) == 0
    after = json.loads(path.read_text())
    assert after["sfr_kernels"]["complete"] and measured(path) == {"first": EVERYONE, "second": EVERYONE}
    assert after["benchmarks"][: len(content["benchmarks"])] == content["benchmarks"]
    assert after["datetime"] == content.get("datetime", after["datetime"])
    assert cli.main(["bench", "--resume", str(path)]) == 0, "nothing is left to do"
    assert json.loads(path.read_text())["benchmarks"] == after["benchmarks"]


STOPPED = """
import pathlib, sys
from benchmarks.harness import runner
from sfr_kernels import cli
runner.files = lambda: [pathlib.Path(sys.argv[1])]
sys.exit(cli.main(["bench", "--device", "cpu", "--out", sys.argv[2]]))
"""


def test_a_run_of_another_device_version_or_revision_is_not_gone_on_with(tmp_path):
    path = tmp_path / "bench.json"
    Session(CPU, path).write()
    content = json.loads(path.read_text())
    Session(CPU, path)
    for where, name in ((("versions",), "torch"), (("device",), "name"), ((), "revision")):
        changed = json.loads(json.dumps(content))
        inner = changed["sfr_kernels"]
        for key in where:
            inner = inner[key]
        inner[name] = "1.0"
        path.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=rf"cannot be gone on with: {name} 1\.0, now"):
            Session(CPU, path)


def test_what_the_time_does_not_suffice_for_is_said(planted, tmp_path):
    planted()
    path = tmp_path / "bench.json"
    assert runner.measure(runner.Run(path, minutes=0.0, **RUN)) is None
    own = json.loads(path.read_text())["sfr_kernels"]
    assert measured(path) == {} and {row["provider"] for row in own["absent"]} == {*EVERYONE, "quack"}
    assert all("time was up" in row["reason"] for row in own["absent"] if row["provider"] != "quack")
    assert own["cut"] and not own["complete"]
    assert cli.main(["bench", "--resume", str(path), "--minutes", "5"]) == 0
    own = json.loads(path.read_text())["sfr_kernels"]
    assert measured(path) == {"first": EVERYONE, "second": EVERYONE} and own["complete"] and not own["cut"]


def test_a_selection(planted, tmp_path):
    planted()
    path = tmp_path / "bench.json"
    assert runner.measure(runner.Run(path, full=True, only=("third", "second"), **RUN)) is None
    assert set(measured(path)) == {"second", "third"}
    assert json.loads(path.read_text())["sfr_kernels"]["selection"] == "full, third, second"
    said = runner.measure(runner.Run(tmp_path / "none.json", only=("thir", "bfloat16"), **RUN))
    assert "no case of the selection contains thir or bfloat16" in said and not (tmp_path / "none.json").exists()


def test_a_process_that_cannot_start_says_why(monkeypatch, tmp_path):
    (tmp_path / "conftest.py").write_text(PLUGIN)
    (tmp_path / "bench_broken.py").write_text("import nonsense\n")
    monkeypatch.setattr(runner, "files", lambda: [tmp_path / "bench_broken.py"])
    said = runner.measure(runner.Run(tmp_path / "bench.json", **RUN))
    assert "did not finish" in said and "No module named 'nonsense'" in said


def test_bad_input_is_one_line(tmp_path, capsys, monkeypatch):
    assert cli.main(["bench", "--resume", str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert cli.main(["bench", "--device", "cuda"]) == 2
        assert "no GPU" in capsys.readouterr().err
    (tmp_path / "not.json").write_text("{")
    for arguments in (["compare", "x", "y"], ["report", str(tmp_path / "not.json")]):
        assert cli.main(["bench", *arguments]) == 2
        said = capsys.readouterr().err
        assert said.strip() and "Traceback" not in said
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as caught:
        cli.main(["bench", "--nonsense"])
    assert caught.value.code == 2
    with pytest.raises(ModuleNotFoundError):
        command.main([])


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """What a wheel of this tree puts into site-packages."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site-packages")
    for name in ("sfr_kernels", "csrc", "benchmarks"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "setup.py", "-q", "bdist_wheel", "--dist-dir", str(built)]
    environment = os.environ | dict(SFR_BUILD_CUDA="0")
    subprocess.run(command, cwd=source, env=environment, check=True, capture_output=True, timeout=300)
    (wheel,) = built.glob("*.whl")
    shutil.unpack_archive(wheel, built, "zip")
    return built


def test_the_real_benchmarks_through_the_command_of_a_wheel(installed, tmp_path):
    """One leaf and the ceilings, from the command to the report, outside of any checkout."""
    assert not [name for name in ("results", "check") if (installed / "sfr_kernels/benchmarks" / name).exists()]
    arguments = ["--device", "cpu", "--seconds", "0.01", "--out", "here", "--only", "flow_path", "--only", "ceilings"]
    done = subprocess.run(
        [sys.executable, "-m", "sfr_kernels", "bench", *arguments], cwd=tmp_path, capture_output=True, text=True,
        timeout=300, env=os.environ | dict(PYTHONPATH=str(installed)),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "here").glob("bench-*.json")
    content = json.loads(path.read_text())
    assert content["sfr_kernels"]["revision"] is None
    assert all(e["fullname"].startswith("sfr_kernels/benchmarks/bench_") for e in content["benchmarks"])
    assert {e["extra_info"]["op"] for e in content["benchmarks"]} == {"flow_path", "ceilings"}
    providers = {e["extra_info"]["provider"] for e in content["benchmarks"]}
    assert providers == {"torch", "eager", "limit", "copy", "matmul"}
    assert {a["provider"] for a in content["sfr_kernels"]["absent"]} == {"triton", "cuda", "torch.compile"}
    assert "flow_path" in done.stdout and "result" in done.stderr and path.with_suffix(".html").stat().st_size > 10**6
    with pytest.raises(ValueError, match="not measured on a GPU"):
        fastest.choose(path)


def test_every_file_is_run():
    assert {f.name for f in runner.files()} == {f.name for f in (ROOT / "benchmarks").glob("bench_*.py")}
    assert all(f.is_file() for f in runner.files())


def test_names_of_files():
    path = runner.path_in(Path("out"), "NVIDIA H100 80GB HBM3", "2026-01-02T03:04:05+00:00")
    assert path == Path("out/bench-nvidia-h100-80gb-hbm3-20260102T030405.json")


def test_where_it_ran_is_read_from_nvidia_smi(monkeypatch):
    lines = {"driver_version": "580.1", "clocks.sm": "1980, 2619, 1980, 2619, [N/A]"}
    monkeypatch.setattr(
        environment, "output", lambda *command: next(v for k, v in lines.items() if f"gpu={k}" in command[2])
    )
    assert environment.clocks() == dict(
        sm_mhz=1980.0, memory_mhz=2619.0, max_sm_mhz=1980.0, max_memory_mhz=2619.0, power_limit_w=None
    )
    monkeypatch.setattr(environment, "output", lambda *command: None)
    assert environment.clocks() is None
