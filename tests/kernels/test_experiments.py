"""The experiments against what they would replace: values, and that they can be timed beside it."""

from dataclasses import replace

import pytest
import torch
from device import BACKEND, DEVICE, DTYPES, ON_GPU, assert_as_good, eager
from marks import long
from test_softmax_xent import make

if BACKEND != "triton":
    pytest.skip("of Triton's kernels alone", allow_module_level=True)

from check import experiments, hardware_noise
from check.fused_output import fused_output
from check.one_read import WIDEST, one_read

from benchmarks import bench_kernels
from benchmarks.race import race
from sfr_kernels.kernels.softmax_xent import triton as softmax_xent

CASES = sorted(experiments.cases(torch.device("cuda")), key=lambda case: case.op != "hardware_noise")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [7, 331, 512])
def test_one_read(vocab, dtype):
    logits, labels, _ = make(5, vocab, dtype)
    exact, theirs, mine = logits.double(), logits.clone(), logits.to(DEVICE, copy=True)
    (wanted, _), (eager_loss, _) = (eager.softmax_xent(x, labels) for x in (exact, theirs))
    assert_as_good(one_read(mine, labels.to(DEVICE), warps=1), eager_loss, wanted)
    assert_as_good(mine, theirs, exact)


def test_a_row_too_wide_is_refused():
    with pytest.raises(ValueError, match="columns"):
        one_read(torch.zeros(1, WIDEST + 1, dtype=torch.float32), torch.zeros(1, dtype=torch.int64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, width, d", [(1, 16, 4), (37, 70, 50)])  # less than a tile; several, all ragged
def test_fused_output(n, width, d, dtype):
    g = torch.Generator().manual_seed(1)
    shapes = (n, width), (d, width), (d,), (n, d)
    a, w, b, u = (torch.randn(shape, generator=g, dtype=torch.float32).to(dtype) for shape in shapes)
    coefficient = torch.randn(n, generator=g, dtype=torch.float32)

    def in_torch(wide):
        v = torch.addmm(b.to(wide), a.to(wide), w.to(wide).T)
        loss, db = eager.flow_mse(v, u, coefficient)
        return loss, v, db

    found = fused_output(*(t.to(DEVICE) for t in (a, w, b, u)), coefficient.to(DEVICE), (16, 32, 16, 1, 1))
    for mine, theirs, exact in zip(found, in_torch(dtype), in_torch(torch.float64), strict=True):
        assert_as_good(mine, theirs, exact)


@pytest.mark.parametrize("case", [*CASES[:1], *long(*CASES[1:])], ids=lambda case: case.op)
def test_they_are_judged_and_timed_beside_what_the_package_does(case):
    case = replace(
        case, shape=(5, 320 if case.op in experiments.OPS else 64), dtype=torch.float16, seconds=0.0, rounds=1
    )
    able = [name for name in case.providers if ON_GPU or name != "hardware functions"]  # which no interpreter has
    lines = race(experiments.SUITE, case, torch.device(DEVICE), dict.fromkeys(able))
    results = {line["provider"]: line for line in lines if line["line"] == "result"}
    assert {*able} < {*results} and all(line["ms"] > 0 for line in lines), lines


def test_each_is_another_way_than_the_packages(monkeypatch):
    """A race of a kernel against itself would decide nothing."""
    logits, labels, _ = make(5, 331, torch.float16)
    seen = []
    monkeypatch.setattr(softmax_xent, "launch", lambda *args, POLICY, **meta: seen.append(POLICY))
    monkeypatch.setattr(hardware_noise, "launch", lambda *args, HARDWARE, **meta: seen.append(HARDWARE))
    for name in ("triton", *experiments.POLICIES):
        experiments.kernels(name).softmax_xent(logits.to(DEVICE), labels.to(DEVICE))
    path = bench_kernels.flow_path(
        bench_kernels.Inputs(5, 32, torch.device(DEVICE), torch.float16, torch.float16)
    ).first
    for name in experiments.NOISE:
        experiments.kernels(name).flow_path(path, torch.float16)
    assert seen == ["evict_last", "", "evict_first", False, True]
    with pytest.raises(ValueError, match="multiple of 16"):
        hardware_noise.path_without_equal_bits(path._replace(targets=path.targets[:, :30]), torch.float16, True)
