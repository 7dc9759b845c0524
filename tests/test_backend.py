"""Which backend serves a call, what `info` says of it, and that nothing explicit is ever replaced."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cases import make_case, small_config

from sfr_kernels import flow_matching_loss, linear_cross_entropy, sfr_loss
from sfr_kernels.commands import main
from sfr_kernels.kernels.backend import ENVIRONMENT, automatic, resolve_backend, unavailable
from sfr_kernels.ops import dispatch

ROOT = Path(__file__).resolve().parents[1]
CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture
def hopper(monkeypatch):
    """torch sees a GPU of capability 9.0."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))


def calls() -> list:
    """Each public loss, as a function of its backend."""
    case = make_case(small_config())
    flow = dict(seed=1, config=case.config)
    inputs = (case.hidden, case.head, case.rows, case.targets)
    joint = (case.hidden, case.weight, case.head, case.rows, case.targets)
    return [
        lambda backend: flow_matching_loss(*inputs, backend=backend, **flow),
        lambda backend: linear_cross_entropy(case.hidden, case.weight, case.labels, backend=backend),
        lambda backend: sfr_loss(*joint, backend=backend, **flow).loss,
    ]


@pytest.mark.parametrize("call", calls(), ids=["flow", "cross-entropy", "sfr"])
def test_triton_on_a_tensor_of_the_cpu_is_a_clear_error(call, monkeypatch):
    with pytest.raises(RuntimeError, match=r"backend='triton' cannot serve a tensor on cpu: it needs a .*GPU"):
        call("triton")
    monkeypatch.setenv(ENVIRONMENT, "triton")
    with pytest.raises(RuntimeError, match=f"{ENVIRONMENT}='triton' cannot serve"):
        call(None)
    assert torch.isfinite(call("torch"))  # the argument comes before the environment


@pytest.mark.parametrize("call", calls(), ids=["flow", "cross-entropy", "sfr"])
def test_unknown_names_are_refused_wherever_they_come_from(call, monkeypatch):
    with pytest.raises(ValueError, match=r"backend must be one of torch, triton, cuda, reference, got 'metal'"):
        call("metal")
    monkeypatch.setenv(ENVIRONMENT, "tritno")
    with pytest.raises(ValueError, match=rf"{ENVIRONMENT} must be one of .* got 'tritno'"):
        call(None)


def test_order_of_argument_environment_and_device(monkeypatch):
    assert resolve_backend(None, CPU) == "torch"
    monkeypatch.setenv(ENVIRONMENT, "reference")
    assert resolve_backend(None, CPU) == "reference"
    assert resolve_backend("torch", CPU) == "torch"
    monkeypatch.setenv(ENVIRONMENT, "")  # as good as unset
    assert resolve_backend(None, CPU) == "torch"


def test_a_gpu_gets_triton_where_it_serves_the_dtype(hopper):
    assert automatic(GPU) == automatic(GPU, torch.bfloat16) == automatic(GPU, torch.float16) == "triton"
    assert automatic(GPU, torch.float64) == "torch"
    assert resolve_backend(None, GPU, torch.float32) == "triton"
    with pytest.raises(RuntimeError, match=r"serves bfloat16, float16 and float32, not float64"):
        resolve_backend("triton", GPU, torch.float64)
    assert automatic(CPU, torch.bfloat16) == "torch"


def test_an_old_gpu_gets_torch(hopper, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert automatic(GPU, torch.float16) == "torch"
    assert unavailable("triton", GPU) == "it needs compute capability 8.0, this GPU has 7.5"


def test_without_triton_a_gpu_gets_torch(hopper, monkeypatch):
    monkeypatch.setattr(dispatch, "_missing", lambda backend: "Triton is not installed")
    assert automatic(GPU, torch.bfloat16) == "torch"


def test_the_interpreter_takes_tensors_of_the_cpu_if_asked_to(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert resolve_backend("triton", CPU, torch.float32) == "triton"
    assert resolve_backend(None, CPU, torch.float32) == "torch"


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU says")
def test_info_says_what_is_usable_and_why_not(capsys, monkeypatch):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert f"torch {torch.__version__}" in out and "device: CPU" in out
    lines = {line.split()[0]: line for line in out.splitlines() if line.startswith("  ")}
    assert lines["torch"].endswith(" usable") and lines["reference"].endswith(" usable")
    assert "needs a GPU" in lines["triton"] and "not usable: it" in lines["cuda"]
    assert "auto picks: torch" in out and ENVIRONMENT not in out
    monkeypatch.setenv(ENVIRONMENT, "reference")
    assert main(["info"]) == 0
    assert f"{ENVIRONMENT}=reference overrides it" in capsys.readouterr().out
    monkeypatch.setenv(ENVIRONMENT, "triton")
    assert main(["info"]) == 1
    assert f"{ENVIRONMENT} is wrong" in capsys.readouterr().out


def test_info_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "sfr_kernels", "info"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "auto picks" in done.stdout


def test_the_backend_of_a_leaf_is_the_one_measured_faster(hopper, monkeypatch):
    """By class of size, and only where both backends are there; otherwise Triton's."""
    calls = []

    def module(name):
        def leaf(kind):
            return lambda x, *_, **__: calls.append((name, kind, backend.size_of(x)))

        return SimpleNamespace(__all__=["scale", "norm_act"], scale=leaf("scale"), norm_act=leaf("norm_act"))

    table = (dict(capability="9.0", kernel="norm_act", size="large", backend="cuda", ms={}, origin="a.json"),)
    modules = {"triton": module("triton"), "cuda": module("cuda")}
    chosen = fastest.Fastest(table, modules, otherwise="triton")
    small, large = torch.zeros(8), torch.empty(backend.SMALL, dtype=torch.uint8)
    for x in (small, large):
        chosen.norm_act(x)
        chosen.scale(x)
    assert calls == [
        ("triton", "norm_act", "small"),
        ("triton", "scale", "small"),
        ("cuda", "norm_act", "large"),
        ("triton", "scale", "large"),
    ]
    monkeypatch.setattr(dispatch, "_missing", lambda backend: None)
    monkeypatch.setattr(fastest, "rows", lambda capability: table)
    monkeypatch.setattr(dispatch, "_is_built", lambda: True)
    assert automatic(GPU, torch.bfloat16) == "fastest"
    with pytest.raises(ValueError, match="backend must be one of"):  # a name for what auto does, not a choice
        resolve_backend("fastest", GPU)
    monkeypatch.setattr(dispatch, "_is_built", lambda: False)
    assert automatic(GPU, torch.bfloat16) == "triton"  # nothing is compiled unasked


def test_without_triton_a_gpu_gets_the_cuda_kernels_that_were_installed(hopper, monkeypatch):
    monkeypatch.setattr(dispatch, "_missing", lambda b: "Triton is not installed" if b == "triton" else None)
    monkeypatch.setattr(dispatch, "_is_built", lambda: True)
    assert automatic(GPU, torch.bfloat16) == "cuda"


def test_every_measured_choice_has_its_times_and_its_origin():
    """What `info` says of a choice can be looked up."""
    for row in json.loads(backend.FASTEST.read_text()):
        assert row["backend"] == min(row["ms"], key=row["ms"].get) and row["size"] in backend.SIZES
        assert (ROOT / "benchmarks/results" / row["origin"]).is_file()
