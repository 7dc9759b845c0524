"""Copies of an attached model: each is one of its own, and works as the original does."""

import copy
import inspect
import io
import pickle
from concurrent.futures import ProcessPoolExecutor
from types import MethodType

import pytest
import torch
import torch.multiprocessing
from accelerate import Accelerator
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from accelerate.state import AcceleratorState
from corpora import CONFIG, HashEncoder, Words, build
from marks import long
from outcomes import assert_same, gradients
from tiny import BATCH, PLAIN, SAMPLES, SIZES, STORE, adapted, attached, ce_attached, pad, tiny_llama, tiny_store
from transformers import Gemma2Config, Gemma2ForCausalLM

from sfr_kernels import attach, detach
from sfr_kernels.targets import OnlineTargets, SFRCollator
from sfr_kernels.training.objectives import attachment_of

setting = pytest.mark.setting


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


LORA = [pytest.param(m, marks=setting("own loop", "LoRA before attach"), id=m) for m in ("modules_to_save", "lm_head")]
COPIES = {"torch.save": saved, "pickle": lambda model: pickle.loads(pickle.dumps(model)), "deepcopy": copy.deepcopy}


def make_targets(kind: str, folder):
    if kind == "memory":
        return tiny_store(SAMPLES)
    return OnlineTargets(HashEncoder(), Words()) if kind == "online" else build(folder / "store", SAMPLES)


def make(kind: str, folder, lora: str = ""):
    """An attached model in training, with its batch; with adapters, and a copy of the lm_head or another on it."""
    model = tiny_llama()
    if lora == "modules_to_save":
        model = adapted(model, ["q_proj"], modules_to_save=["lm_head"])
    elif lora == "lm_head":
        model = adapted(model, ["q_proj", "lm_head"])
    if kind == "ce":
        return attach(model, objective="ce"), PLAIN
    targets = make_targets(kind, folder)
    attach(model, CONFIG, targets)
    torch.nn.init.normal_(attachment_of(model).head.output_proj.weight)
    if kind == "memory":
        return model, {**PLAIN, "sample_id": torch.arange(len(SAMPLES))}  # looked up by the model
    return model, SFRCollator(CONFIG, targets, pad)(SAMPLES)


def differentiate(model, batch):
    """The loss and its gradients."""
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return gradients(model) | {"loss": loss.detach()}


def step(model, batch):
    found = differentiate(model, batch)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    return found


@setting("own loop", "copy.deepcopy, pickle and torch.save")
@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("lora", [pytest.param("", id="full"), *LORA])
@pytest.mark.parametrize("kind", ["disk", "memory", "online", "ce"])
def test_a_copy_is_the_model_and_one_of_its_own(kind, lora, way, tmp_path):
    model, batch = make(kind, tmp_path, lora)
    step(model, batch)  # the state of a run is copied too
    twin = COPIES[way](model)
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}
    trained = [step(twin, batch) for _ in range(2)]
    assert_same(step(model, batch), trained[0])  # training the copy has not trained the original
    assert inspect.signature(twin.forward) == inspect.signature(model.forward)
    assert inspect.signature(twin.save_pretrained) == inspect.signature(model.save_pretrained)

    detach(twin)
    base = twin.get_base_model() if lora else twin
    assert twin(**PLAIN).logits.shape[-1] == base.config.vocab_size
    assert not [k for m in twin.modules() for k in m.__dict__ if "sfr" in k] and attachment_of(twin) is None
    of_ours = ("forward", "save_pretrained", "update_layer")
    assert not [k for m in (base, *base.lm_head.modules()) for k in of_ours if k in m.__dict__]
    assert not any(m._forward_hooks for m in base.lm_head.modules())
    assert_same(step(model, batch), trained[1])


def test_a_shallow_copy_shares_all_and_leaves_detaching_to_the_original():
    model, batch = make("online", None)
    twin = copy.copy(model)
    with pytest.raises(ValueError, match="shallow copy"):
        detach(twin)
    assert torch.equal(twin(**batch, seed=3).loss, model(**batch, seed=3).loss)


@setting("own loop", "spawned processes")
@pytest.mark.parametrize("kind", ["disk", *long("online")])
def test_a_model_goes_to_a_process_that_is_spawned(kind, tmp_path):
    model, batch = make(kind, tmp_path)
    with ProcessPoolExecutor(1, torch.multiprocessing.get_context("spawn")) as pool:
        found = pool.submit(differentiate, model, batch).result(timeout=120)
        wanted = differentiate(model, batch)
        assert_same(found, wanted, rtol=1e-5, atol=1e-6)
        assert_same(found["loss"], wanted["loss"], rtol=1e-6)


def test_a_copy_of_online_targets_shares_the_encoder_and_remembers_for_itself():
    targets = make_targets("online", None)
    twin = copy.deepcopy(targets)
    assert twin.encoder is targets.encoder
    twin.start(["a"], "cpu").wait()
    assert twin.encoded == 1 and targets.encoded == 0 and not targets._slots


@setting("accelerate", "offloaded lm_head, evaluation")
def test_a_model_under_the_hooks_of_an_engine_is_copied_or_refused_at_once():
    plain = tiny_llama()(**PLAIN).loss
    for hooked_first in (True, False):
        model = tiny_llama() if hooked_first else ce_attached()
        weights = {k: v.clone() for k, v in model.lm_head.state_dict().items()}
        add_hook_to_module(model.lm_head, AlignDevicesHook(execution_device="cpu", offload=True, weights_map=weights))
        assert model.lm_head.weight.device.type == "meta"
        if hooked_first:
            attach(model, CONFIG, STORE)
        batch, name = (BATCH, "ce_loss") if hooked_first else (PLAIN, "loss")
        twin = copy.deepcopy(model)
        with torch.no_grad():
            wanted = model(**batch)[name]
            torch.testing.assert_close(wanted, plain, rtol=1e-5, atol=1e-6)
            twin.lm_head._hf_hook.weights_map["weight"].mul_(2)
            assert twin(**batch)[name] != wanted == model(**batch)[name]
            with pytest.raises((AttributeError, pickle.PicklingError)):  # accelerate's own function
                pickle.dumps(model)
            detach(model)
            torch.testing.assert_close(model(**PLAIN).loss, plain)
        remove_hook_from_module(model.lm_head)
        assert_same(step(model, PLAIN), step(tiny_llama(), PLAIN))


def test_a_model_whose_forward_was_wrapped_after_attach_is_not_pickled_without_ours():
    """As accelerate wraps it for mixed precision, in a method that pickle takes for the class's own forward."""
    AcceleratorState._reset_state(reset_partial_state=True)  # which an earlier test may have left
    model, batch = make("online", None)
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    shown = inspect.signature(model.forward)
    prepared = accelerator.prepare_model(model)
    assert inspect.signature(prepared.forward) == shown
    wanted = prepared(**batch, seed=3).loss
    assert torch.equal(copy.deepcopy(prepared)(**batch, seed=3).loss, wanted)
    for after in (prepared, accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)):
        torch.testing.assert_close(after(**batch, seed=3).loss, wanted, rtol=1e-2, atol=0)
        with pytest.raises(TypeError, match="forward of LlamaForCausalLM was replaced after attach"):
            pickle.dumps(after)
    AcceleratorState._reset_state(reset_partial_state=True)
    sfr = model.sfr
    head = detach(model)
    assert head is sfr.head and COPIES["pickle"](attach(model, sfr, sfr.store))(**batch).loss > 0


def test_a_forward_that_was_replaced_before_attach_is_not_pickled_without_it():
    """A bound method is pickled as its name, under which the class has another one."""
    model, calls = tiny_llama(), []
    own = type(model).forward

    def forward(self, *args, **kwargs):
        calls.append(1)
        return own(self, *args, **kwargs)

    model.forward = MethodType(forward, model)
    attach(model, CONFIG, STORE)
    model(**BATCH)
    before = len(calls)
    assert before and copy.deepcopy(model)(**BATCH).loss > 0 and len(calls) == before + 1
    with pytest.raises(TypeError, match="forward of LlamaForCausalLM was replaced before attach"):
        pickle.dumps(model)


def test_one_loss_at_a_time():
    """A second thread would get the first one's loss."""
    model, refused = attached(STORE), []

    def again(module, args):
        if not refused:
            refused.append(True)
            with pytest.raises(RuntimeError, match="one loss at a time"):
                model(**BATCH, seed=3)

    wanted = model(**BATCH, seed=3).loss
    model.model.layers[0].register_forward_pre_hook(again)
    assert model(**BATCH, seed=3).loss == wanted and refused


def test_an_lm_head_has_one_attached_model():
    first, second = tiny_llama(), tiny_llama(1)
    second.lm_head = first.lm_head
    attach(first, CONFIG, STORE)
    before = set(second.__dict__)
    with pytest.raises(ValueError, match="belongs to another attached model"):
        attach(second, CONFIG, STORE)
    assert set(second.__dict__) == before and not hasattr(second, "sfr")
    detach(first)
    assert attach(second, CONFIG, STORE) is second


def test_a_model_that_is_made_without_memory_gets_it_later():
    with torch.device("meta"):
        model = attached(STORE)
    model.to_empty(device="cpu")
    model.load_state_dict(attached(STORE).state_dict())
    model.model.rotary_emb = tiny_llama().model.rotary_emb  # whose buffers are in no state dict
    assert model(**BATCH).loss.isfinite() and model.sfr.flow_weight == CONFIG.flow_weight


@setting("own loop", "weights in bfloat16")
@pytest.mark.parametrize("kind", ["memory", "online"])
def test_a_model_trains_as_a_whole_in_bfloat16(kind):
    """As Lightning's bf16-true has it: weights, every tensor of a batch, and those that are made on the way."""
    config = Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=5.0)  # measured on the way
    targets, runs = make_targets(kind, None), []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model = attach(Gemma2ForCausalLM(config), CONFIG, targets).train()
        torch.nn.init.normal_(model.sfr.head.output_proj.weight)
        model.sfr.flow_weight = 0.3  # no number of bfloat16
        model.to(dtype)
        batch = SFRCollator(CONFIG, targets, pad)(SAMPLES)
        batch = {k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in batch.items()}
        torch.set_default_dtype(dtype)
        try:
            out = model(**batch, seed=3)
            out.loss.backward()
        finally:
            torch.set_default_dtype(torch.float32)
        torch.testing.assert_close(out.loss, out.ce_loss + 0.3 * out.flow_loss, rtol=1e-6, atol=0)
        assert all(p.grad.dtype == dtype and p.grad.abs().sum() > 0 for p in model.parameters())
        runs.append([value.float() for value in out.values()])
    torch.testing.assert_close(*runs, rtol=1e-2, atol=0)
