"""Which backend serves a call, what `info` says of it, that nothing explicit is ever replaced, and that each backend
keeps the kernels' contracts."""

import ast
import inspect
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cases import make_case, small_config

from sfr_kernels import flow_matching_loss, linear_cross_entropy, sfr_loss
from sfr_kernels.commands import main
from sfr_kernels.kernels import backend, build
from sfr_kernels.kernels.backend import ENVIRONMENT, automatic, kernels_of, resolve_backend, unavailable
from sfr_kernels.kernels.flow import FlowPath

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


def calls() -> dict:
    """Each public loss, as a function of its backend."""
    case = make_case(small_config())
    rest, flow = (case.head, case.rows, case.targets), dict(seed=1, config=case.config)
    return {
        "flow": lambda b: flow_matching_loss(case.hidden, *rest, backend=b, **flow),
        "cross-entropy": lambda b: linear_cross_entropy(case.hidden, case.weight, case.labels, backend=b),
        "sfr": lambda b: sfr_loss(case.hidden, case.weight, *rest, backend=b, **flow).loss,
    }


@pytest.mark.parametrize("call", [pytest.param(call, id=name) for name, call in calls().items()])
def test_what_cannot_serve_or_is_unknown_is_a_clear_error(call, monkeypatch):
    for name, error, words in (
        ("triton", RuntimeError, "='triton' cannot serve a tensor on cpu: it needs a .*GPU"),
        ("metal", ValueError, " must be one of torch, triton, cuda, reference, got 'metal'"),
    ):
        with pytest.raises(error, match=f"backend{words}"):
            call(name)
        monkeypatch.setenv(ENVIRONMENT, name)
        with pytest.raises(error, match=f"{ENVIRONMENT}{words}"):
            call(None)
        assert torch.isfinite(call("torch"))  # the argument comes before the environment


def test_order_of_argument_environment_and_device(monkeypatch):
    assert resolve_backend(None, CPU) == "torch"
    monkeypatch.setenv(ENVIRONMENT, "reference")
    assert resolve_backend(None, CPU) == "reference"
    assert resolve_backend("torch", CPU) == "torch"
    monkeypatch.setenv(ENVIRONMENT, "")  # as good as unset
    assert resolve_backend(None, CPU) == "torch"


@pytest.mark.parametrize(
    "dtype, capability, missing, built, wanted",
    [
        (None, (9, 0), [], None, "triton"),
        (torch.bfloat16, (9, 0), [], ROOT, "triton"),  # nothing was measured
        (torch.float16, (8, 0), [], None, "triton"),
        (torch.float64, (9, 0), [], ROOT, "torch"),
        (torch.float16, (7, 5), [], ROOT, "torch"),
        (torch.bfloat16, (9, 0), ["triton"], None, "torch"),  # nothing is compiled unasked
        (torch.bfloat16, (9, 0), ["triton"], ROOT, "cuda"),
        (torch.bfloat16, (9, 0), ["triton", "cuda"], ROOT, "torch"),
    ],
)
def test_what_a_gpu_gets(dtype, capability, missing, built, wanted, hopper, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(backend, "_missing", lambda name: "it is not installed" if name in missing else None)
    monkeypatch.setattr(build, "built", lambda: built)
    assert resolve_backend(None, GPU, dtype) == automatic(GPU, dtype) == wanted
    assert automatic(CPU, dtype) == "torch"


def test_why_a_backend_does_not_serve(hopper, monkeypatch):
    with pytest.raises(RuntimeError, match=r"serves bfloat16, float16 and float32, not float64"):
        resolve_backend("triton", GPU, torch.float64)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert unavailable("triton", GPU) == "it needs compute capability 8.0, this GPU has 7.5"


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


def test_the_backend_of_a_kernel_is_the_one_measured_faster(hopper, monkeypatch):
    """By class of size, and only where both backends are there; otherwise Triton's."""

    def planted(x):
        pass

    planted.__module__ = "folder"
    for name in ("triton", "cuda"):
        monkeypatch.setitem(sys.modules, f"folder.{name}", SimpleNamespace(planted=lambda x, name=name: name))
    monkeypatch.setattr(backend, "DISPATCHED", {})
    row = dict(capability="9.0", kernel="planted", size="large", backend="cuda", ms={}, origin="a.json")
    monkeypatch.setattr(backend, "measured", lambda capability: (row,))
    index = torch.zeros(1024, dtype=torch.int32)
    path = FlowPath(torch.zeros(1, 1024), torch.zeros(1), index, index, index, index, 1.0, 1.0)
    small, large = torch.zeros(8), torch.zeros(1024, 1024)
    kernel = backend.dispatch(planted)
    chosen = [kernel("fastest", x) for x in (small, large, path._replace(noise_id=index[1:]), path)]
    assert chosen == ["triton", "cuda", "triton", "cuda"]
    assert backend._fastest("another", large) == "triton"

    monkeypatch.setattr(backend, "_missing", lambda backend: None)
    monkeypatch.setattr(build, "built", lambda: ROOT)
    assert automatic(GPU, torch.bfloat16) == "fastest"
    with pytest.raises(ValueError, match="backend must be one of"):  # a name for what auto does, not a choice
        resolve_backend("fastest", GPU)
    monkeypatch.setattr(build, "built", lambda: None)
    assert automatic(GPU, torch.bfloat16) == "triton"  # nothing is compiled unasked


def test_every_measured_choice_has_its_times_and_its_origin():
    """What `info` says of a choice can be looked up."""
    for row in json.loads(backend.FASTEST.read_text()):
        wanted = "cuda" if row["ms"]["cuda"] <= 0.95 * row["ms"]["triton"] else "triton"
        assert row["backend"] == wanted and row["size"] in backend.SIZES
        assert (ROOT / "benchmarks/results" / row["origin"]).is_file()


def signature(file: Path, name: str) -> tuple[list[str], list[tuple]]:
    """What is positional and what is returned, and the keyword-only parameters, without importing the file."""
    (function,) = (f for f in ast.parse(file.read_text()).body if isinstance(f, ast.FunctionDef) and f.name == name)
    args = function.args
    options = [(ast.unparse(a), d and ast.unparse(d)) for a, d in zip(args.kwonlyargs, args.kw_defaults, strict=True)]
    args.kwonlyargs, args.kw_defaults = [], []
    return [ast.unparse(args), ast.unparse(function.returns)], options


@pytest.mark.parametrize("name", vars(kernels_of("torch")))
def test_every_backend_has_the_signature_of_the_contract(name):
    """It may add keyword-only parameters of its own."""
    contract = Path(inspect.getfile(backend.DISPATCHED[name].__wrapped__))
    wanted, options = signature(contract, name)
    for file in ("torch.py", "triton.py", "cuda.py"):
        found, own = signature(contract.with_name(file), name)
        assert found == wanted and own[: len(options)] == options, file
