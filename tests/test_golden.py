"""The rows, targets, head and losses of `SFRConfig.official()`, and the copies of the published code that the
benchmarks race, are the published ones: tests/golden decides.

The kernels are judged by the same files in tests/kernels/test_golden_kernels.py.
"""

from importlib import import_module
from itertools import pairwise

import pytest
import torch
from golden_cases import (
    HEADS,
    LOSSES,
    TARGETS,
    Numbers,
    assert_golden,
    evaluate_head,
    evaluate_loss,
    labels_of,
    loss_problem,
    make_head,
    tensors,
    wanted_of_head,
)

from benchmarks.peers.published import PublishedFlowLoss, PublishedTargets
from sfr_kernels import SFRConfig, flow_matching_loss, reference
from sfr_kernels.targets.segments import rows_and_texts, segments_of

pytestmark = pytest.mark.usefixtures("one_thread")
EVERY_HEAD = pytest.mark.parametrize(
    "case", HEADS, ids=lambda case: f"{case['num_layers']} layers, d {case['target_size']}"
)
BOTH = pytest.mark.parametrize("backend", ["torch", "reference"])


@BOTH
@EVERY_HEAD
def test_the_published_head(case, backend, monkeypatch):
    monkeypatch.setenv("SFR_KERNELS_BACKEND", backend)
    head = make_head(case)
    assert list(head.state_dict()) == [name for name, _ in head.named_parameters()] == list(case["state"])
    assert_golden(evaluate_head(head, case, torch.float64), wanted_of_head(case), 1e-13)


def test_the_published_head_trains():
    case = HEADS[0]
    head, before = make_head(case, torch.float32), make_head(case, torch.float32)
    x_t, h, v = (torch.tensor(case[name], dtype=torch.float32).flatten(0, 1) for name in ("x_t", "h", "v"))
    optimizer, losses = torch.optim.SGD(head.parameters(), lr=0.1), []
    for _ in range(5):
        loss = (head(x_t, 0.25, h) - 2 * v).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(later < sooner for sooner, later in pairwise(losses))
    assert not any(map(torch.equal, head.parameters(), before.parameters()))


@BOTH
@pytest.mark.parametrize("name", LOSSES)
def test_the_published_losses(name, backend, monkeypatch):
    """In float64; the published code rounds weights and targets to float32."""
    problem = loss_problem(name)
    if problem.x_0 is not None:
        noise = problem.x_0.flatten(0, 1)
        kernels = import_module("sfr_kernels.kernels.flow.torch")
        monkeypatch.setattr(kernels, "gaussian", lambda seed, identity, size: noise[identity])
        monkeypatch.setattr(reference, "gaussian_noise", lambda seed, identity, size: noise[identity])
    arguments = problem.hidden, problem.head, problem.rows, problem.targets, problem.times
    loss = flow_matching_loss(*arguments, seed=0, config=problem.config, backend=backend)
    assert_golden(evaluate_loss(problem, loss), problem.wanted, problem.tolerance)


@pytest.mark.parametrize("case", TARGETS, ids=lambda case: case["name"])
def test_every_position_has_the_published_target(case):
    config = SFRConfig.official(**{name: case[name] for name in ("segment_tokens", "stride", "min_tokens")})
    labels = labels_of(case)
    tokenizer = Numbers(case["blank_tokens"])
    rows, texts = rows_and_texts(labels, config, tokenizer)
    assert segments_of([{"labels": row} for row in labels.tolist()], config, tokenizer).texts == texts

    found = {}
    for row in range(rows.num_flow):
        text = texts[rows.anchor[row]]
        words = None if text is None else [int(word) for word in text.split()]
        target = None if words is None else [words[0], words[-1], len(words)]
        found[divmod(int(rows.rows[row]), case["length"])] = target, float(rows.weight[row])
    published = {(b, p): (target, weight) for b, p, target, weight in case["rows"]}
    assert found.keys() == published.keys()
    for place, (target, weight) in published.items():
        assert found[place] == (target, pytest.approx(weight, rel=1e-6)), place


# ---------------------------------------------------------------------------------------------------------------------
# The copies that the benchmarks race


def published_copy(case: dict) -> PublishedFlowLoss:
    shape = make_head(case).shape
    copy = PublishedFlowLoss(shape.hidden_size, shape.target_size, shape.width, shape.num_blocks + 2).double()
    copy.load_state_dict(tensors(case["state"]), strict=True)
    return copy


@EVERY_HEAD
def test_the_copied_head(case):
    copy = published_copy(case)
    velocity = lambda x_t, t, h: copy.velocity(x_t[:, None], t, h[:, None])[:, 0]  # noqa: E731
    assert_golden(evaluate_head(copy, case, torch.float64, velocity=velocity), wanted_of_head(case), 1e-13)


def test_the_copied_loss():
    problem = loss_problem("flow_matching")
    problem.head = published_copy(LOSSES["flow_matching"])
    n, weight, x_1 = problem.rows.num_flow, torch.zeros(problem.labels.numel()), torch.zeros_like(problem.x_0)
    index = problem.rows.rows[:n]
    weight[index] = problem.rows.weight[:n]
    x_1.flatten(0, 1)[index] = problem.targets[problem.rows.anchor[:n].long()]
    t = problem.times[:, None, None]
    x_t = problem.x_0.lerp(x_1, t)
    loss = problem.head.loss(problem.hidden, x_t, x_1 - problem.x_0, problem.times, weight.view_as(problem.labels))
    assert_golden(evaluate_loss(problem, loss), problem.wanted, problem.tolerance)


@pytest.mark.parametrize("case", TARGETS, ids=lambda case: case["name"])
def test_the_copied_targets(case):
    config = SFRConfig.official(**{name: case[name] for name in ("segment_tokens", "stride", "min_tokens")})
    numbers, labels = Numbers(case["blank_tokens"]), labels_of(case)
    x_1, weight = PublishedTargets(numbers, numbers, config, torch.float64)(labels)
    wanted, wanted_weight = torch.zeros_like(x_1), torch.zeros_like(weight)
    for b, p, target, w in case["rows"]:
        wanted[b, p], wanted_weight[b, p] = torch.tensor(target or [0, 0, 0]), w
    assert torch.equal(x_1, wanted)
    torch.testing.assert_close(weight, wanted_weight, rtol=1e-6, atol=0)
