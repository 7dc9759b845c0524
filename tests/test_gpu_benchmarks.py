"""The benchmarks on a GPU: times that can be trusted, every op and peer at small sizes, and a GPU that dies."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_bench_race import LEAF_BENCHES, LOSS_BENCHES, TINY, suite_of

from benchmarks import bench_training_step
from benchmarks.bench_training_step import SMALL
from benchmarks.harness import environment, runner, shapes
from benchmarks.harness import race as racing
from benchmarks.harness.limit import Copy
from benchmarks.step.models import SMALL_QWEN2, StepShape

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
CUDA = torch.device("cuda")


def test_a_copy_of_known_bytes_has_the_rate_that_many_in_a_row_have():
    copy = Copy(2**31, CUDA)
    suite = suite_of({"ours": lambda: copy() or []}, bytes=copy.bytes)
    (case,) = suite.cases(CUDA)
    info = racing.race(suite, replace(case, seconds=1.0), CUDA, ["ours"]).results["ours"].info
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(20):
        copy()
    end.record()
    torch.cuda.synchronize()
    assert info["tb_per_s"] == pytest.approx(20 * copy.bytes / begin.elapsed_time(end) / 1e9, rel=0.1)


def test_a_kernel_that_waits_takes_as_long_as_it_waits():
    cycles = 20_000_000
    suite = suite_of(
        {"short": lambda: torch.cuda._sleep(cycles) or [], "long": lambda: torch.cuda._sleep(3 * cycles) or []}
    )
    (case,) = suite.cases(CUDA)
    found = racing.race(suite, case, CUDA, ["short", "long"]).results
    short, long = (sorted(found[name].samples)[len(found[name].samples) // 2] for name in ("short", "long"))
    assert long / short == pytest.approx(3.0, rel=0.1)


@pytest.mark.parametrize("bench", LEAF_BENCHES, ids=lambda bench: bench.SUITE.op)
def test_every_leaf_of_every_provider(bench):
    able = [name for name, reason in bench.SUITE.providers(CUDA).items() if reason is None]
    for op in {c.op for c in bench.SUITE.cases(CUDA)}:
        case = next(c for c in bench.SUITE.cases(CUDA) if c.op == op)
        found = racing.race(bench.SUITE, replace(case, shape=(66, 1032), seconds=0.0), CUDA, able)
        assert {"triton", "torch", "eager", "torch.compile", "limit"} <= set(found.results), found.failed
        assert not {name for name in found.failed if bench.SUITE.is_ours(name)}, found.failed
        assert found.clocks is None or found.clocks["sm_mhz"] > 0


@pytest.mark.parametrize("bench", LOSS_BENCHES, ids=lambda bench: bench.SUITE.op)
def test_every_loss_of_every_provider(bench):
    vocab = 0 if bench.SUITE.op in ("flow_loss", "velocity_head") else 512
    sizes = dict(batch=2, length=128, hidden_size=128, vocab=vocab, target_size=64, width=64)
    case = shapes.case_of(bench.SUITE.op, None, replace(TINY, **sizes), torch.bfloat16, seconds=0.0)
    able = [name for name, reason in bench.SUITE.providers(CUDA).items() if reason is None]
    found = racing.race(bench.SUITE, case, CUDA, able)
    assert {"triton", "eager", "torch.compile", "limit", "products"} <= set(found.results), found.failed
    assert not {name for name in found.failed if bench.SUITE.is_ours(name)}, found.failed


def test_a_small_training_step_of_every_provider():
    shape = StepShape(SMALL_QWEN2, True, False, "AdamW", **SMALL)
    case = bench_training_step._case(shape, True, True, None)
    able = [n for n, reason in bench_training_step.SUITE.providers(CUDA).items() if reason is None]
    found = racing.race(bench_training_step.SUITE, replace(case, seconds=0.0), CUDA, able)
    assert not found.failed and set(found.results) == set(able)
    assert all(sum(r.info["parts"].values()) > 0 for r in found.results.values())


def test_a_gpu_that_dies_takes_only_its_killer_along(tmp_path, monkeypatch):
    (tmp_path / "conftest.py").write_text("from benchmarks.conftest import *\n")
    planted = Path(__file__).with_name("planted_bench.py")
    file = Path(shutil.copy(planted, tmp_path / "bench_planted.py"))
    monkeypatch.setattr(runner, "files", lambda: [file])
    monkeypatch.setenv("PLANTED", "eager=assert")
    path = tmp_path / "bench.json"
    assert runner.measure(runner.Run(path, device="cuda", seconds=0.0)) is None
    content = json.loads(path.read_text())
    assert [f["provider"] for f in content["sfr_kernels"]["failed"]] == ["eager"]
    assert len(content["benchmarks"]) == 5 and content["sfr_kernels"]["complete"]


def test_where_it_ran():
    found = environment.device_of(CUDA)
    assert found["kind"] == "cuda" and found["memory_bytes"] > 2**30 and "." in found["capability"]
