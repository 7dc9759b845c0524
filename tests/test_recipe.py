"""The training features of the published recipe under a Trainer, against slow loops in plain torch: the gradient gate,
the head's EMA, the ramp of λ, the phase of the head alone; and their state in a checkpoint."""

import copy
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import tiny
import torch
from outcomes import assert_same, trained, weights
from test_trainer import logged, trainer_of
from tiny import CONFIG, VOCAB, adapted, in_two_processes, pad, tiny_llama, tiny_store
from transformers import TrainerCallback

from sfr_kernels import attach, detach, reference
from sfr_kernels.ops.flow_loss import step_seed
from sfr_kernels.targets import SFRCollator
from sfr_kernels.training.attach import base_of
from sfr_kernels.training.callbacks import SFRCallback
from sfr_kernels.training.head import RATE, fit_head
from sfr_kernels.training.objectives import attachment_of

setting = pytest.mark.setting
STEPS, SIZE, LEARNING = 6, 8, 0.3
# Of a response of three tokens one row has a target, of a long one nearly all: so steps have losses of 1 and of 2.
LENGTHS = [17, 3, 3, 17, 3, 17]


def samples() -> list[dict]:
    generator, found = torch.Generator().manual_seed(0), []
    for i in range(STEPS * SIZE):
        ids = torch.randint(3, VOCAB, (4 + LENGTHS[i // SIZE] + i % 2,), generator=generator).tolist()
        found.append({"input_ids": ids, "labels": [-100] * (4 + i % 2) + ids[4 + i % 2 :], "sample_id": i})
    return found


SAMPLES = samples()
STORE = tiny_store(SAMPLES)
RECIPE = replace(CONFIG, flow_weight=2.0, flow_gate="average", head_ema=0.9)


def batch_of(config, start: int, count: int = SIZE) -> dict:
    return SFRCollator(config, STORE, pad)(SAMPLES[start : start + count])


def make_trainer(folder, config=RECIPE, adapters=False, **options):
    """Steps of plain SGD, of the samples in order."""
    model = attach(adapted(tiny_llama()) if adapters else tiny_llama(), config, STORE)
    torch.nn.init.normal_(attachment_of(model).head.output_proj.weight, std=0.2)
    given = dict(train_sampling_strategy="sequential", max_steps=STEPS, learning_rate=LEARNING, max_grad_norm=0.0,
                 lr_scheduler_type="constant", samples=SAMPLES) | options  # fmt: skip
    trainer = trainer_of(model, folder, SFRCollator(config, STORE, pad), **given)
    SFRCallback().add_to(trainer)
    return trainer


def scales_of(config) -> dict:
    return {name: getattr(config, name) for name in ("time_scale", "hidden_scale", "hidden_norm")}


def factor(config, step: int) -> float:
    """Of λ: up in a line, then down."""
    ramp = config.flow_warmup * STEPS
    if step < ramp:
        return (step + 1) / (ramp + 1)
    done = (step - ramp) / (STEPS - ramp)
    return {"constant": 1, "linear": 1 - done, "cosine": math.cos(math.pi * done) / 2 + 0.5}[config.flow_schedule]


def by_hand(model, config, accumulation: int = 1) -> tuple[dict, list[tuple]]:
    """Trains an attached model by the reference and autograd, in float64. Its weights, and of each step L_CE, L_flow, λ
    and whether the gate was open."""
    params = {name: p.detach().double().requires_grad_() for name, p in detach(model).named_parameters()}
    model, base = model.double(), base_of(model)
    trunk = [p for p in model.parameters() if p.requires_grad]
    is_open, average, logs = True, None, []
    for step in range(STEPS):
        part, lam, ce_sum, flow_sum = SIZE // accumulation, config.flow_weight * factor(config, step), 0.0, 0.0
        batches = [batch_of(config, i, part) for i in range(step * SIZE, (step + 1) * SIZE, part)]
        total = sum(batch["rows"].num_ce for batch in batches)
        for batch in batches:
            rows = batch["rows"]
            given = {name: batch[name] for name in ("input_ids", "attention_mask")}
            h = base.model(**given).last_hidden_state
            logits = h.flatten(0, 1)[rows.rows] @ base.lm_head.weight.T
            ce = torch.nn.functional.cross_entropy(logits, rows.labels, reduction="sum") / total
            flow = reference.flow_matching_loss(
                h if is_open else h.detach(), params, rows, rows.targets, seed=step_seed(config.seed, step),
                config=config, normalizer=total, **scales_of(config),
            )  # fmt: skip
            (ce + lam * flow).backward()
            ce_sum, flow_sum = ce_sum + ce.item(), flow_sum + flow.item()
        with torch.no_grad():
            for p in trunk:
                p -= LEARNING * p.grad
            for p in params.values():
                p.copy_(config.head_ema * p + (1 - config.head_ema) * (p - LEARNING * p.grad))
            for p in [*trunk, *params.values()]:
                p.grad = None
        logs.append((ce_sum, flow_sum, lam, float(is_open)))
        average = flow_sum if average is None else 0.99 * average + 0.01 * flow_sum
        limit = {"average": average / 1.5, None: 0.0}.get(config.flow_gate, config.flow_gate)
        is_open = not flow_sum < limit
    return weights(model) | {f"sfr.head.{name}": p.detach() for name, p in params.items()}, logs


def assert_trained(found: dict, wanted: dict, start: dict, share: float) -> None:
    """Every weight is as near to the wanted one as a share of the way there."""
    for name, end in wanted.items():
        own = next(n for n in found if n.endswith(name))
        way = (end - start[own]).abs().max().item()
        assert (found[own] - end).abs().max() <= share * way, name


BY_NUMBER = replace(RECIPE, flow_gate=1.35)
CASES = {  # and how often the gate opens again or closes
    "average": (RECIPE, {}, 3),
    "average, accumulated, cosine": (replace(RECIPE, flow_schedule="cosine", flow_warmup=0.4), dict(parts=4), 3),
    "number, linear": (replace(BY_NUMBER, flow_schedule="linear", flow_warmup=0.5), {}, 2),
    "number, accumulated, LoRA": (BY_NUMBER, dict(parts=4, adapters=True), 2),
    "mse": (replace(RECIPE, loss="mse"), {}, 3),
    "no gate": (replace(RECIPE, flow_gate=None), {}, 0),
}


@setting("Trainer", "flow_gate and head_ema")
@pytest.mark.parametrize("config, options, moves", CASES.values(), ids=CASES)
def test_a_trainer_ends_where_a_slow_loop_does(tmp_path, config, options, moves):
    """With the same losses, λ and gate at each step, whatever is accumulated."""
    parts, adapters = options.get("parts", 1), options.get("adapters", False)
    micro = dict(per_device_train_batch_size=SIZE // parts, gradient_accumulation_steps=parts)
    trainer = make_trainer(tmp_path, config, adapters, **micro)
    start, twin = weights(trainer.model), copy.deepcopy(trainer.model)
    wanted, logs = by_hand(twin, config, parts)
    trained(trainer)
    assert_trained(weights(trainer.model), wanted, start, 5e-3 if adapters else 1e-3)
    names = ("ce_loss", "flow_loss", "flow_weight", *(["flow_gate"] if config.flow_gate else []))
    found = logged(trainer, *names)
    assert sum(a[3] != b[3] for a, b in pairwise(logs)) == moves and len(found) == STEPS
    for a, b in zip(found, logs, strict=True):
        assert a == pytest.approx(b[: len(names)], rel=5e-5)


def test_the_log_has_the_share_of_steps_with_an_open_gate(tmp_path):
    """Since the last log, and none where there is no gate."""
    assert logged(trained(make_trainer(tmp_path, logging_steps=3)), "flow_gate") == [(2 / 3,), (1 / 3,)]
    without = make_trainer(tmp_path, replace(RECIPE, flow_gate=None), max_steps=1)
    assert not logged(trained(without), "flow_gate") and logged(without, "flow_weight")


class Flows(TrainerCallback):
    """The flow losses of the micro-batches."""

    def __init__(self):
        self.found = []

    def on_substep_end(self, args, state, control, model=None, **kwargs):
        self.found.append(attachment_of(model).last[1].item())

    on_step_end = on_substep_end


def test_a_loss_that_each_micro_batch_normalizes_is_a_mean_for_the_gate(tmp_path):
    """As the published code's is; a sum would have grown with the number of micro-batches."""
    config, flows = replace(RECIPE, flow_normalizer="weights", flow_gate=0.1), Flows()
    micro = dict(per_device_train_batch_size=SIZE // 4, gradient_accumulation_steps=4, max_steps=1, callbacks=[flows])
    trainer = trained(make_trainer(tmp_path, config, **micro))
    assert len(flows.found) == 4
    assert attachment_of(trainer.model).gate.last == pytest.approx(sum(flows.found) / 4, rel=1e-6)


def fitted_by_hand(model, config, steps: int) -> dict:
    """AdamW on the reference's flow loss of hidden states that do not change, in float64."""
    params = {name: p.detach().double().requires_grad_() for name, p in model.sfr.head.named_parameters()}
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in params.items()}
    model = copy.deepcopy(model).double().eval()
    for step in range(steps):
        batch = batch_of(config, step % 3 * SIZE)
        given = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            h = model.model(**given).last_hidden_state
        loss = reference.flow_matching_loss(
            h, params, batch["rows"], batch["rows"].targets, seed=step_seed(config.seed, -2 - step), config=config,
            **scales_of(config),
        )  # fmt: skip
        for (name, p), g in zip(params.items(), torch.autograd.grad(loss, list(params.values())), strict=True):
            first, second = moments[name]
            first.mul_(0.9).add_(0.1 * g)
            second.mul_(0.999).add_(0.001 * g**2)
            root = (second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
            p.data -= RATE * first / (1 - 0.9 ** (step + 1)) / root
    return {name: p.detach() for name, p in params.items()}


@pytest.mark.parametrize("loss", ["flow", "mse"])
def test_the_phase_of_the_head_alone_is_adamw_on_the_flow_loss(loss):
    """Of the model as it is, which does not change; the head's average is one of the training, not of this."""
    config = replace(RECIPE, loss=loss)
    model = tiny.attached(STORE, config)
    start, wanted = weights(model.sfr.head), fitted_by_hand(model, config, 5)
    before = weights(model.model)
    fit_head(model, [batch_of(config, i) for i in (0, SIZE, 2 * SIZE)], 5, progress=False)
    assert_trained(weights(model.sfr.head), wanted, start, 1e-2)
    assert_same(weights(model.model), before)


# ---------------------------------------------------------------------------------------------------------------------
# Several processes, and runs that go on


def train_half(rank: int, folder) -> None:
    trainer = trained(make_trainer(folder, per_device_train_batch_size=SIZE // 2))
    gate = trainer.model.sfr.gate
    torch.save((weights(trainer.model), trainer.state.log_history, gate.state(), gate.open), folder / f"{rank}.pt")


NAMES = ("ce_loss", "flow_loss", "flow_weight", "flow_gate")


def test_two_processes_have_one_gate_and_it_is_that_of_one_with_the_whole_batch(tmp_path):
    one = make_trainer(tmp_path)
    start = weights(one.model)
    trained(one)
    in_two_processes(train_half, tmp_path)
    ends = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert ends[0][2:] == ends[1][2:] and ends[0][3] == one.model.sfr.gate.open
    assert ends[0][2] == pytest.approx(one.model.sfr.gate.state(), rel=1e-5)
    for found, history, *_ in ends:
        assert_trained(found, weights(one.model), start, 1e-3)
        logs = [tuple(h[name] for name in NAMES) for h in history if "flow_gate" in h]
        assert logs == [pytest.approx(x, rel=1e-5) for x in logged(one, *NAMES)] and len(logs) == STEPS


@setting("Trainer", "resuming with a gate, closed")
@pytest.mark.parametrize(
    "config", [RECIPE, replace(BY_NUMBER, flow_schedule="cosine", flow_warmup=0.5)], ids=["average", "number"]
)
def test_a_resumed_run_goes_on_with_its_gate(tmp_path, config):
    """To the same bits, from a step after which the gate is closed."""
    whole = trained(make_trainer(tmp_path / "whole", config))
    cut = make_trainer(tmp_path / "cut", config, save_strategy="steps", save_steps=2, callbacks=[StopAtTwo()])
    trained(cut)
    assert not cut.model.sfr.gate.open
    resumed = make_trainer(tmp_path / "cut", config)
    trained(resumed, resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-2"))
    assert_same(resumed.model, whole.model)
    assert resumed.model.sfr.gate.state() == whole.model.sfr.gate.state()
    names = ("step", "loss", *NAMES, "flow_share", "flow_gap")
    assert logged(resumed, *names)[-4:] == logged(whole, *names)[-4:]


class StopAtTwo(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 2


@setting("Trainer", "head_ema with flat copies of the parameters (as DeepSpeed's)", outcome="refused")
def test_a_trainer_whose_optimizer_has_copies_stops_before_its_first_step(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.optimizer = torch.optim.SGD([torch.zeros(5, requires_grad=True)], lr=0.1)
    before = weights(trainer.model)
    with pytest.raises(RuntimeError, match="copies of the velocity head"):
        trainer.train()
    assert_same(trainer.model, before)
