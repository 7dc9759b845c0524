"""The gradient gate and the head's EMA in loops of one's own: what drives them, their state, and what stops them."""

import math
from dataclasses import replace

import pytest
import tiny
import torch
from outcomes import assert_same, weights
from test_recipe import SAMPLES, SIZE, STORE, batch_of
from tiny import CONFIG, pad, tiny_llama, tiny_store
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import SGD

from sfr_kernels import attach
from sfr_kernels.targets import SFRCollator

setting = pytest.mark.setting


def attached(**fields):
    return tiny.attached(STORE, replace(CONFIG, **fields), 0.2)


def step(model, optimizer, start: int = 0):
    optimizer.zero_grad()
    out = model(**batch_of(CONFIG, start))
    out.loss.backward()
    optimizer.step()
    return out.flow_loss


@setting("own loop", "state_dict with a gate")
def test_the_gate_is_in_the_state_dict_and_states_without_one_are_read():
    model, twin = attached(flow_gate="average"), attached(flow_gate="average")
    fresh = model.sfr.get_extra_state()
    for loss in (2.0, 1.9, 0.3):
        model.sfr.gate.update(torch.tensor(loss))
    average = 0.99 * (0.99 * 2.0 + 0.01 * torch.tensor(1.9).item()) + 0.01 * torch.tensor(0.3).item()
    assert model.sfr.gate.state() == pytest.approx([average, 0.3], rel=1e-7) and not model.sfr.gate.open
    state = model.sfr.get_extra_state()
    assert state.shape == fresh.shape == (4,)
    twin.load_state_dict(model.state_dict())
    assert twin.sfr.gate.state() == model.sfr.gate.state() and not twin.sfr.gate.open
    for older in (state[:1], state[:2], attached().sfr.get_extra_state()):  # of runs that had no gate
        other = attached(flow_gate="average")
        other.sfr.set_extra_state(older)
        assert other.sfr.gate.open and math.isnan(other.sfr.gate.last)
    other.sfr.set_extra_state(fresh)
    assert other.sfr.gate.open
    without = attached()
    without.load_state_dict(model.state_dict())
    assert without.sfr.gate is None


def test_the_average_has_the_last_loss_in_it_when_they_are_compared():
    gate = attached(flow_gate="average").sfr.gate
    for loss, is_open in ((1.5, True), (0.998, True), (0.99, False)):  # 0.998 < 1.5 / 1.5, but not < 1.49498 / 1.5
        gate.update(torch.tensor(loss))
        assert gate.open == is_open


def test_a_loss_that_is_not_finite_leaves_the_gate_as_it_is():
    gate = attached(flow_gate=1.0).sfr.gate
    for loss, is_open in ((math.nan, True), (0.5, False), (math.inf, False), (1.0, True)):
        gate.update(torch.tensor(loss))
        assert gate.open == is_open
    assert gate.state() == [0.99 * 0.5 + 0.01 * 1.0, 1.0]
    with pytest.raises(TypeError, match="loss must be a tensor"):
        gate.update(0.5)


@setting("own loop", "flow_gate, told each step's loss")
@setting("own loop", "a flow_gate that nobody drives", outcome="refused")
@pytest.mark.parametrize("rule", ["average", 0.5])
def test_a_gate_that_nobody_drives_stops_the_second_step(rule):
    for driven in (True, False):
        model = attached(flow_gate=rule)
        optimizer = SGD(model.parameters(), lr=0.1)
        loss = step(model, optimizer)
        if driven:
            model.sfr.gate.update(loss)
            step(model, optimizer)
            continue
        with pytest.raises(RuntimeError, match=r"flow_gate.*SFRCallback.*model\.sfr\.gate\.update"):
            step(model, optimizer)


@pytest.mark.parametrize("loss", ["flow", "mse", "cosine", "cka", "mtp"])
def test_a_closed_gate_leaves_the_model_the_gradient_of_cross_entropy(loss):
    """In training alone: a saliency map in evaluation has both."""
    config = replace(CONFIG, loss=loss, segment_tokens=0)
    batch = SFRCollator(config, tiny_store(SAMPLES, config), pad)(SAMPLES[:SIZE])
    found = {}
    for name in ("closed", "open", "evaluation", "λ of 0"):
        model = attach(tiny_llama(), replace(config, flow_gate=1.0), tiny_store(SAMPLES, config))
        if loss != "cka":
            torch.nn.init.normal_(
                model.sfr.head.output_proj.weight, std=0.2, generator=torch.Generator().manual_seed(1)
            )
        model.sfr.flow_weight = 0.0 if name.startswith("λ") else 2.0
        model.sfr.gate.update(torch.tensor(0.5 if name in ("closed", "evaluation") else 2.0))
        model.train(name != "evaluation")(**batch).loss.backward()
        found[name] = {n: p.grad for n, p in model.named_parameters()}
    for name, g in found["closed"].items():
        if name.startswith(("sfr.", "lm_head.")):  # with mtp the lm_head learns from the flow
            torch.testing.assert_close(g, found["open"][name], rtol=1e-5, atol=1e-7)
            continue
        assert torch.equal(g, found["λ of 0"][name]), name
        assert not torch.equal(g, found["open"][name]) and not torch.equal(g, found["evaluation"][name])


@setting("own loop", "flow_gate with torch.compile")
def test_a_compiled_gate_costs_one_graph():
    torch._dynamo.reset()
    counter, eager, model = CompileCounterWithBackend("eager"), attached(flow_gate=1.0), attached(flow_gate=1.0)
    compiled, graphs = torch.compile(model, backend=counter, fullgraph=True), []
    for turn, loss in enumerate((2.0, 1.7, 0.5, 0.4, 1.5, 0.3, 1.2)):
        for one in (eager, model):
            one.sfr.gate.update(torch.tensor(loss))
            one.sfr.step = turn
            one.zero_grad()
        for one in (eager, compiled):
            one(**batch_of(CONFIG, 0)).loss.backward()
        graphs.append(counter.frame_count)
        for (name, p), q in zip(eager.named_parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")
    assert graphs == [1, 1, 2, 2, 2, 2, 2]


# ---------------------------------------------------------------------------------------------------------------------
# The head's average in loops of one's own


def one_for_each(model):
    return [SGD([p], lr=0.3) for p in model.parameters()]


class Around(torch.optim.Optimizer):
    """An optimizer of the same parameters that lets another step, as ZeroRedundancyOptimizer does."""

    def __init__(self, params):
        super().__init__(params, {})
        self.inner = SGD(self.param_groups[0]["params"], lr=0.3)

    def step(self):
        self.inner.step()


OPTIMIZERS = {
    "one": lambda model: [SGD(model.parameters(), lr=0.3)],
    "one for each parameter": one_for_each,
    "one within another": lambda model: [Around(model.parameters())],
}


@setting("own loop", "head_ema")
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("sharded", [False, pytest.param(True, marks=setting("own loop", "head_ema with fully_shard"))])
def test_the_head_is_replaced_by_its_average_after_each_step(make, sharded, process_group):
    model = attached(head_ema=0.9)
    if sharded:
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    optimizers = make(model)
    for turn in range(2):
        before = {n: whole(p) for n, p in model.named_parameters()}
        model(**batch_of(CONFIG, turn * SIZE)).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        for name, p in model.named_parameters():
            after = before[name] - 0.3 * whole(p.grad)
            wanted = 0.9 * before[name] + 0.1 * after if "sfr." in name else after
            torch.testing.assert_close(whole(p), wanted, rtol=1e-6, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")
        assert model.sfr.step == turn + 1
        model.zero_grad()


def whole(p) -> torch.Tensor:
    return (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()


@pytest.fixture
def process_group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_a_step_that_a_scaler_skips_leaves_the_head():
    model, scaler = attached(head_ema=0.9), torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer, before = SGD(model.parameters(), lr=0.3), weights(model)
    scaler.scale(model(**batch_of(CONFIG, 0)).loss).backward()
    model.lm_head.weight.grad[3, 3] = torch.inf
    scaler.step(optimizer)
    scaler.update()
    assert_same(model, before)


@setting("own loop", "head_ema of a head in 16 bits", outcome="refused")
@setting("own loop", "head_ema with flat copies of the parameters (as DeepSpeed's)", outcome="refused")
@pytest.mark.parametrize("way", ["16 bits", "flat copies", "copies", "partitioned"])
def test_a_head_that_has_no_average_stops_the_first_step(way, tmp_path):
    model = attached(head_ema=0.9)
    parameters = list(model.parameters())
    if way == "16 bits":
        model.sfr.head.bfloat16()
    elif way == "partitioned":
        model.sfr.head.output_proj.weight.ds_id = 7
    elif way == "copies":
        parameters = [p.detach().clone().requires_grad_() for p in parameters]
    else:
        parameters = [torch.zeros(5, requires_grad=True)]
    optimizer = SGD(parameters, lr=0.1)
    words = r"float32, got torch.bfloat16.*head\.float\(\)" if way == "16 bits" else "copies of the velocity head"
    with pytest.raises(RuntimeError, match=words):
        step(model, optimizer)
