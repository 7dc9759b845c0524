"""The kernels' head and losses are the published ones: tests/golden decides, to the rounding of float32."""

from dataclasses import replace

import pytest
import torch
from device import BACKEND, DEVICE
from golden_cases import HEADS, assert_golden, evaluate_head, evaluate_loss, loss_problem, make_head, wanted_of_head

from sfr_kernels import flow_matching_loss
from sfr_kernels.kernels.flow import one_call as one_call

# Sums of at most a few hundred products, each rounded to 6e-8; the published code rounds its targets as well.
TOLERANCE = 2e-6


@pytest.mark.parametrize("case", HEADS, ids=lambda case: f"{case['num_layers']} layers, d {case['target_size']}")
def test_the_published_head(case, monkeypatch):
    monkeypatch.setenv("SFR_KERNELS_BACKEND", BACKEND)
    found = evaluate_head(make_head(case), case, torch.float32, DEVICE)
    assert_golden(found, wanted_of_head(case), TOLERANCE)


def on_device(name: str):
    problem = loss_problem(name, torch.float32)
    problem.hidden = problem.hidden.detach().to(DEVICE).requires_grad_()
    problem.head = problem.head and problem.head.to(DEVICE)
    problem.rows, problem.targets = problem.rows.to(DEVICE), problem.targets.float().to(DEVICE)
    return problem


@pytest.mark.long  # as good as the reference, which is the published one: test_losses.py and tests/test_golden.py
@pytest.mark.parametrize("name", ["mse", "cosine", "cka", "mse, as a flow without noise at t = 0"])
def test_the_published_losses(name, monkeypatch):
    problem = on_device(name.split(",")[0])
    config, times, calls, real = problem.config, None, [], one_call.flow_loss
    monkeypatch.setattr(one_call, "flow_loss", lambda *a, **k: calls.append(1) or real(*a, **k))
    monkeypatch.setattr(one_call, "serves_flow_loss", lambda *a: True)  # also rows that start off 16 bytes
    if "flow" in name:
        config, times = replace(config, loss="flow", source_std=0.0), torch.zeros(5, device=DEVICE)
    arguments = problem.hidden, problem.head, problem.rows, problem.targets, times
    loss = flow_matching_loss(*arguments, seed=0, config=config, backend=BACKEND)
    assert_golden(evaluate_loss(problem, loss), problem.wanted, max(TOLERANCE, problem.tolerance))
    assert bool(calls) == (BACKEND == "cuda" and "flow" in name)


@pytest.mark.long
def test_the_published_flow_through_the_head(monkeypatch):
    """With the file's noise, which no public function takes."""
    monkeypatch.setenv("SFR_KERNELS_BACKEND", BACKEND)
    problem = on_device("flow_matching")
    n = problem.rows.num_flow
    index, weight = problem.rows.rows[:n], problem.rows.weight[:n]
    x_0 = problem.x_0.float().to(DEVICE).flatten(0, 1)[index]
    x_1 = problem.targets[problem.rows.anchor[:n].long()]
    t = problem.times.float().to(DEVICE)[problem.rows.time_index[:n].long()]
    v = problem.head(x_0.lerp(x_1, t[:, None]), t, problem.hidden.flatten(0, 1)[index])
    loss = ((v - (x_1 - x_0)).square().mean(1) * weight).sum() / weight.sum().clamp(min=1)
    assert_golden(evaluate_loss(problem, loss), problem.wanted, TOLERANCE)
