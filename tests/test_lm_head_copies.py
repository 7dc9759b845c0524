"""PEFT's modules_to_save=["lm_head"] under an attached loss, in float64: the original or an adapter's copy, whichever
is in use. test_adapters.py compares two adapters with the SFR loss, switched and disabled."""

import pytest
import torch
from outcomes import gradients
from peft import get_peft_model
from test_copies import COPIES
from test_lora_lm_head import assert_own, both, compared, differentiated, entropy
from tiny import BATCH, PLAIN, VOCAB, in_two_processes, lora, tiny_llama
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from sfr_kernels import attach, detach
from sfr_kernels.training.objectives import attachment_of

setting = pytest.mark.setting
WITH_COPY, WITHOUT = lora(["q_proj"], modules_to_save=["lm_head"]), lora(["v_proj"])
IN_COPY = lora(r"model\.layers\..*\.q_proj|lm_head\.modules_to_save\.first")


def filled(model, *adapters: str):
    """With adapters that are not zero, and copies that differ."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ("lora_B" in name or "modules_to_save" in name) and {*name.split(".")} & {*adapters}:
                p += torch.randn(p.shape, generator=generator, dtype=p.dtype) / 4
    return model


def copied(second=WITH_COPY, **options):
    """A PEFT model in training with two adapters, the first with a copy of the lm_head, and active."""
    model = get_peft_model(tiny_llama(**options).double(), WITH_COPY, adapter_name="first")
    model.add_adapter("second", second)
    return filled(model, "first", "second").train()


def lm_head(model):
    return model.get_base_model().lm_head


def later(model, name: str = "later", config=WITH_COPY) -> None:
    torch.manual_seed(0)
    model.add_adapter(name, config)
    filled(model, name).set_adapter(name)


def tied_later(model) -> None:
    """As PEFT makes a copy of tied embeddings."""
    lm_head(model).update("tied", tied_module=nn.Embedding(VOCAB, 32, dtype=torch.float64))
    nn.init.ones_(lm_head(model).modules_to_save["tied"].weight)
    model.peft_config["tied"] = WITH_COPY
    lm_head(model).set_adapter("tied")


def test_the_copy_is_that_of_the_moment():
    """Switched, disabled, added and deleted after attach; and detach leaves nothing behind."""
    model, plain = both(copied())
    losses, check = compared(model, plain)
    check("first")
    check("second", lambda m: m.set_adapter("second"))
    with model.disable_adapter(), plain.disable_adapter(), torch.no_grad():
        losses["none"] = model(**PLAIN).loss.item()
        assert losses["none"] == pytest.approx(entropy(plain).item(), rel=1e-10)
    check("added", later)
    check("first again", lambda m: m.set_adapter("first"))
    check("added without a copy", lambda m: later(m, "bare", WITHOUT))
    check("tied", tied_later)
    check("deleted", lambda m: (m.set_adapter("later"), m.delete_adapter("later")))
    assert losses["first"] == losses["first again"] and len({round(x, 6) for x in losses.values()}) >= 5
    attributes = [(name, set(m.__dict__)) for name, m in plain.named_modules()]
    detach(model)
    assert [(name, set(m.__dict__)) for name, m in model.named_modules()] == attributes
    assert not any(m._forward_hooks for m in model.modules())


def test_a_lm_head_whose_first_copy_comes_after_attach():
    model, plain = both(get_peft_model(tiny_llama().double(), WITHOUT))
    for m in (model, plain):
        later(m)
    assert_own(model, plain)
    detach(model)
    assert not [m for m in model.modules() if "_sfr_covered" in m.__dict__ or m._forward_hooks]


def test_lora_on_a_copy():
    model, plain = both(copied(IN_COPY))
    for name in ("first", "second"):
        for m in (model, plain):
            m.set_adapter(name)
        assert_own(model, plain)
    for m in (model, plain):  # the copy and the LoRA on it
        lm_head(m).set_adapter("first")
    assert_own(model, plain)
    assert any("lora_B.second" in name and "lm_head" in name for name in gradients(model))
    detach(model)
    assert not [m for m in model.modules() if "_sfr_covered" in m.__dict__ or m._forward_hooks]


@pytest.mark.parametrize("active", ["first", "second"])
def test_an_unloaded_model_stays_attached_with_the_copy_that_was_in_use(active):
    model, plain = both(copied(WITHOUT))
    model, plain = (m.set_adapter(active) or m.merge_and_unload().requires_grad_(True) for m in (model, plain))
    assert_own(model, plain)


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_of_the_model_switches_by_itself(way):
    model, plain = both(copied())
    twin = COPIES[way](model)
    for m in (twin, plain):
        m.set_adapter("second")
    assert_own(twin, plain)
    plain.set_adapter("first")
    assert_own(model, plain)
    detach(twin)
    assert not [m for m in twin.modules() if "_sfr_covered" in m.__dict__ or m._forward_hooks]
    assert_own(model, plain)


def test_switching_under_torch_compile():
    torch._dynamo.reset()
    model, plain = both(copied(WITHOUT))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for name in ("first", "second", "first"):
        for m in (model, plain):
            m.set_adapter(name)
        found = differentiated(model, lambda m: compiled(**PLAIN).loss)
        wanted = differentiated(plain, entropy)
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def sharded(rank: int) -> None:
    torch.distributed.init_process_group("gloo")
    model, plain = both(copied())
    mesh, head = init_device_mesh("cpu", (2,)), lm_head(model)
    layers = model.get_base_model().model.layers
    for module in (head.original_module, *head.modules_to_save.values(), *layers, model):
        fully_shard(module, mesh=mesh)
    for name in ("first", "second", "first"):
        for m in (model, plain):
            m.set_adapter(name)
        found = differentiated(model, lambda m: m(**PLAIN).loss)
        whole = {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in found.items()}
        torch.testing.assert_close(whole, differentiated(plain, entropy), rtol=1e-9, atol=1e-12)
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")
def test_every_copy_may_be_sharded_by_itself():
    in_two_processes(sharded)


def test_a_hook_of_a_copy_is_seen_when_that_copy_is_in_use():
    """Not when the first loss was compared with the model's own, where another was."""
    model = copied()
    handle = lm_head(model).modules_to_save["second"].register_forward_hook(lambda m, args, out: 2 * out)
    attach(model, objective="ce")
    wanted = model(**PLAIN).loss
    model.set_adapter("second")
    with pytest.raises(ValueError, match="has a hook on the lm_head that changes its output"):
        model(**PLAIN)
    model.set_adapter("first")
    assert model(**PLAIN).loss == wanted
    handle.remove()
    model.set_adapter("second")
    assert model(**PLAIN).loss != wanted


def replaced(module) -> None:
    module.forward = lambda hidden: hidden


def in_int8(module) -> None:
    module.weight = nn.Parameter(module.weight.detach().to(torch.int8), requires_grad=False)


@pytest.mark.parametrize("place", ["original_module", "modules_to_save.first", "modules_to_save.second"])
@pytest.mark.parametrize(("change", "reason"), [(replaced, "forward of model's lm_head"), (in_int8, "16 bits or more")])
def test_every_copy_must_fit_and_the_model_is_left_as_it_was(place, change, reason):
    model = copied()
    change(lm_head(model).get_submodule(place))
    before = [set(m.__dict__) for m in model.modules()]
    with pytest.raises(TypeError, match=reason):
        attach(model, objective="ce")
    assert [set(m.__dict__) for m in model.modules()] == before and attachment_of(model) is None


def test_a_copy_that_comes_later_and_does_not_fit_is_refused():
    model, _ = both(copied())
    embeddings = nn.Embedding(VOCAB, 32, dtype=torch.float32).to(torch.float8_e5m2)
    with pytest.raises(TypeError, match="16 bits or more"):
        lm_head(model).update("tied", tied_module=embeddings)


def test_adapters_that_are_mixed_in_a_batch_are_refused():
    model, _ = both(copied())
    names = ["first", "second"] * (len(BATCH["input_ids"]) // 2)
    with pytest.raises(ValueError, match="adapter_names"):
        model.eval()(**PLAIN, adapter_names=names)
    assert model(input_ids=BATCH["input_ids"], adapter_names=names).logits.shape[-1] == VOCAB


@setting("own loop", "the lm_head's forward replaced after attach", outcome="refused")
@pytest.mark.parametrize("first", [True, False], ids=["at the first loss", "after one"])
def test_a_forward_that_is_replaced_after_attach_is_refused(first):
    model = attach(tiny_llama(), objective="ce")
    if not first:
        model(**PLAIN)
    own = model.lm_head.forward
    model.lm_head.forward = lambda hidden: hidden @ model.lm_head.weight.T
    with pytest.raises(RuntimeError, match="forward was replaced after attach, and the loss with it: restore it"):
        model(**PLAIN)
    model.lm_head.forward = own
    torch.testing.assert_close(model(**PLAIN).loss, tiny_llama()(**PLAIN).loss)
