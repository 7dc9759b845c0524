"""LoRA on the lm_head of an attached model: the loss and all gradients of the plain PEFT model, in float64."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from cases import assert_same
from corpora import CONFIG, TARGET
from operations import Operations
from outcomes import gradients
from peft import IA3Config, get_peft_model
from test_trainer import trainer_of
from tiny import BATCH, PLAIN, SAMPLES, STORE, VOCAB, in_two_processes, lora, pad, tiny_llama
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from sfr_kernels import LoRA, SupervisedRows, attach, detach, reference
from sfr_kernels.training.objectives import attachment_of

setting = pytest.mark.setting
IDS, TARGETS = BATCH["input_ids"], ["q_proj", "lm_head"]


def adapters(model, *names: str, **options):
    """A PEFT model in training with an adapter of each name on its lm_head, none of which is zero."""
    names = names or ("default",)
    model = get_peft_model(model, lora(TARGETS, **options), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, lora(TARGETS, **options | dict(lora_alpha=3)))
    return filled(model).train()


def filled(model):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if "lora_B" in name:
                p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) / 4)
    return model


def entropy(model) -> torch.Tensor:
    """Of the plain model's logits; its own loss rounds them to float32."""
    logits = model(input_ids=IDS, attention_mask=PLAIN["attention_mask"]).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), PLAIN["labels"][:, 1:].flatten())


def differentiated(model, loss_of) -> dict[str, torch.Tensor]:
    """The loss, with the draws of one seed, and all gradients, by name without what the attachment adds."""
    model.zero_grad()
    torch.manual_seed(5)
    loss = loss_of(model)
    loss.backward()
    return {"value": loss.detach()} | {name: g for name, g in gradients(model).items() if "sfr." not in name}


def assert_own(attached, plain) -> None:
    """The attached model's cross-entropy and gradients are those of the plain one, and so is all in evaluation."""
    assert_same(differentiated(attached, lambda m: m(**PLAIN).loss), differentiated(plain, entropy), rtol=1e-9)
    attached.eval(), plain.eval()
    with torch.no_grad():
        assert attached(**PLAIN).loss.item() == pytest.approx(entropy(plain).item(), rel=1e-10)
        assert torch.equal(attached(input_ids=IDS).logits, plain(input_ids=IDS).logits)
    attached.train(), plain.train()


def both(model) -> tuple:
    """The model, attached, and a plain copy of it."""
    plain = copy.deepcopy(model)
    attach(model, objective="ce")
    model(**PLAIN)  # the first loss measures the model's own
    return model, plain


def everywhere(model):
    return filled(get_peft_model(model, lora(["q_proj", "lm_head", "embed_tokens"]))).train()


KINDS = {
    "one adapter": lambda m: adapters(m),
    "rsLoRA": lambda m: adapters(m, use_rslora=True),
    "dropout": lambda m: adapters(m, lora_dropout=0.3),
    "a bias": lambda m: adapters(m, lora_bias=True),
    "tied embeddings": everywhere,
    "a trained lm_head": lambda m: adapters(m).requires_grad_(True),
}


@setting("own loop", "LoRA on the lm_head")
@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_the_plain_peft_model(kind):
    model, plain = both(KINDS[kind](tiny_llama(tie_word_embeddings=kind == "tied embeddings").double()))
    assert_own(model, plain)
    found = differentiated(model, lambda m: m(**PLAIN).loss)
    own = differentiated(plain, lambda m: m(**PLAIN).loss)["value"].item()  # in float32
    assert found["value"].item() == pytest.approx(own, rel=1e-6)
    assert all(any(f"lm_head.lora_{x}" in name and g.any() for name, g in found.items()) for x in "AB")
    attributes = [(name, set(m.__dict__)) for name, m in plain.named_modules()]
    detach(model)
    assert [(name, set(m.__dict__)) for name, m in model.named_modules()] == attributes
    assert not any(m._forward_hooks for m in model.modules())
    assert_same(differentiated(model, entropy), differentiated(plain, entropy))


def test_two_active_adapters_each_with_dropout_of_its_own():
    model = adapters(tiny_llama().double(), "first", "second", lora_dropout=0.3)
    model.base_model.set_adapter(["first", "second"])
    model.base_model.model.lm_head.lora_dropout["second"] = nn.Identity()
    model, plain = both(model)
    assert_own(model, plain)


def compared(model, plain):
    """The model's losses by name, and a function that changes both models, compares them, and keeps the loss."""
    losses = {}

    def check(name: str, change=lambda m: None):
        for m in (model, plain):
            change(m)
        assert_own(model, plain)
        losses[name] = model(**PLAIN).loss.item()

    return losses, check


def third(model) -> None:
    torch.manual_seed(0)
    model.add_adapter("third", lora(TARGETS))
    model.set_adapter("third")
    filled(model)


def test_adapters_are_those_of_the_moment():
    """Switched, disabled, scaled, merged, added and deleted after attach."""
    model, plain = both(adapters(tiny_llama().double(), "first", "second"))
    losses, check = compared(model, plain)
    check("first")
    check("second", lambda m: m.set_adapter("second"))
    check("both", lambda m: m.base_model.set_adapter(["first", "second"]))
    check("first again", lambda m: m.set_adapter("first"))
    with model.disable_adapter(), plain.disable_adapter(), torch.no_grad():
        losses["none"] = model(**PLAIN).loss.item()
        assert losses["none"] == pytest.approx(entropy(plain).item(), rel=1e-10)
    check("scaled", lambda m: m.base_model.model.lm_head.scale_layer(2.0))
    check("added", third)
    check("deleted", lambda m: m.delete_adapter("third"))
    assert losses["first"] == losses["first again"] and len({round(x, 6) for x in losses.values()}) >= 6
    for m in (model, plain):
        m.set_adapter("first")
        m.merge_adapter()
    with torch.no_grad():
        assert model(**PLAIN).loss.item() == pytest.approx(entropy(plain).item(), rel=1e-10)
    for m in (model, plain):  # in whose forward PEFT takes them out again
        m.base_model.disable_adapter_layers()
        m.requires_grad_(True)
    assert_own(model, plain)
    assert losses["none"] == pytest.approx(model(**PLAIN).loss.item(), rel=1e-9)


def test_an_unloaded_model_stays_attached():
    model, plain = both(adapters(tiny_llama().double()))
    model, plain = (m.merge_and_unload().requires_grad_(True) for m in (model, plain))
    assert_own(model, plain)


def test_weights_in_16_bit_beside_adapters_in_float32():
    """As PEFT makes them: the loss is no further from float64 than the model's own."""
    model = adapters(tiny_llama().bfloat16())
    assert model.base_model.model.lm_head.lora_A["default"].weight.dtype == torch.float32
    model, plain = both(model)
    exact = differentiated(copy.deepcopy(plain).double(), entropy)
    own, found = differentiated(plain, lambda m: m(**PLAIN).loss), differentiated(model, lambda m: m(**PLAIN).loss)
    for name, value in exact.items():
        error, of_own = ((x[name].double() - value).norm() for x in (found, own))
        assert found[name].dtype == own[name].dtype or name == "value"
        assert error <= 1.5 * of_own, name


@pytest.mark.parametrize("loss", ["flow", "mtp"])
def test_the_objectives_decode_with_the_adapter(loss):
    """The hidden states that a head of "mtp" predicts go through it, too."""
    model = adapters(tiny_llama().double())
    config = replace(CONFIG, loss=loss)
    attach(model, config, target_size=None if loss == "mtp" else TARGET)
    sfr = attachment_of(model).double()
    nn.init.normal_(sfr.head.output_proj.weight, std=0.2)
    rows = SupervisedRows.from_labels(PLAIN["labels"], config)
    targets = rows.labels if loss == "mtp" else F.normalize(torch.randn(rows.num_anchors, TARGET), dim=1)
    layer, head = model.base_model.model.lm_head, dict(sfr.head.named_parameters())
    shape = {name: getattr(sfr.head.shape, name) for name in ("time_scale", "hidden_scale", "hidden_norm")}

    def wanted(m):
        hidden = m.base_model.model.model(IDS, attention_mask=PLAIN["attention_mask"]).last_hidden_state
        given = LoRA(layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"])
        return reference.sfr_loss(
            hidden, layer.weight, head, rows, targets, seed=3, config=config, lora=[given], flow_weight=0.5, **shape
        )[0]

    def ours(m):
        return m(**PLAIN, rows=rows, targets=targets, seed=3).loss

    sfr.flow_weight = 0.5
    found, exact = [], []
    for results, function in ((found, ours), (exact, wanted)):
        results.append(differentiated(model, function) | {name: p.grad for name, p in head.items()})
    assert_same(found[0], exact[0], rtol=1e-8)


def test_no_logits_of_all_tokens_are_made():
    labels = torch.randint(3, 701, (1, 3001))
    model = attach(adapters(tiny_llama(vocab_size=701, max_position_embeddings=4096)), objective="ce")
    with Operations() as seen:
        model(input_ids=labels, labels=labels).loss.backward()
    rows_of_logits = [torch.Size(s).numel() // 701 for s in seen.shapes if len(s) > 1 and s[-1] == 701]
    assert 0 < max(rows_of_logits) <= 1024  # a chunk, of 3000 rows


def test_every_weight_is_used_inside_the_call_of_its_module():
    """An engine that shards or offloads weights has them there alone."""
    model, plain = both(adapters(tiny_llama().double()))
    layer = model.base_model.model.lm_head
    for module in (layer.base_layer, layer.lora_A["default"], layer.lora_B["default"]):
        whole, away = module.weight, nn.Parameter(torch.empty(0, 0, dtype=torch.float64), requires_grad=False)
        module.register_forward_pre_hook(lambda m, args, w=whole: setattr(m, "weight", w))
        module.register_forward_hook(lambda m, args, out, w=away: setattr(m, "weight", w))
        module.weight = away
    torch.testing.assert_close(model(**PLAIN).loss, entropy(plain), rtol=1e-9, atol=0)
    assert torch.equal(model(input_ids=IDS).logits, plain(input_ids=IDS).logits)


def sharded(rank: int) -> None:
    torch.distributed.init_process_group("gloo")
    model, plain = both(adapters(tiny_llama().double()))
    mesh, layer = init_device_mesh("cpu", (2,)), model.base_model.model.lm_head
    parts = (
        layer.base_layer,
        layer.lora_A["default"],
        layer.lora_B["default"],
        layer,
        *model.base_model.model.model.layers,
    )
    for module in (*parts, model):
        fully_shard(module, mesh=mesh)
    for _ in range(2):
        found = differentiated(model, lambda m: m(**PLAIN).loss)
        whole = {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in found.items()}
        assert_same(whole, differentiated(plain, entropy), rtol=1e-9)
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")
def test_every_module_of_the_lm_head_may_be_sharded_by_itself():
    in_two_processes(sharded)


@pytest.mark.parametrize("hooked_first", [True, False])
def test_offloaded_modules_of_the_lm_head_are_read_where_accelerate_brings_them(hooked_first):
    model = adapters(tiny_llama().double())
    plain = copy.deepcopy(model)
    if not hooked_first:
        attach(model, objective="ce")
    layer = model.base_model.model.lm_head
    for module in (layer.base_layer, layer.lora_A["default"], layer.lora_B["default"]):
        weights = {k: v.clone() for k, v in module.state_dict().items()}
        add_hook_to_module(module, AlignDevicesHook(execution_device="cpu", offload=True, weights_map=weights))
    if hooked_first:
        with torch.no_grad():
            assert torch.equal(model(input_ids=IDS).logits, plain(input_ids=IDS).logits)
        attach(model, objective="ce")
    with torch.no_grad():
        torch.testing.assert_close(model(**PLAIN).loss, entropy(plain), rtol=1e-9, atol=0)
        detach(model)
        torch.testing.assert_close(model(input_ids=IDS).logits, plain(input_ids=IDS).logits)


def test_compiles_whole():
    torch._dynamo.reset()
    model, plain = both(adapters(tiny_llama().double()))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = differentiated(model, lambda m: compiled(**PLAIN).loss)
    assert_same(found, differentiated(plain, entropy), rtol=1e-9)


def test_the_norms_of_a_compiled_model_are_left_out():
    torch._dynamo.reset()
    model = attach(adapters(tiny_llama()), CONFIG, STORE)
    sfr = attachment_of(model)
    nn.init.normal_(sfr.head.output_proj.weight)
    sfr.measuring, health = True, []
    for run in (model, torch.compile(model, fullgraph=True, backend="eager")):
        run(**BATCH).loss.backward()
        health.append(sfr.health)
    assert health[0].all() and not health[1][:2].any()
    torch.testing.assert_close(health[1][2:], health[0][2:])


@setting("Trainer", "LoRA on the lm_head")
def test_a_trainer_that_accumulates_ends_with_the_weights_of_plain_peft(tmp_path):
    runs = []
    for fused in (False, True):
        model = adapters(tiny_llama().double())
        if fused:
            attach(model, objective="ce")
        options = dict(gradient_accumulation_steps=2, per_device_train_batch_size=4, max_steps=3)
        trainer = trainer_of(model, tmp_path, pad, samples=SAMPLES, **options)
        trainer.train()
        runs.append({name: p.detach() for name, p in model.named_parameters()})
    before = dict(adapters(tiny_llama().double()).named_parameters())
    moved = [name for name in before if "lm_head.lora" in name and not torch.equal(runs[0][name], before[name])]
    assert len(moved) == 2
    torch.testing.assert_close(runs[1], runs[0], rtol=1e-5, atol=1e-7)  # the plain one's logits are float32


def dora(model):
    return get_peft_model(model, lora(TARGETS, use_dora=True))


def ia3(model):
    return get_peft_model(model, IA3Config(target_modules=TARGETS, feedforward_modules=[], task_type="CAUSAL_LM"))


def replaced(name: str):
    def change(model):
        model = adapters(model)
        model.get_submodule(f"base_model.model.lm_head{name}").forward = lambda hidden: hidden
        return model

    return change


REFUSED = {
    "DoRA": (dora, TypeError, "'default' on the lm_head is no plain LoRA .DoraLinearVariant"),
    "IA3": (ia3, TypeError, r"no plain LoRA, peft\.tuners\.ia3\.layer\.Linear"),
    "a replaced forward": (replaced(""), TypeError, "forward of model's lm_head was replaced"),
    "a replaced forward of lora_A": (replaced(".lora_A.default"), TypeError, "forward of model's lm_head was replaced"),
}


@setting("own loop", "DoRA on the lm_head", outcome="refused")
@setting("own loop", "adapters other than LoRA on the lm_head", outcome="refused")
@pytest.mark.parametrize("name", REFUSED)
def test_other_adapters_are_refused_and_the_model_left_as_it_was(name):
    build, error, reason = REFUSED[name]
    model = build(tiny_llama())
    before = [set(m.__dict__) for m in model.modules()]
    with pytest.raises(error, match=reason):
        attach(model, objective="ce")
    assert [set(m.__dict__) for m in model.modules()] == before and attachment_of(model) is None


def test_what_comes_after_attach_and_does_not_fit_is_refused():
    model = attach(adapters(tiny_llama()), objective="ce")
    model.add_adapter("dora", lora(TARGETS, use_dora=True))
    model(**PLAIN)  # not active
    model.set_adapter("dora")
    with pytest.raises(TypeError, match="'dora' on the lm_head is no plain LoRA"):
        model(**PLAIN)
    assert model(input_ids=IDS).logits.shape[-1] == VOCAB
    model.set_adapter("default")
    with pytest.raises(ValueError, match="adapter_names"):
        model.eval()(**PLAIN, adapter_names=["default"] * len(IDS))
    late = attach(get_peft_model(tiny_llama(), lora(["q_proj"])), objective="ce")
    late.add_adapter("second", lora(TARGETS))
    with pytest.raises(RuntimeError, match="given an adapter after attach"):
        late(**PLAIN)
    detach(late)
    attach(late, objective="ce")(**PLAIN)
    detach(late)
    assert not [m for m in late.modules() if "_sfr_covered" in m.__dict__ or m._forward_hooks]
