"""The experiments against what they would replace: values, and that they can be timed beside it."""

from dataclasses import replace

import pytest
import torch
from device import BACKEND, DEVICE, DTYPES, assert_as_good, eager
from test_softmax_xent import make

if BACKEND != "triton":
    pytest.skip("of Triton's kernels alone", allow_module_level=True)

from check import experiments
from check.fused_output import fused_output
from check.one_read import WIDEST, one_read

from benchmarks.race import race


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


@pytest.mark.parametrize("number, shape", [(0, (5, 320)), (1, (5, 64))])
def test_they_are_judged_and_timed_beside_what_the_package_does(number, shape):
    case = experiments.cases(torch.device("cuda"))[number]
    case = replace(case, shape=shape, dtype=torch.float16, seconds=0.0, rounds=1)
    lines = race(experiments.SUITE, case, torch.device(DEVICE), dict.fromkeys(case.providers))
    results = {line["provider"]: line for line in lines if line["line"] == "result"}
    assert {*case.providers} < {*results} and all(line["ms"] > 0 for line in lines), lines
