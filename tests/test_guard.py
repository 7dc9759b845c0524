"""Training that does not do what `attach` was asked for stops at its first optimizer step, whoever makes the step."""

import copy
import gc
import pickle
import warnings
from dataclasses import replace

import pytest
import tiny
import torch
from outcomes import assert_same, weights
from tiny import BATCH, CONFIG, STORE, TARGET, adapted, ce_attached, tiny_llama
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from sfr_kernels import attach, detach
from sfr_kernels.training import guard
from sfr_kernels.training.guard import unwatch
from sfr_kernels.training.objectives import attachment_of

setting = pytest.mark.setting


def attached(**fields):
    return tiny.attached(STORE, replace(CONFIG, **fields))


@pytest.fixture
def model():
    return attached()


def optimizer_of(*modules, lr=0.1, kind=SGD):
    return kind([p for m in modules for p in m.parameters() if p.requires_grad], lr=lr)


def own_loss(model):
    """What a trainer does that makes its own loss of the logits, or multiplies by the lm_head itself."""
    return model(input_ids=BATCH["input_ids"]).logits.square().mean()


def step(model, optimizer=None, loss=lambda model: model(**BATCH).loss):
    optimizer = optimizer or optimizer_of(model)
    optimizer.zero_grad()
    loss(model).backward()
    optimizer.step()


def zero_gradients(model) -> None:
    for p in model.parameters():
        p.grad = torch.zeros_like(p)


@pytest.fixture
def process_group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@setting("own loop", "a loss of the trainer's own (as DPO's)", outcome="refused")
@pytest.mark.parametrize("objective", ["sfr", "ce"])
@pytest.mark.parametrize("way", ["itself", "deepcopy", "pickle", "closure"])
def test_a_loss_that_is_never_computed_stops_the_first_step(way, objective):
    model = ce_attached() if objective == "ce" else attached()
    model = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m))}.get(way, lambda m: m)(model)
    optimizer, before = optimizer_of(model), weights(model)

    def closure():
        optimizer.zero_grad()
        loss = own_loss(model)
        loss.backward()
        return loss

    closure()
    with pytest.raises(RuntimeError, match=r"does not compute the loss that was attached.*SFRTrainer.*liger"):
        optimizer.step(closure) if way == "closure" else optimizer.step()
    if way != "closure":
        assert_same(weights(model), before)
    detach(model)
    step(model, optimizer, own_loss)


def test_another_loss_after_a_run_of_ours_is_noticed():
    """Cross-entropy alone has no head whose gradient is missing: an optimizer's second step tells."""
    model = ce_attached()
    step(model)
    optimizer = optimizer_of(model)
    step(model, optimizer, own_loss)  # one of several optimizers has the loss of the last turn, too
    with pytest.raises(RuntimeError, match="does not compute the loss"):
        step(model, optimizer, own_loss)
    model = attached()
    step(model)
    with pytest.raises(RuntimeError, match="no gradient has reached the velocity head"):
        step(model, loss=own_loss)


def test_steps_that_change_nothing_and_other_models_steps_are_none(model):
    """Nor is an optimizer looked into that has no parameters, as one around another."""

    class Wrapper(torch.optim.Optimizer):
        def __init__(self):
            pass

    other = torch.nn.Linear(3, 3)
    for optimizer in (optimizer_of(other), *(optimizer_of(model, lr=rate) for rate in (0.0, 0.0, 0.1))):
        other(torch.ones(3)).sum().backward()
        zero_gradients(model)
        if optimizer.param_groups[0]["lr"]:
            model.zero_grad()
        optimizer.step()
    own, others = optimizer_of(model), optimizer_of(other)
    gc.collect()  # so that what is made now is looked at first
    wrapper = Wrapper()
    for _ in range(3):
        model(**BATCH).loss.backward()
        other(torch.ones(3)).sum().backward()
        others.step()
    assert model.sfr.step == 0 and wrapper is not None
    own.step()
    assert model.sfr.step == 1


@setting("own loop", "optimizer made before attach", outcome="refused")
def test_an_optimizer_without_the_head_stops_at_once_if_it_has_all_the_rest():
    plain = tiny_llama()
    optimizer = optimizer_of(plain)
    with pytest.raises(RuntimeError, match=r"optimizer holds.*not those of the velocity head.*after attach"):
        step(attach(plain, CONFIG, STORE), optimizer)


@setting("own loop", "several optimizers")
def test_parts_may_have_optimizers_of_their_own_and_the_head_must_have_one(model):
    head = model.sfr.head.output_proj.weight
    trunk, rest = optimizer_of(model.model, model.lm_head), optimizer_of(model.sfr)
    for _ in range(3):
        model(**BATCH).loss.backward()
        trunk.step()
        rest.step()
    assert model.sfr.step == 3 and head.any()
    model = attached()
    parts = [optimizer_of(model.model.layers), optimizer_of(model.lm_head)]
    model(**BATCH).loss.backward()
    with pytest.raises(RuntimeError, match="not those of the velocity head"):
        parts[0].step()


def test_a_model_that_shares_its_parameters_may_be_left_alone(model):
    plain = tiny_llama()
    for name, p in plain.named_parameters():
        owner, _, own = name.rpartition(".")
        setattr(model.get_submodule(owner), own, p)
    with pytest.raises(RuntimeError, match="does not compute the loss"):
        step(plain, loss=own_loss)
    unwatch(model)
    step(plain, loss=own_loss)


def test_a_loss_that_alternates_with_another_is_counted_and_no_error_where_that_is_said(model):
    optimizer = optimizer_of(model)
    unwatch(model)
    for turn in range(3):
        step(model, optimizer)
        step(model, optimizer, own_loss)
        assert model.sfr.step == turn + 1


ADAPTED, FROZEN = (setting("own loop", x, outcome="refused") for x in ("adapters after attach", "frozen head"))
CHANGES = [
    pytest.param(lambda model: adapted(model, ["q_proj"]), id="get_peft_model", marks=ADAPTED),
    pytest.param(adapted, id="all-linear", marks=ADAPTED),
    pytest.param(lambda m: m.add_adapter(tiny.lora(["q_proj"])) or m, id="add_adapter", marks=ADAPTED),
    pytest.param(lambda m: m.sfr.requires_grad_(False) and m, id="requires_grad", marks=FROZEN),
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_head_that_was_frozen_or_adapted_stops_the_first_forward(change, model):
    model = change(model)
    with pytest.raises(RuntimeError, match=r"head is frozen or changed \(.*Wrap the model first, then attach"):
        model(**BATCH)
    with torch.no_grad():
        model(input_ids=BATCH["input_ids"])


@pytest.mark.parametrize("way", ["another loss", "zero gradients", "rate of zero", "rate of zero after a warm-up"])
def test_a_head_that_does_not_move_stops_the_first_step_that_moves_something(way, model):
    rest = [p for n, p in model.named_parameters() if not n.startswith("sfr.")]
    head = dict(params=list(model.sfr.parameters()), lr=0.0 if way.startswith("rate") else 0.1)
    optimizer = SGD([dict(params=rest, lr=0.0 if way.endswith("warm-up") else 0.1), head])
    if way != "another loss":  # which leaves the head's gradients None
        zero_gradients(model)

    def backward():
        out = model(**BATCH)
        (out.loss if way.startswith("rate") else own_loss(model)).backward()

    backward()
    if way.endswith("warm-up"):
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 0.1
        backward()
    what = "rate of the velocity head is 0" if way.startswith("rate") else "no gradient has reached the velocity head"
    with pytest.raises(RuntimeError, match=what):
        optimizer.step()


def test_a_model_that_the_loss_does_not_reach_stops_the_first_step():
    """As reentrant checkpointing detaches it, where nothing before the first layer needs a gradient."""
    model = attach(adapted(tiny_llama(), ["q_proj"]), CONFIG, STORE)
    model.get_base_model().model.norm.register_forward_hook(lambda module, args, out: out.detach())
    with pytest.raises(RuntimeError, match=r"no gradient has reached the model.*enable_input_require_grads"):
        step(model)


@setting("own loop", "DistributedDataParallel before attach", outcome="refused")
def test_ddp_around_the_model_before_attach_stops_the_first_forward(process_group):
    plain = tiny_llama()
    around = DistributedDataParallel(plain)
    attach(plain, CONFIG, STORE)
    with pytest.raises(RuntimeError, match=r"does not exchange.*attach first, then wrap"):
        around(**BATCH)
    around = DistributedDataParallel(attached())
    step(around)
    assert around.module.sfr.step == 1


@setting("own loop", "fully_shard before attach", outcome="refused")
def test_a_model_that_is_sharded_already_is_refused(process_group):
    plain, mesh = tiny_llama(), init_device_mesh("cpu", (1,))
    fully_shard(plain, mesh=mesh)
    with pytest.raises(ValueError, match="attach first, then fully_shard"):
        attach(plain, CONFIG, STORE)
    assert attachment_of(plain) is None
    model = fully_shard(attached(), mesh=mesh)
    step(model)
    assert model.sfr.step == 1


def test_a_frozen_model_is_evaluated_with_gradients(model):
    """As for a saliency map."""
    model.eval().requires_grad_(False)
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


@setting("own loop", "resuming without the head", outcome="refused")
def test_a_new_head_under_the_optimizer_of_a_resumed_run_stops_the_first_step():
    def resumed(rate: float):
        """A model and its optimizer after a step at that rate, and a new model with the optimizer's past."""
        model, fresh = attached(), attached()
        old, optimizer = optimizer_of(model, lr=rate, kind=AdamW), optimizer_of(fresh, kind=AdamW)
        step(model, old)
        optimizer.load_state_dict(old.state_dict())
        return model, fresh, optimizer

    model, fresh, optimizer = resumed(rate=0.1)
    with pytest.raises(RuntimeError, match=r"the velocity head is new.*SFRCallback.*set model\.sfr\.step"):
        step(fresh, optimizer)
    fresh.load_state_dict(model.state_dict())
    step(fresh, optimizer)
    assert fresh.sfr.step == 2
    # a head that has not moved yet, since the rates began at zero, is no new one
    model, fresh, optimizer = resumed(rate=0.0)
    fresh.load_state_dict(model.state_dict())
    step(fresh, optimizer)


def test_a_step_that_only_makes_the_optimizers_state_is_no_past(model):
    """As torch.distributed.checkpoint makes it: a rate and gradients of zero."""
    optimizer = optimizer_of(model, lr=0.0, kind=AdamW)
    zero_gradients(model)
    optimizer.step()
    assert model.sfr.head.output_proj.weight in optimizer.state
    optimizer.param_groups[0]["lr"] = 0.1
    step(model, optimizer)
    assert model.sfr.step == 1


@setting("own loop", "torch.compile of the optimizer's step")
def test_a_compiled_step_is_counted(model):
    optimizer = optimizer_of(model, kind=AdamW)
    torch._dynamo.reset()
    compiled = torch.compile(lambda: optimizer.step(), backend="eager")
    for turn in (1, 2):
        model(**BATCH).loss.backward()
        compiled()
        assert model.sfr.step == turn


@setting("own loop", "a schedule of λ that nobody moves", outcome="refused")
@pytest.mark.parametrize("options", [dict(flow_schedule="cosine"), dict(flow_warmup=0.1)])
def test_a_schedule_that_nobody_moves_stops_the_first_step(options):
    model = attached(**options)
    with pytest.raises(RuntimeError, match=r"only SFRCallback knows.*model\.sfr\.schedule"):
        step(model)
    model.sfr.schedule = 0.5
    step(model)


def test_a_model_in_eval_is_trained_with_a_warning(model):
    with pytest.warns(RuntimeWarning, match=r"eval\(\).*model.train\(\)"):
        step(attached().eval())
    model(**BATCH).loss.backward()
    model.eval()(**BATCH)  # with gradients, before the step
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer_of(model).step()


@setting("own loop", "steps of an optimizer of flat copies (as DeepSpeed's)")
@pytest.mark.parametrize("way", ["flat", "one by one"])
def test_a_step_of_copies_counts_for_the_model_that_no_other_optimizer_holds(way, model):
    """As an engine makes them, which shards the optimizer's state or keeps it in float32."""
    other = attached()
    step(other)
    copies = [torch.zeros(7)] if way == "flat" else [p.detach().clone() for p in model.parameters() if p.requires_grad]
    for turn in (1, 2):
        model(**BATCH).loss.backward()
        for p in copies:
            p.requires_grad_().grad = torch.ones_like(p)
        SGD(copies, lr=0.1).step()
        assert (model.sfr.step, other.sfr.step) == (turn, 1)


@pytest.mark.parametrize("head_ema", [0.0, 0.9])
def test_a_model_whose_loss_was_only_looked_at_leaves_the_training_of_another_alone(head_ema):
    """As in a notebook: it has no optimizer yet, and the other's parameters are no flat copies of its own."""
    looked_at, other = attached(head_ema=head_ema), torch.nn.Linear(3, 3)
    looked_at(**BATCH).loss.backward()
    other(torch.ones(3)).sum().backward()
    optimizer_of(other).step()
    assert looked_at.sfr.step == 0


@setting("own loop", "state_dict with head and step")
def test_the_step_is_in_the_state_dict_and_moves_with_it(model):
    twin, optimizer = attached(), optimizer_of(model)
    for _ in range(2):
        step(model, optimizer)
    twin.load_state_dict(model.state_dict())
    assert twin.sfr.step == 2 and torch.equal(twin(**BATCH).loss, model(**BATCH).loss)
    assert {name.split(".")[0] for name in model.sfr.state_dict()} == {"head", "_extra_state"}
    assert attach(tiny_llama(), CONFIG, target_size=TARGET).sfr.step == 0
