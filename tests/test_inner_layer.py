"""The head is shown an inner hidden state of the model, that of `SFRConfig.layer_index`."""

import copy
import json
import pickle
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from outcomes import assert_same, gradients, trained
from test_health import health_by_hand, losses_by_time
from test_own_loss import tiny_causal_lm
from test_trainer import trainer_of
from tiny import BATCH, CONFIG, HIDDEN, PLAIN, SAMPLES, STORE, adapted, pad, tiny_llama, tiny_store
from torch._dynamo.testing import CompileCounterWithBackend

from sfr_kernels import VelocityHead, attach, detach, reference
from sfr_kernels.ops.flow_loss import step_seed
from sfr_kernels.targets import SFRCollator
from sfr_kernels.training.attach import base_of
from sfr_kernels.training.callbacks import SFRCallback
from sfr_kernels.training.checkpoint import load_head, pairing, restore_head, save_head
from sfr_kernels.training.head import fit_head
from sfr_kernels.training.health import health_values
from sfr_kernels.training.objectives import attachment_of

LAYERS, SEED = 3, 5
INNER = replace(CONFIG, layer_index=1, flow_weight=0.7)
setting = pytest.mark.setting
pytestmark = pytest.mark.usefixtures("one_thread")


def inner_model(config=INNER, model=None, store=STORE):
    """An attached model of three layers, whose head has an output."""
    model = attach(tiny_llama(num_hidden_layers=LAYERS) if model is None else model, config, store)
    if (head := attachment_of(model).head) is not None:
        torch.nn.init.normal_(head.output_proj.weight, std=0.2)
    return model


def loss_by_hand(model, head, config, batch=BATCH, seed=SEED):
    """Of a plain model, with transformers' own hidden states and plain torch, in the model's dtype."""
    given = {name: batch[name] for name in ("input_ids", "attention_mask")}
    hidden = model(**given, output_hidden_states=True).hidden_states
    weight, rows = base_of(model).lm_head.weight, batch["rows"]
    labels = batch["labels"][:, 1:].flatten()
    ce = F.cross_entropy((hidden[-1] @ weight.T)[:, :-1].flatten(0, 1), labels)
    params = {} if head is None else dict(head.named_parameters())
    targets = rows.labels if config.loss == "mtp" else rows.targets
    names = ("time_scale", "hidden_scale", "hidden_norm")
    scales = {name: getattr(config, name) for name in names}
    flow = reference.flow_matching_loss(
        hidden[config.layer_index], params, rows, targets, seed=seed, config=config, weight=weight, **scales
    )
    return ce + config.flow_weight * flow


CASES = [
    *[("flow", index, {}) for index in (0, 1, 2, 3, -1, -2, -4)],
    *[(loss, 1, dict(segment_tokens=0)) for loss in ("mse", "cosine", "cka")],
    ("mtp", -3, dict(mtp_tokens=2)),
    ("flow", 1, dict(hidden_norm="none", time_sampling="sequence", flow_normalizer="weights", weighting="uniform")),
]
FULL = [(False, *case) for case in CASES]
LORA = [(True, *case) for case in CASES if case[1] not in (0, -4)]  # the embeddings, which it does not train


@setting("own loop", "an inner layer for the head")
@pytest.mark.parametrize("adapters, loss, index, options", [*FULL, *LORA])
def test_the_loss_and_every_gradient_in_float64(adapters, loss, index, options):
    config = replace(INNER, loss=loss, layer_index=index, **options)
    store = tiny_store(SAMPLES, config)
    batch = SFRCollator(config, None if loss == "mtp" else store, pad)(SAMPLES)
    model = tiny_llama(num_hidden_layers=LAYERS)
    model = adapted(model, init_lora_weights="gaussian") if adapters else model
    model = inner_model(config, model, store).double()
    found = model(**batch, seed=SEED).loss
    found.backward()
    ours = gradients(model)
    model.zero_grad()
    head = detach(model)
    wanted = loss_by_hand(model, head, config, batch)
    wanted.backward()
    of_head = {} if head is None else {f"sfr.head.{name}": p for name, p in gradients(head).items()}
    ours, plain = (
        {name.removeprefix("base_model.model."): p for name, p in found.items()} for found in (ours, gradients(model))
    )
    plain |= of_head
    assert ours.keys() == plain.keys() and len(plain) > 10
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
    assert_same(ours, plain, rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize("index", [3, -1])
def test_the_last_one_has_two_names_and_no_bit_of_another_loss(index):
    outs = []
    for config in (CONFIG, replace(CONFIG, layer_index=index)):
        torch.manual_seed(1)
        outs.append(inner_model(config)(**BATCH, seed=SEED))
    assert torch.equal(outs[0].loss, outs[1].loss)


KINDS = ["bert", "bloom", "falcon", "gemma2", "gpt2", "gpt_neox", "granitemoehybrid", "lfm2", "mixtral", "qwen3_next"]


@pytest.mark.parametrize("name", KINDS)
def test_other_architectures_number_their_hidden_states_alike(name):
    """The embeddings with all that is done to them, and what the first layer gives on."""
    for index in (0, 1):
        model = tiny_causal_lm(name)
        config = replace(INNER, layer_index=index)
        with torch.no_grad():
            h = model(**PLAIN, output_hidden_states=True).hidden_states[index]
            head = VelocityHead.from_config(config, HIDDEN, STORE.target_size)
            torch.nn.init.normal_(head.output_proj.weight, std=0.2)
            scales = dict(time_scale=config.time_scale, hidden_scale=config.hidden_scale, hidden_norm="rms")
            params, rows = dict(head.named_parameters()), BATCH["rows"]
            wanted = reference.flow_matching_loss(h, params, rows, rows.targets, seed=SEED, config=config, **scales)
            attach(model, config, STORE).sfr.head.load_state_dict(head.state_dict())
            torch.testing.assert_close(model(**BATCH, seed=SEED).flow_loss, wanted, rtol=1e-5, atol=1e-6)


@setting("own loop", "an inner layer for the head, with gradient checkpointing")
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("adapters, index", [(False, 0), (False, 1), (False, 2), (True, 1), (True, 2)])
def test_checkpointing_changes_no_gradient(adapters, index, reentrant):
    found = []
    for saving in (False, True):
        model = tiny_llama(num_hidden_layers=LAYERS)
        model = adapted(model) if adapters else model
        if adapters:  # as Trainer does
            model.enable_input_require_grads()
        if saving:
            model.gradient_checkpointing_enable(dict(use_reentrant=reentrant))
        torch.manual_seed(1)
        model, calls = inner_model(replace(INNER, layer_index=index), model).double().train(), []
        base_of(model).model.layers[1].self_attn.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        loss = model(**BATCH, seed=SEED).loss
        before = len(calls)
        loss.backward()
        assert len(calls) - before == saving
        found.append(gradients(model))
    assert_same(*found, rtol=1e-9, atol=1e-15)


@setting("own loop", "an inner layer for the head before which nothing is trained", outcome="refused")
@pytest.mark.parametrize("given", [False, True], ids=["", "enable_input_require_grads"])
@pytest.mark.parametrize("index, options", [(0, {}), (1, dict(layers_to_transform=[1, 2]))])
def test_a_hidden_state_that_nothing_trains_is_refused(index, options, given):
    model = adapted(tiny_llama(num_hidden_layers=LAYERS), ["q_proj"], **options)
    if given:
        model.enable_input_require_grads()
    inner_model(replace(INNER, layer_index=index), model)
    with pytest.raises(RuntimeError, match=f"layer_index={index}: the flow loss would reach no parameter of the model"):
        model(**BATCH)
    with torch.no_grad():
        assert model(**BATCH).loss > 0
    frozen = inner_model(replace(INNER, layer_index=index))
    base_of(frozen).model.requires_grad_(False)  # the head alone
    frozen(**BATCH).loss.backward()
    assert frozen.sfr.head.output_proj.weight.grad.any()


def test_a_hidden_state_that_is_detached_is_refused():
    model = inner_model()
    model.model.layers[0].register_forward_hook(lambda module, args, out: out.detach())
    with pytest.raises(RuntimeError, match="layer_index=1: the flow loss would reach no parameter of the model"):
        model(**BATCH)


def test_layers_that_are_not_there_are_refused_and_the_model_unchanged():
    model = tiny_llama(num_hidden_layers=LAYERS)
    before = set(model.__dict__)
    for index in (4, -5):
        with pytest.raises(ValueError, match=f"layer_index must be within −4 and 3 .* got {index}"):
            attach(model, replace(INNER, layer_index=index), STORE)
    with pytest.raises(ValueError, match=r"'auto' compares gradients at the last hidden state.*layer_index=1"):
        replace(INNER, flow_weight="auto")
    assert set(model.__dict__) == before and not model.model.layers[1]._forward_pre_hooks
    with pytest.raises(ValueError, match="Linear has 0 such lists"):
        attach(tiny_causal_lm("modernbert-decoder"), INNER, STORE)
    twice = tiny_llama(num_hidden_layers=LAYERS)
    twice.model.others = torch.nn.ModuleList([torch.nn.Linear(2, 2) for _ in range(LAYERS)])
    with pytest.raises(ValueError, match="LlamaModel has 2 such lists"):
        attach(twice, INNER, STORE)


def test_layers_that_are_not_called_as_they_should_be_are_refused():
    narrow = attach(tiny_causal_lm("electra", embedding_size=16, hidden_size=HIDDEN), INNER, STORE)
    with pytest.raises(ValueError, match=r"must be like the last one, .*, 16.* got .*, 32"):
        narrow(**BATCH)
    model = inner_model()
    layers = model.model.layers
    layers[1] = copy.deepcopy(layers[1])
    layers[1]._forward_pre_hooks.clear()
    with pytest.raises(RuntimeError, match="was called 0 times, not once"):
        model(**BATCH)
    model = inner_model()
    model.model.layers[2] = model.model.layers[1]
    with pytest.raises(RuntimeError, match="was called 2 times, not once"):
        model(**BATCH)


@setting("own loop", "an inner layer for the head, with torch.compile")
def test_a_compiled_model_is_one_graph():
    torch._dynamo.reset()
    eager, model = (inner_model(model=tiny_llama(num_hidden_layers=2)) for _ in range(2))
    model.load_state_dict(eager.state_dict())
    counter = CompileCounterWithBackend("eager")
    compiled, graphs = torch.compile(model, backend=counter, fullgraph=True), []
    for step in range(5):
        for one in (eager, model):
            one.sfr.step, one.sfr.measuring = step, step > 2
        batch = SFRCollator(INNER, STORE, pad)(SAMPLES[step % 3 : step % 3 + 5])
        a, b = eager(**batch), compiled(**batch)
        assert_same(list(b.values()), list(a.values()), rtol=1e-6)
        a.loss.backward()
        b.loss.backward()
        graphs.append(counter.frame_count)
    assert graphs == [1, 2, 2, 3, 3], graphs
    assert_same(gradients(model), gradients(eager), rtol=1e-5, atol=1e-7)
    assert_same(model.sfr.health, eager.sfr.health, rtol=1e-4, atol=1e-7)
    torch._dynamo.reset()


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_keeps_the_layer_and_detach_leaves_nothing(way):
    model = inner_model()
    wanted = model(**BATCH, seed=SEED).loss
    twin = way(model)
    assert torch.equal(twin(**BATCH, seed=SEED).loss, wanted)
    detach(twin)
    assert not [m for m in twin.modules() if m._forward_pre_hooks or m._forward_hooks]
    assert torch.equal(model(**BATCH, seed=SEED).loss, wanted)
    assert model.eval().generate(PLAIN["input_ids"][:1], max_new_tokens=2, do_sample=False).shape[1] > 2


def test_the_health_is_that_of_the_inner_hidden_states_and_has_no_share():
    config = replace(INNER, layer_index=1)
    model = inner_model(config)
    model.sfr.measuring = True
    model(**BATCH, seed=SEED)
    found = health_values([model.sfr.health])
    _, gap, by_time = health_by_hand(model, [BATCH], SEED)
    assert found == pytest.approx({"flow_gap": gap, **by_time}, rel=1e-3, abs=1e-5) and abs(gap) > 1e-3


@pytest.mark.parametrize("loss", ["flow", "mtp"])
def test_a_head_is_fitted_to_the_inner_hidden_states(loss):
    """The last step's loss is that of the head before it."""
    config = replace(INNER, loss=loss)
    batch = SFRCollator(config, None if loss == "mtp" else STORE, pad)(SAMPLES)
    model = inner_model(config)
    plain = copy.deepcopy(model)
    head = detach(plain)
    weight = replace(config, flow_weight=1.0), replace(config, flow_weight=0.0)
    with torch.no_grad():
        both, ce = (loss_by_hand(plain, head, c, batch, step_seed(config.seed, -2)) for c in weight)
    assert fit_head(model, [batch], 1, progress=False) == pytest.approx((both - ce).item(), rel=1e-4)


@setting("Trainer", "an inner layer for the head")
def test_a_trainer_ends_where_a_loop_by_hand_does(tmp_path):
    steps = dict(max_grad_norm=0.0, lr_scheduler_type="constant", train_sampling_strategy="sequential")
    parts = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=2)
    model = inner_model()
    plain = copy.deepcopy(model)
    head = detach(plain)
    start = {name: p.detach().clone() for name, p in plain.named_parameters()}
    optimizer = torch.optim.SGD([*plain.parameters(), *head.parameters()], lr=0.3)
    for step in range(2):
        batch = SFRCollator(INNER, STORE, pad)(SAMPLES[4 * step : 4 * step + 4])
        optimizer.zero_grad()
        loss_by_hand(plain, head, INNER, batch, step_seed(INNER.seed, step)).backward()
        optimizer.step()
    trainer = trainer_of(model, tmp_path, SFRCollator(INNER, STORE, pad), samples=SAMPLES, **steps, **parts)
    SFRCallback().add_to(trainer)
    trained(trainer)
    for name, p in [*plain.named_parameters(), *[(f"sfr.head.{n}", p) for n, p in head.named_parameters()]]:
        moved = (p - start[name]).abs().max() if name in start else p.abs().max()
        assert (model.get_parameter(name) - p).abs().max() < 2e-4 * moved, name
    logs = [h for h in trainer.state.log_history if "flow_gap" in h]
    assert len(logs) == 2 and not any("flow_share" in h for h in logs) and losses_by_time(logs) == []


def test_a_head_of_another_layer_is_not_restored(tmp_path):
    model = inner_model()
    save_head(tmp_path, model.sfr, pairing(model))
    assert load_head(tmp_path).config.layer_index == 1
    restore_head(tmp_path, model.sfr, pairing(model))
    other = inner_model(CONFIG)
    with pytest.raises(ValueError, match="trained with layer_index=1, not -1"):
        restore_head(tmp_path, other.sfr, pairing(model))
    path = tmp_path / "sfr_config.json"
    saved = json.loads(path.read_text())
    del saved["config"]["layer_index"]  # of an earlier version, which had the last one
    path.write_text(json.dumps(saved))
    restore_head(tmp_path, other.sfr, pairing(model))
    with pytest.raises(ValueError, match="trained with layer_index=-1, not 1"):
        restore_head(tmp_path, model.sfr, pairing(model))
