"""The flow loss of the cuda backend as one call, against the composite over its kernels and against float64."""

from dataclasses import replace

import pytest
import torch
from cases import evaluate, judge, make_case, reference_flow, reference_sfr, small_config
from device import BACKEND, DEVICE, ON_GPU
from marks import long_but

from sfr_kernels import flow_matching_loss, sfr_loss
from sfr_kernels.kernels.flow import one_call as one_call

if BACKEND != "cuda":
    pytest.skip("the cuda backend alone has it", allow_module_level=True)
if ON_GPU:
    pytest.skip("cases.py is of the CPU; tests/test_gpu.py has the composites", allow_module_level=True)

# one layer and several; rows wider than a block of threads; a table of one time for each sequence, or one for all; odd
# sizes
CONFIGS = {
    "one layer": dict(num_layers=2),
    "four layers": dict(num_layers=5, width=24),
    "whole vectors": dict(num_layers=3, width=32),
    "wide": dict(num_layers=3, width=2500),
    "official": dict(preset="official"),
    "one time": dict(num_layers=2, num_times=1),
}


def case_of(preset="default", length=13, hidden_size=16, target_size=8, **overrides):
    """Of sizes that the call serves, in 16 bit too."""
    sizes = dict(length=length, hidden_size=hidden_size, target_size=target_size)
    return make_case(small_config(preset, **dict(width=16) | overrides), **sizes)


def run(case, joint=False):
    options = dict(seed=case.seed, config=case.config, backend="cuda")

    def call(x):
        if joint:
            return sfr_loss(x.hidden, x.weight, x.head, case.rows, case.targets, bias=x.bias, **options).loss
        return flow_matching_loss(x.hidden, x.head, case.rows, case.targets, **options)

    return call


@pytest.fixture
def calls(monkeypatch):
    """How often the one call was taken."""
    made, real = [], one_call.flow_loss
    monkeypatch.setattr(one_call, "flow_loss", lambda *a, **k: made.append(1) or real(*a, **k))
    return made


@pytest.mark.parametrize("name", long_but(CONFIGS, *(name for name in CONFIGS if name != "wide")))
@pytest.mark.parametrize("joint", [False, True])
def test_float32_as_good_as_eager(name, joint, calls):
    if joint and name == "official":
        pytest.skip("two normalizers: judged alone")
    case = case_of(**CONFIGS[name])
    judge(case, lambda c: run(c, joint), reference_sfr if joint else reference_flow, 2.0, torch.float32, draws=3)
    assert calls


@pytest.mark.parametrize("name", ["four layers", "whole vectors", "official"])
def test_bfloat16_as_good_as_the_kernels_one_by_one(name, calls, monkeypatch):
    """Beside float64, whose error both share in the main: of products that are rounded to 16 bit."""
    error, bound, scale = ({}, {}, {})
    serves = one_call.serves_flow_loss
    for length in (13, 16, 19):  # of one draw alone the two differ by more
        case = case_of(**CONFIGS[name], length=length)
        exact = evaluate(reference_flow(case), case.inputs())
        monkeypatch.setattr(one_call, "serves_flow_loss", serves)
        whole = evaluate(run(case), case.inputs(torch.bfloat16))
        monkeypatch.setattr(one_call, "serves_flow_loss", lambda *arguments: False)
        apart = evaluate(run(case), case.inputs(torch.bfloat16))
        for key, true in exact.items():
            for sums, x in ((error, whole[key] - true), (bound, apart[key] - true), (scale, true)):
                sums[key] = sums.get(key, 0) + x.double().square().sum()
    assert len(calls) == 3
    for key in error:
        assert error[key].sqrt() <= 1.5 * bound[key].sqrt() + 2.0**-10 * scale[key].sqrt(), key


@pytest.mark.parametrize("needed", ["hidden", "head"])
def test_frozen_parts_get_no_gradient_and_change_no_other(needed, calls):
    case = case_of()
    full = evaluate(run(case), case.inputs(torch.float32))
    x = case.inputs(torch.float32)
    x.hidden.requires_grad_(needed == "hidden")
    x.head.requires_grad_(needed == "head")
    run(case)(x).backward()
    assert calls
    for name, p in [("hidden", x.hidden), *x.params.items()]:
        assert (p.grad is not None) == (needed == ("hidden" if name == "hidden" else "head"))
        if p.grad is not None:
            torch.testing.assert_close(p.grad, full[name].to(p.dtype), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_numbers_of_another_width_are_not_misread(dtype):
    """Rows, weights and targets that torch's kernels take as they are."""
    case = case_of()
    wanted = evaluate(run(case), case.inputs(dtype))
    rows = case.rows
    wide = rows.replace(weight=rows.weight.double(), anchor=rows.anchor.long())
    found = evaluate(run(replace(case, rows=wide, targets=case.targets.double())), case.inputs(dtype))
    for name, x in wanted.items():
        torch.testing.assert_close(found[name], x, rtol=1e-3, atol=1e-3, check_dtype=False)
    times = torch.linspace(0.1, 0.9, 4)
    index = torch.arange(len(rows.rows)) % 4
    results = []
    for kind in (torch.int32, torch.int64):
        timed = replace(case, rows=rows.replace(time_index=index.to(kind)), options=dict(times=times))
        x = timed.inputs(dtype)
        given = dict(seed=1, config=case.config, backend="cuda")
        results.append(flow_matching_loss(x.hidden, x.head, timed.rows, case.targets, times, **given))
    assert results[0] == results[1]


@pytest.mark.parametrize("why", ["a float32 head", "float16", "no gradient", "mse", "odd H", "odd d", "odd D"])
def test_what_it_does_not_serve_goes_kernel_by_kernel(why, calls):
    odd = {"odd H": dict(hidden_size=15), "odd d": dict(target_size=7), "odd D": dict(width=18)}
    case = case_of(**odd.get(why, dict(loss="mse") if why == "mse" else {}))
    dtype = {"float16": torch.float16, "a float32 head": torch.bfloat16}.get(why, torch.float32)
    x = case.inputs(dtype, torch.float32 if why == "a float32 head" else None)
    with torch.set_grad_enabled(why != "no gradient"):
        assert torch.isfinite(run(case)(x))
    assert not calls and DEVICE == "cpu"
