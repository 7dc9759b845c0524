"""A compiled attached model: one graph, whatever the step, λ and the sizes of a batch."""

import functools
import os

import pytest
import torch
from accelerate.state import AcceleratorState
from corpora import HashEncoder, Words
from marks import long
from outcomes import assert_same, gradients
from test_trainer import losses, make_trainer
from tiny import CONFIG, TARGET, adapted, pad, tiny_llama, tiny_samples, tiny_store
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from sfr_kernels import SFRConfig, attach, detach
from sfr_kernels.targets import OnlineTargets, SFRCollator
from sfr_kernels.training.objectives import attachment_of

SAMPLES = tiny_samples(24)
STORE = tiny_store(SAMPLES)
# Every size of the second batch differs from the first's: what varies is known to the compiler after two. All have more
# rows than H: below it another dtype of dW may be chosen, which costs a graph.
BATCHES = [SFRCollator(CONFIG, STORE, pad)(SAMPLES[i : i + k]) for i, k in ((3, 5), (8, 4), (14, 6), (4, 7), (12, 8))]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def twins(*given, **options):
    """Two equal models, attached as is said; the second is for a compiler."""
    models = [attach(tiny_llama(num_hidden_layers=1), *given, **options) for _ in range(2)]
    if given:
        torch.nn.init.normal_(models[0].sfr.head.output_proj.weight)
    models[1].load_state_dict(models[0].state_dict())
    return models


@pytest.mark.setting("own loop", "torch.compile")
@pytest.mark.parametrize("scheduled", [*long(False), True], ids=["compile(model), free", "model.compile(), scheduled"])
def test_steps_and_weights_of_the_flow_are_variables_of_one_graph(scheduled):
    eager, model = twins(CONFIG, STORE)
    counter = CompileCounterWithBackend("eager")
    compiled = model if scheduled else torch.compile(model, backend=counter, fullgraph=True)
    if scheduled:
        model.compile(backend=counter, fullgraph=True)
    flows, graphs = [], []
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.0) for m in (eager, model)]
    for step in range(12):
        training = step < 7 or step == 11
        for one in (eager, model):
            one.train(training)
            if scheduled:
                one.sfr.step, one.sfr.schedule = step, 1 / (step + 1)
        batch = BATCHES[0] if step in (6, 10) else BATCHES[step % len(BATCHES)]
        a, b = eager(**batch), compiled(**batch)
        assert_same(list(b.values()), list(a.values()), rtol=1e-6)
        if training:
            a.loss.backward()
            b.loss.backward()
            for optimizer in optimizers:
                optimizer.step()
        flows.append(b.flow_loss.item())
        graphs.append(counter.frame_count)
    assert graphs[1:7] == [2] * 6, graphs  # one of fixed sizes, then one of any
    assert len(set(graphs[8:])) == 1 and graphs[-1] <= 4, graphs  # and those of evaluation
    assert flows[0] != flows[5] != flows[6] and (flows[5] != flows[0]), "the noise must move"
    assert_same(gradients(model), gradients(eager), rtol=1e-5, atol=1e-7)
    assert torch.equal(eager.sfr.last, model.sfr.last) and eager.sfr.step == model.sfr.step == (12 if scheduled else 8)


@pytest.fixture
def own_accelerate():
    """With torch_compile=True a Trainer has every later Accelerator compile, by its state and the environment."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.setting("Trainer", "torch.compile")
@pytest.mark.usefixtures("own_accelerate")
def test_a_trainer_that_compiles_logs_what_one_that_does_not_logs(tmp_path):
    config = SFRConfig(**{**CONFIG.to_dict(), "flow_weight": 2.0, "flow_schedule": "cosine", "flow_warmup": 0.5})
    runs = []
    for name, arguments in (("eager", {}), ("compiled", dict(torch_compile=True, torch_compile_backend="eager"))):
        trainer = make_trainer(tmp_path / name, config=config, max_steps=9, per_device_train_batch_size=4, **arguments)
        trainer.train()
        health = [h[name] for h in trainer.state.log_history if "loss" in h for name in ("flow_share", "flow_gap")]
        runs.append(
            [*losses(trainer), health, [h["flow_weight"] for h in trainer.state.log_history if "flow_weight" in h]]
        )
    for a, b in zip(*runs, strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    assert 1 <= counters["stats"]["unique_graphs"] <= 3, counters["stats"]
    assert not counters["graph_break"]


@pytest.mark.parametrize("loss", ["flow", *long("mse", "cosine"), "mtp"])
def test_measuring_costs_one_graph_when_it_is_first_switched_on(loss):
    config = SFRConfig(**{**CONFIG.to_dict(), "loss": loss})
    eager, model = twins(config, STORE)
    counter, graphs = CompileCounterWithBackend("eager"), []
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    batches = [SFRCollator(config, STORE, pad)(SAMPLES[i : i + k]) for i, k in ((3, 5), (8, 4), (14, 6), (4, 7))]
    for measuring in (False, False, True, False, True, True):
        eager.sfr.measuring = model.sfr.measuring = measuring
        batch = batches[len(graphs) % len(batches)]
        assert_same(compiled(**batch).loss, eager(**batch).loss, rtol=1e-6)
        graphs.append(counter.frame_count)
        first = 0 if loss in ("flow", "mse") else 2  # the norms of the others are not in a graph
        assert_same(model.sfr.health[first:], eager.sfr.health[first:], rtol=1e-4, atol=1e-7)
        assert not model.sfr.health[:first].any() and bool(eager.sfr.health[0]) == (len(graphs) > 2)
    # of cosine a second one: rows have sizes that this graph is the first to see
    assert graphs == [1, 2, 3, 3, *[4 if loss == "cosine" else 3] * 2]


@pytest.mark.parametrize("kind", ["store", *long("online", "ce")])
def test_targets_that_are_looked_up_or_embedded_break_the_graph_and_add_none(kind):
    """The lookup stays with Python; what is compiled around it does not grow."""
    targets = STORE if kind == "store" else OnlineTargets(HashEncoder(TARGET), Words())
    eager, model = twins(objective="ce") if kind == "ce" else twins(CONFIG, targets)
    counter = CompileCounterWithBackend("eager")
    compiled, graphs = torch.compile(model, backend=counter), []
    for step in range(6):
        samples = SAMPLES[2 * step : 2 * step + 2 + step % 3]
        batch = pad(samples)
        if kind == "store":
            batch["sample_id"] = torch.tensor([s["sample_id"] for s in samples])
        if kind == "online":
            batch = SFRCollator(CONFIG, targets, pad)(samples)
        torch.testing.assert_close(eager(**batch).loss, compiled(**batch).loss, rtol=1e-6, atol=0)
        graphs.append(counter.frame_count)
    assert len(set(graphs[4:])) == 1, graphs


def losses_and_graphs(model, call, counter, batches) -> tuple[list[float], list[int]]:
    """Of each step of a training whose λ changes; the third has the sizes of the first."""
    optimizer, losses, graphs = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1), [], []
    for step, batch in enumerate([batches[i] for i in (0, 1, 0, 2, 3)]):
        if (sfr := attachment_of(model)) is not None:
            sfr.schedule = 1 / (step + 1)
        loss = call(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        graphs.append(counter.frame_count)
    return losses, graphs


# What calls the model, compiled and attached; the plain model is compiled alone.
WAYS = {
    "torch.compile": lambda model, counter: torch.compile(attach(model, CONFIG, STORE), backend=counter),
    "torch.compile before attach": lambda model, counter: attach(torch.compile(model, backend=counter), CONFIG, STORE),
    "model.compile() before attach": lambda model, counter: attach(in_place(model, counter), CONFIG, STORE),
}


def in_place(model, counter):
    model.compile(backend=counter)
    return model


def tiny(lora: bool):
    model = tiny_llama(num_hidden_layers=1)
    return adapted(model, ["q_proj", "v_proj"]) if lora else model


@functools.cache
def graphs_of_plain(lora: bool) -> list[int]:
    batches = [{name: x for name, x in batch.items() if name != "rows"} for batch in BATCHES]
    model, counter = tiny(lora), CompileCounterWithBackend("eager")
    _, found = losses_and_graphs(model, torch.compile(model, backend=counter), counter, batches)
    torch._dynamo.reset()
    counters.clear()
    return found


LORA = {"torch.compile": True, "torch.compile before attach": False, "model.compile() before attach": True}


def shown(way: str) -> list:
    marks = [pytest.mark.setting("own loop", f"{way}, with LoRA" if LORA[way] else way)]
    return marks if way == "torch.compile before attach" else [*marks, pytest.mark.long]


@pytest.mark.parametrize("way", [pytest.param(way, marks=shown(way)) for way in WAYS])
def test_a_compiled_model_has_the_graphs_of_the_plain_one_whenever_it_is_compiled(way):
    lora = LORA[way]
    most = [plain + 2 for plain in graphs_of_plain(lora)]
    eager = attach(tiny(lora), CONFIG, STORE)
    wanted, none = losses_and_graphs(eager, eager, counter := CompileCounterWithBackend("eager"), BATCHES)
    model = tiny(lora)
    call = WAYS[way](model, counter)
    losses, graphs = losses_and_graphs(model, call, counter, BATCHES)
    assert losses == pytest.approx(wanted, rel=1e-5) and none[-1] == 0
    assert all(0 < n <= m for n, m in zip(graphs, most, strict=True)) and len(set(graphs[1:])) == 1, (graphs, most)
    assert not counters["graph_break"]
    detach(call)
    assert attachment_of(model) is None and call(**{k: BATCHES[0][k] for k in ("input_ids", "labels")}).logits.shape[2]
