"""Training that does not do what `attach` was asked for stops at its first optimizer step, whoever makes the step."""

import copy
import pickle
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import CONFIG, TARGET, pad, tiny_llama, tiny_samples, tiny_store
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from sfr_kernels import SFRConfig, attach, detach
from sfr_kernels.targets import SFRCollator
from sfr_kernels.training import guard
from sfr_kernels.training.guard import unwatch
from sfr_kernels.training.objectives import attachment_of

SAMPLES = tiny_samples()
STORE = tiny_store(SAMPLES)
BATCH = SFRCollator(CONFIG, STORE, pad)(SAMPLES)
LORA = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
ADAPTERS = pytest.mark.setting("own loop", "adapters after attach", outcome="refused")
ALL_LINEAR = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def attached(config=CONFIG, **options):
    return attach(tiny_llama(), config, **{"targets": STORE, **options})


def sgd(*modules, lr=0.1, kind=torch.optim.SGD):
    return kind([p for m in modules for p in m.parameters() if p.requires_grad], lr=lr)


def own_loss(model):
    """What a trainer does that makes its own loss of the logits, or multiplies by the lm_head itself."""
    return model(input_ids=BATCH["input_ids"]).logits.square().mean()


def step(model, optimizer, loss=lambda model: model(**BATCH).loss):
    optimizer.zero_grad()
    loss(model).backward()
    optimizer.step()


@pytest.mark.setting("own loop", "a loss of the trainer's own (as DPO's)", outcome="refused")
@pytest.mark.parametrize("objective", ["sfr", "ce"])
@pytest.mark.parametrize("way", ["itself", "deepcopy", "pickle", "closure"])
def test_a_loss_that_is_never_computed_stops_the_first_step(way, objective):
    model = attach(tiny_llama(), objective="ce") if objective == "ce" else attached()
    model = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m))}.get(way, lambda m: m)(model)
    optimizer, before = sgd(model), [p.clone() for p in model.parameters()]

    def closure():
        optimizer.zero_grad()
        loss = own_loss(model)
        loss.backward()
        return loss

    closure()
    with pytest.raises(RuntimeError, match=r"does not compute the loss that was attached.*SFRTrainer.*liger"):
        optimizer.step(closure) if way == "closure" else optimizer.step()
    if way != "closure":
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    detach(model)
    step(model, optimizer, own_loss)


def test_another_loss_after_a_run_of_ours_is_noticed():
    """Cross-entropy alone has no head whose gradient is missing: an optimizer's second step tells."""
    model = attach(tiny_llama(), objective="ce")
    step(model, sgd(model))
    optimizer = sgd(model)
    step(model, optimizer, own_loss)  # one of several optimizers has the loss of the last turn, too
    with pytest.raises(RuntimeError, match="does not compute the loss"):
        step(model, optimizer, own_loss)
    model = attached()
    step(model, sgd(model))
    with pytest.raises(RuntimeError, match="no gradient has reached the velocity head"):
        step(model, sgd(model), own_loss)


def test_steps_that_change_nothing_and_other_models_steps_are_none():
    model, other = attached(), torch.nn.Linear(3, 3)
    for optimizer in (sgd(other), sgd(model, lr=0.0), sgd(model, lr=0.0), sgd(model)):
        other(torch.ones(3)).sum().backward()
        for p in model.parameters():
            p.grad = None if optimizer.param_groups[0]["lr"] else torch.zeros_like(p)
        optimizer.step()
    assert model.sfr.step == 0
    step(model, optimizer)
    assert model.sfr.step == 1


@pytest.mark.setting("own loop", "optimizer made before attach", outcome="refused")
def test_an_optimizer_without_the_head_stops_at_once_if_it_has_all_the_rest():
    plain = tiny_llama()
    optimizer = sgd(plain)
    model = attach(plain, CONFIG, STORE)
    with pytest.raises(RuntimeError, match=r"optimizer holds.*not those of the velocity head.*after attach"):
        step(model, optimizer)


@pytest.mark.setting("own loop", "several optimizers")
def test_parts_may_have_optimizers_of_their_own_and_the_head_must_have_one():
    model = attached()
    head = model.sfr.head.output_proj.weight
    trunk, rest = sgd(model.model, model.lm_head), sgd(model.sfr)
    for _ in range(3):
        model(**BATCH).loss.backward()
        trunk.step()
        rest.step()
    assert model.sfr.step == 3 and head.any()
    model = attached()
    parts = [sgd(model.model.layers), sgd(model.lm_head)]
    model(**BATCH).loss.backward()
    with pytest.raises(RuntimeError, match="not those of the velocity head"):
        parts[0].step()


def test_a_model_that_shares_its_parameters_may_be_left_alone():
    plain, model = tiny_llama(), attached()
    for (name, p), module in zip(plain.named_parameters(), [model] * 99, strict=False):
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, p)
    with pytest.raises(RuntimeError, match="does not compute the loss"):
        step(plain, sgd(plain), own_loss)
    unwatch(model)
    step(plain, sgd(plain), own_loss)


def test_a_loss_that_alternates_with_another_is_counted_and_no_error_where_that_is_said():
    model = attached()
    optimizer = sgd(model)
    unwatch(model)
    for turn in range(3):
        step(model, optimizer)
        step(model, optimizer, own_loss)
        assert model.sfr.step == turn + 1


@pytest.mark.parametrize(
    "way",
    [
        *(pytest.param(way, marks=ADAPTERS) for way in ("get_peft_model", "all-linear", "add_adapter")),
        pytest.param("requires_grad", marks=pytest.mark.setting("own loop", "frozen head", outcome="refused")),
    ],
)
def test_a_head_that_was_frozen_or_adapted_stops_the_first_forward(way):
    model = attached()
    if way == "requires_grad":
        model.sfr.requires_grad_(False)
    elif way == "add_adapter":
        model.add_adapter(LORA)
    else:
        model = get_peft_model(model, LORA if way == "get_peft_model" else ALL_LINEAR)
    with pytest.raises(RuntimeError, match=r"head is frozen or changed \(.*Wrap the model first, then attach"):
        model(**BATCH)
    with torch.no_grad():
        model(input_ids=BATCH["input_ids"])


def test_gradients_that_do_not_reach_the_head_stop_the_first_step():
    model = attached()
    optimizer = sgd(model)
    model(**BATCH)
    own_loss(model).backward()
    with pytest.raises(RuntimeError, match="no gradient has reached the velocity head"):
        optimizer.step()


@pytest.mark.parametrize("way", ["zero gradients of another loss", "rate of zero", "rate of zero after a warm-up"])
def test_a_head_that_does_not_move_stops_the_first_step_that_moves_something(way):
    model = attached()
    rate = 0.0 if way.endswith("warm-up") else 0.1
    rest = [p for n, p in model.named_parameters() if not n.startswith("sfr.")]
    head = dict(params=list(model.sfr.parameters()), lr=0.1 if way.startswith("zero") else 0.0)
    optimizer = torch.optim.SGD([dict(params=rest, lr=rate), head])
    for p in model.parameters():
        p.grad = torch.zeros_like(p)

    def backward():
        out = model(**BATCH)
        (own_loss(model) if way.startswith("zero") else out.loss).backward()

    backward()
    if way.endswith("warm-up"):
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 0.1
        backward()
    with pytest.raises(RuntimeError, match=r"no gradient has reached the velocity head|rate of the velocity head is 0"):
        optimizer.step()


def test_a_model_that_the_loss_does_not_reach_stops_the_first_step():
    """As reentrant checkpointing detaches it, where nothing before the first layer needs a gradient."""
    model = attach(get_peft_model(tiny_llama(), LORA), CONFIG, STORE)
    model.get_base_model().model.norm.register_forward_hook(lambda module, args, out: out.detach())
    with pytest.raises(RuntimeError, match=r"no gradient has reached the model.*enable_input_require_grads"):
        step(model, sgd(model))


def test_other_models_steps_do_not_count():
    """Neither before the first step of the model's own optimizer, nor are all kinds of optimizers looked into."""

    class Wrapper(torch.optim.Optimizer):
        def __init__(self):
            pass

    model, other, wrapper = attached(), torch.nn.Linear(3, 3), Wrapper()
    optimizer, another = sgd(model), sgd(other)
    for _ in range(3):
        model(**BATCH).loss.backward()
        other(torch.ones(3)).sum().backward()
        another.step()
    assert model.sfr.step == 0 and wrapper is not None
    optimizer.step()
    assert model.sfr.step == 1


@pytest.mark.setting("own loop", "DistributedDataParallel before attach", outcome="refused")
def test_ddp_around_the_model_before_attach_stops_the_first_forward():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        plain = tiny_llama()
        around = DistributedDataParallel(plain)
        attach(plain, CONFIG, STORE)
        with pytest.raises(RuntimeError, match=r"does not exchange.*attach first, then wrap"):
            around(**BATCH)
        around = DistributedDataParallel(attached())
        step(around, sgd(around))
        assert around.module.sfr.step == 1
    finally:
        torch.distributed.destroy_process_group()


def test_a_frozen_model_is_evaluated_with_gradients():
    """As for a saliency map."""
    model = attached().eval().requires_grad_(False)
    embedded = model.model.embed_tokens(BATCH["input_ids"]).requires_grad_()
    model(inputs_embeds=embedded, **{k: v for k, v in BATCH.items() if k != "input_ids"}).loss.backward()
    assert embedded.grad.any()


def test_optimizers_are_left_alone_once_no_model_is_attached():
    for watch in list(guard._watches):
        guard.forget(watch)  # of other tests
    model = attached()
    assert _global_optimizer_pre_hooks and _global_optimizer_post_hooks
    detach(model)
    assert not _global_optimizer_pre_hooks and not _global_optimizer_post_hooks


@pytest.mark.setting("own loop", "resuming without the head", outcome="refused")
def test_a_new_head_under_the_optimizer_of_a_resumed_run_stops_the_first_step():
    model = attached()
    optimizer = sgd(model, kind=torch.optim.AdamW)
    step(model, optimizer)
    fresh = attached()
    resumed = sgd(fresh, kind=torch.optim.AdamW)
    resumed.load_state_dict(optimizer.state_dict())
    with pytest.raises(RuntimeError, match=r"the velocity head is new.*SFRCallback.*set model\.sfr\.step"):
        step(fresh, resumed)
    fresh.load_state_dict(model.state_dict())
    step(fresh, resumed)
    assert fresh.sfr.step == 2
    # a head that has not moved yet, since the rates began at zero, is no new one
    model = attached()
    optimizer = sgd(model, lr=0.0, kind=torch.optim.AdamW)
    step(model, optimizer)
    fresh = attached()
    fresh.load_state_dict(model.state_dict())
    resumed = sgd(fresh, kind=torch.optim.AdamW)
    resumed.load_state_dict(optimizer.state_dict())
    step(fresh, resumed)


def test_a_step_that_only_makes_the_optimizers_state_is_no_past():
    """As torch.distributed.checkpoint makes it: a rate and gradients of zero."""
    model = attached()
    optimizer = sgd(model, lr=0.0, kind=torch.optim.AdamW)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert model.sfr.head.output_proj.weight in optimizer.state
    optimizer.param_groups[0]["lr"] = 0.1
    step(model, optimizer)
    assert model.sfr.step == 1


@pytest.mark.setting("own loop", "torch.compile of the optimizer's step")
def test_a_compiled_step_is_counted():
    model = attached()
    optimizer = sgd(model, kind=torch.optim.AdamW)
    torch._dynamo.reset()
    compiled = torch.compile(lambda: optimizer.step(), backend="eager")
    for turn in (1, 2):
        model(**BATCH).loss.backward()
        compiled()
        assert model.sfr.step == turn


@pytest.mark.setting("own loop", "a schedule of λ that nobody moves", outcome="refused")
@pytest.mark.parametrize("options", [dict(flow_schedule="cosine"), dict(flow_warmup=0.1)])
def test_a_schedule_that_nobody_moves_stops_the_first_step(options):
    model = attached(SFRConfig(**{**CONFIG.to_dict(), **options}))
    with pytest.raises(RuntimeError, match=r"only SFRCallback knows.*model\.sfr\.schedule"):
        step(model, sgd(model))
    model.sfr.schedule = 0.5
    step(model, sgd(model))


def test_a_model_in_eval_is_trained_with_a_warning():
    model = attached().eval()
    optimizer = sgd(model)
    with pytest.warns(RuntimeWarning, match=r"eval\(\).*model.train\(\)"):
        step(model, optimizer)
    model = attached()
    model(**BATCH).loss.backward()
    model.eval()(**BATCH)  # with gradients, before the step
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sgd(model).step()


@pytest.mark.setting("own loop", "steps of an optimizer of flat copies (as DeepSpeed's)")
def test_a_step_of_flat_copies_counts_for_the_model_that_no_other_optimizer_holds():
    """As an engine makes them, which shards the optimizer's state."""
    model, other = attached(), attached()
    step(other, sgd(other))
    for turn in (1, 2):
        model(**BATCH).loss.backward()
        flat = torch.zeros(7, requires_grad=True)
        flat.grad = torch.ones(7)
        torch.optim.SGD([flat], lr=0.1).step()
        assert (model.sfr.step, other.sfr.step) == (turn, 1)


@pytest.mark.setting("own loop", "fully_shard before attach", outcome="refused")
def test_a_model_that_is_sharded_already_is_refused():
    plain = tiny_llama()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(plain, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match="attach first, then fully_shard"):
            attach(plain, CONFIG, STORE)
        assert attachment_of(plain) is None
        model = fully_shard(attached(), mesh=init_device_mesh("cpu", (1,)))
        step(model, sgd(model))
        assert model.sfr.step == 1
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.setting("own loop", "state_dict with head and step")
def test_the_step_is_in_the_state_dict_and_moves_with_it():
    model, twin = attached(), attached()
    optimizer = sgd(model)
    for _ in range(2):
        step(model, optimizer)
    twin.load_state_dict(model.state_dict())
    assert twin.sfr.step == 2 and torch.equal(twin(**BATCH).loss, model(**BATCH).loss)
    assert {name.split(".")[0] for name in model.sfr.state_dict()} == {"head", "_extra_state"}
    assert attach(tiny_llama(), CONFIG, target_size=TARGET).sfr.step == 0
