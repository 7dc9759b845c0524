"""Adapters, quantised weights and recomputed layers under an attached loss: it is the model's own, plus λ times the
reference's flow loss of the model's hidden states, and so are all gradients."""

import copy
from functools import partial

import pytest
import tiny
import torch
import torch.nn.functional as F
from outcomes import assert_same, gradients, weights
from peft import IA3Config, PrefixTuningConfig, PromptTuningConfig, get_peft_model, prepare_model_for_kbit_training
from safetensors import safe_open
from tiny import BATCH, CONFIG, PLAIN, SAMPLES, STORE, adapted, lora, pad
from torch import nn
from transformers.utils.quantization_config import QuantizationMethod

from sfr_kernels import attach, flow_matching_loss
from sfr_kernels.ops.flow_loss import step_seed
from sfr_kernels.targets import SFRCollator
from sfr_kernels.training.objectives import attachment_of

setting = pytest.mark.setting
tiny_llama = partial(tiny.tiny_llama, initializer_range=0.1)  # whose loss adapters change
VIRTUAL = 4
WITHOUT_ROWS = "prompt tuning, of batches with sample_id in place of rows"
IN_LM_HEAD = lora(["q_proj"], modules_to_save=["lm_head"])


def stirred(model):
    """With adapters that change the model: most begin without effect."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.2 * torch.randn(p.shape, generator=generator).to(p)
    return model


def with_head(model):
    """Attached, with a head whose last layer is not zero, and a twin of that head."""
    attach(model, CONFIG, STORE)
    head = attachment_of(model).head
    nn.init.normal_(head.output_proj.weight, std=0.1, generator=torch.Generator().manual_seed(2))
    return model, copy.deepcopy(head)


def own_loss(plain, head, rows=BATCH["rows"], step: int = 0):
    """Of the model that is not attached; λ is 1."""
    out = plain(**PLAIN, output_hidden_states=True)
    flow = flow_matching_loss(
        out.hidden_states[-1], head, rows, rows.targets, seed=step_seed(CONFIG.seed, step), config=CONFIG,
        backend="reference",
    )  # fmt: skip
    return out.loss + flow


def plain_gradients(model):
    """Without those of the velocity head."""
    return {name: grad for name, grad in gradients(model).items() if "sfr." not in name}


def assert_near(found: dict, wanted: dict, rtol=1e-4) -> None:
    largest = max(x.abs().max().item() for x in wanted.values())
    assert_same(found, wanted, rtol, atol=rtol * largest / 100)


def assert_same_gradients(model, loss, plain, wanted) -> None:
    """Of the losses `loss` and `wanted` of the two models."""
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=0)
    loss.backward()
    wanted.backward()
    assert_near(plain_gradients(model), gradients(plain))


def peft_model(config, **options):
    return lambda: stirred(get_peft_model(tiny_llama(**options), config))


MLP = dict(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
VIRTUAL_TOKENS = dict(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL)
ADAPTERS = {
    "DoRA": lora(use_dora=True),
    "IA3": IA3Config(task_type="CAUSAL_LM", **MLP),
    "LoRA with modules_to_save, of an lm_head, a norm or embeddings": lora(
        ["q_proj"], modules_to_save=["lm_head", "norm", "embed_tokens"]
    ),
    'LoRA with modules_to_save=["lm_head"]': IN_LM_HEAD,
    "LoRA with trainable_token_indices": lora(["q_proj"], trainable_token_indices=[3, 4, 5]),
    "prefix tuning": PrefixTuningConfig(**VIRTUAL_TOKENS),
    WITHOUT_ROWS: PromptTuningConfig(**VIRTUAL_TOKENS),
}
MODELS = {name: (name, peft_model(config)) for name, config in ADAPTERS.items()} | {
    # whose lm_head is PEFT's copy, and no longer the embeddings
    'LoRA with modules_to_save=["lm_head"], tied': (
        'LoRA with modules_to_save=["lm_head"]',
        peft_model(IN_LM_HEAD, tie_word_embeddings=True),
    ),
    "LoRA with modules_to_save and ensure_weight_tying, of tied embeddings": (
        "LoRA with modules_to_save and ensure_weight_tying, of tied embeddings",
        peft_model(
            lora(["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True), tie_word_embeddings=True
        ),
    ),
    "LoRA on tied embeddings": (
        "LoRA before attach",
        peft_model(lora(["q_proj", "embed_tokens"]), tie_word_embeddings=True),
    ),
}


def virtual_labels(features):
    """What prompt tuning makes of a batch."""
    fill = dict(labels=-100, attention_mask=1, input_ids=0)
    return {name: F.pad(x, (VIRTUAL, 0), value=fill[name]) for name, x in pad(features).items()}


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=setting("own loop", shown)) for name, (shown, _) in MODELS.items()]
)
def test_training_is_that_of_the_plain_model_with_its_adapters(name):
    """Two steps: loss, gradients and weights; adapters and head move, and nothing else does."""
    _, make = MODELS[name]
    plain, (model, head) = make(), with_head(make())
    batch, rows = BATCH, BATCH["rows"]
    if name == WITHOUT_ROWS:
        batch = {**PLAIN, "sample_id": torch.arange(len(SAMPLES))}
        rows = SFRCollator(CONFIG, STORE, virtual_labels)(SAMPLES)["rows"]
    before = weights(model)
    optimizers = [
        torch.optim.SGD([p for m in group for p in m.parameters()], lr=0.3) for group in ([plain, head], [model])
    ]
    for step in range(2):
        assert_same_gradients(model, model(**batch).loss, plain, own_loss(plain, head, rows, step))
        assert_near(gradients(attachment_of(model).head), gradients(head))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n, p in model.named_parameters() if p.requires_grad} and len(moved) < len(before)


@setting("own loop", "LoRA with trainable_token_indices of tied embeddings", outcome="refused")
def test_an_lm_head_with_trained_tokens_of_its_own_is_refused():
    model = adapted(tiny_llama(tie_word_embeddings=True), ["q_proj"], trainable_token_indices=[3, 4])
    with pytest.raises(TypeError, match=r"trainable_token_indices of tied.*modules_to_save, or untie"):
        with_head(model)


@setting("own loop", "prompt tuning", outcome="refused")
def test_virtual_tokens_before_a_batch_with_rows_are_refused():
    """The rows of a batch are counted without them."""
    _, make = MODELS[WITHOUT_ROWS]
    model, _ = with_head(make())
    with pytest.raises(ValueError, match=r"num_virtual_tokens=4\), give labels and sample_id without rows"):
        model(**BATCH)
    with pytest.raises(ValueError, match=r"before each sequence, give labels"):  # fewer than rows: none of PEFT's
        with_head(tiny_llama())[0](**{**BATCH, "labels": BATCH["labels"][:, 1:]})


def two_adapters(first, second, active: str = "default"):
    model = get_peft_model(tiny_llama(), first)
    model.add_adapter("other", second)
    model.set_adapter("other")
    stirred(model)  # one and then the other, since only the active one is trainable
    model.set_adapter("default")
    stirred(model).set_adapter(active)
    return model


SWITCHED = {
    "of two LoRAs": (lora(["q_proj"]), lora(["v_proj", "up_proj"])),
    "to another copy of the lm_head": (IN_LM_HEAD, lora(["v_proj"], modules_to_save=["lm_head"])),
    "to an adapter without a copy of the lm_head": (IN_LM_HEAD, lora(["v_proj"])),
}


@setting("own loop", "disable_adapter around a loss and generate")
@pytest.mark.parametrize("at_attach", ["default", "other"])
@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=setting("own loop", f"set_adapter after attach, {way}")) for way in SWITCHED]
)
def test_the_loss_follows_the_active_adapter_or_none(way, at_attach):
    plain, other = (two_adapters(*SWITCHED[way], at_attach) for _ in range(2))
    model, head = with_head(other)
    losses, names = [], []
    for active in ("default", "other", "default"):
        for one in (plain, model):
            one.zero_grad()
            one.set_adapter(active)
        assert_same_gradients(model, model(**BATCH).loss, plain, own_loss(plain, head))
        names.append(set(plain_gradients(model)))
        with torch.no_grad(), model.disable_adapter():
            losses += [model(**BATCH).loss, own_loss(tiny_llama(), head)]
    assert names[0] == names[2] and not names[0] & names[1]
    assert_same(losses, [losses[1]] * 6, rtol=1e-5)
    assert abs(model(**BATCH).loss - losses[1]) > 1e-3  # the adapters are back
    answers = dict(min_new_tokens=8, max_new_tokens=8, do_sample=False)
    prompt = {name: PLAIN[name][:1, :4] for name in ("input_ids", "attention_mask")}
    with model.disable_adapter():
        base = tiny_llama().generate(**prompt, **answers)
        assert torch.equal(model.generate(**prompt, **answers), base)
    assert torch.equal(found := model.generate(**prompt, **answers), plain.generate(**prompt, **answers))
    assert not torch.equal(found, base)


def test_adapters_are_saved_without_the_head(tmp_path):
    every_bias = lora(["q_proj"], modules_to_save=["lm_head"], bias="all")  # PEFT looks for it by name
    attach(get_peft_model(tiny_llama(), every_bias), CONFIG, STORE).save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert not [name for name in file.keys() if "sfr" in name]  # noqa: SIM118
    assert (tmp_path / "sfr_head.safetensors").is_file()


DETACHED = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")


@setting("own loop", "gradient checkpointing")
@DETACHED  # where no gradient is asked for
@pytest.mark.parametrize("when", ["before attach", "after attach"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_recomputed_layers_below_adapters_have_the_gradients_of_kept_ones(reentrant, when):
    """The embeddings are frozen, so nothing before the first layer needs a gradient."""

    def make():
        return stirred(adapted(tiny_llama(), ["q_proj", "v_proj"])).train()

    plain, model, recompute = make(), make(), dict(use_reentrant=reentrant)
    if when == "before attach":
        model.gradient_checkpointing_enable(recompute)
    model, head = with_head(model)
    if when == "after attach":
        model.gradient_checkpointing_enable(recompute)
    with torch.no_grad():
        model(**BATCH)  # compares the model's own loss
    calls = []
    model.get_base_model().model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    assert_same_gradients(model, model(**BATCH).loss, plain, own_loss(plain, head))
    assert len(calls) == 2


@setting("own loop", "reentrant gradient checkpointing without gradients of embeddings", outcome="refused")
@DETACHED
def test_reentrant_checkpointing_that_detaches_the_model_stops_the_first_step():
    model, _ = with_head(adapted(tiny_llama(), ["q_proj"]).train())
    model.gradient_checkpointing_enable(dict(use_reentrant=True))
    model.disable_input_require_grads()  # which transformers has enabled, since there are adapters
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(**BATCH).loss.backward()
    with pytest.raises(RuntimeError, match=r"no gradient has reached the model.*enable_input_require_grads"):
        optimizer.step()


class Int8Linear(nn.Linear):
    """A frozen layer as bitsandbytes makes one: an nn.Linear of int8 that dequantises in its forward."""

    def __init__(self, linear: nn.Linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, None
        weight = linear.weight.detach()
        self.register_buffer("scale", weight.abs().amax(1, keepdim=True) / 127)
        self.weight = nn.Parameter((weight / self.scale).round().to(torch.int8), requires_grad=False)

    def dequantised(self, dtype: torch.dtype):
        return self.weight.to(dtype) * self.scale.to(dtype)

    def forward(self, hidden):
        return F.linear(hidden, self.dequantised(hidden.dtype))


def quantised(model):
    """All but the lm_head, and what transformers and PEFT look at."""
    for name, module in list(model.model.named_modules()):
        if isinstance(module, nn.Linear):
            model.model.set_submodule(name, Int8Linear(module))
    model.is_quantized = model.is_loaded_in_8bit = True
    model.quantization_method = QuantizationMethod.BITS_AND_BYTES
    return model


def dequantised(model):
    """A plain model, of float32, of the same weights."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Int8Linear):
            plain = nn.Linear(module.in_features, module.out_features, bias=False, dtype=torch.float32)
            plain.weight = nn.Parameter(module.dequantised(torch.float32), requires_grad=False)
            model.set_submodule(name, plain)
    return model


@setting("own loop", "QLoRA: LoRA on quantised layers, the lm_head not quantised")
@pytest.mark.parametrize("recomputed", [False, True])
def test_lora_on_quantised_layers_trains_as_on_the_same_weights_in_float32(recomputed):
    def make():
        base = prepare_model_for_kbit_training(quantised(tiny_llama()), recomputed, dict(use_reentrant=False))
        return stirred(adapted(base)).train()

    plain, (model, head) = dequantised(make()), with_head(make())
    assert sum(p.dtype == torch.int8 for p in model.parameters()) == 14
    assert_same_gradients(model, model(**BATCH).loss, plain, own_loss(plain, head))
    assert len(gradients(plain)) == 28
    assert_near(gradients(attachment_of(model).head), gradients(head))
