"""What a model can do beside its loss, it can do attached: outputs, generation, resizing, saving, adapters."""

import copy

import accelerate
import pytest
import torch
import transformers
from outcomes import assert_same, weights
from peft import IA3Config, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors import safe_open
from tiny import BATCH, CONFIG, PLAIN, SAMPLES, STORE, VOCAB, attached, lora, pad, tiny_llama

from sfr_kernels import SFRConfig, attach, detach
from sfr_kernels.targets import SFRCollator

setting = pytest.mark.setting
SAMPLE_IDS = torch.arange(len(SAMPLES))
WITHOUT_ROWS = "prompt tuning, of batches with sample_id in place of rows"
IN_LM_HEAD = lora(["q_proj"], modules_to_save=["lm_head"])
MLP = dict(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
ADAPTERS = {
    "DoRA": lora(use_dora=True),
    "IA3": IA3Config(task_type="CAUSAL_LM", **MLP),
    'LoRA with modules_to_save=["lm_head"]': IN_LM_HEAD,
    "prefix tuning": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    WITHOUT_ROWS: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}


def with_adapters(name: str):
    return attach(get_peft_model(tiny_llama(), ADAPTERS[name]), CONFIG, STORE)


@setting("own loop", "generate with the whole batch")
@setting("own loop", "hidden states and attentions")
@setting("own loop", "sample_id without SFRCollator")
@setting("own loop", "shift_labels")
def test_labels_by_position_and_further_outputs_are_as_with_the_plain_model():
    model = tiny_llama().eval()
    wanted = model(**PLAIN, output_hidden_states=True, output_attentions=True)
    attach(model, CONFIG, STORE)
    model.sfr.flow_weight = 0.0
    found = model(**BATCH, output_hidden_states=True, output_attentions=True)
    for name in ("hidden_states", "attentions"):
        assert_same(found[name], wanted[name])
    ids, mask, labels = BATCH["input_ids"], BATCH["attention_mask"], BATCH["labels"]
    positional = model(ids, mask, None, None, None, labels, rows=BATCH["rows"])
    assert torch.equal(positional.loss, found.loss) and "logits" not in positional
    assert torch.equal(model(**BATCH, return_dict=False)[0], found.loss)
    for shifted in (  # a batch without rows looks its targets up, and draws the same noise
        dict(labels=labels),
        dict(labels=labels, shift_labels=torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)),
        dict(labels=labels.masked_fill(labels == -100, 0), ignore_index=0),
    ):
        out = model(ids, mask, sample_id=SAMPLE_IDS, **shifted)
        assert torch.equal(out.loss, found.loss) and torch.equal(out.flow_loss, found.flow_loss)
    with pytest.raises(ValueError, match="shift_labels has no meaning where a batch has rows"):
        model(**BATCH, shift_labels=labels)
    with pytest.raises(ValueError, match="shift_labels has a label at the last position"):
        model(ids, mask, labels=labels, sample_id=SAMPLE_IDS, shift_labels=labels.clamp(min=0))
    generated = model.generate(**BATCH, max_new_tokens=3, do_sample=False)
    detach(model)
    assert torch.equal(generated, model.generate(**PLAIN, max_new_tokens=3, do_sample=False))


@setting("own loop", "resize_token_embeddings after attach", outcome="refused")
def test_detach_works_after_a_resize():
    model = attached(STORE)
    model.resize_token_embeddings(VOCAB + 5)
    with pytest.raises(RuntimeError, match="replaced after attach"):
        model(**BATCH)
    detach(model)
    assert model(**PLAIN).logits.shape[-1] == VOCAB + 5
    assert not [k for m in model.modules() for k in m.__dict__ if "sfr" in k]
    attach(model, CONFIG, STORE)(**BATCH).loss.backward()


@setting("accelerate", "Accelerator.save_model")
def test_accelerate_saves_the_plain_model_and_resumes_the_whole_one(tmp_path):
    accelerator, model = accelerate.Accelerator(cpu=True), attached(STORE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.backward(model(**BATCH).loss)
    optimizer.step()
    accelerator.save_model(model, tmp_path / "plain")
    accelerator.save_state(tmp_path / "state")
    loaded = transformers.AutoModelForCausalLM.from_config(model.config)
    accelerate.load_checkpoint_in_model(loaded, tmp_path / "plain")
    assert_same(weights(loaded), {name: p for name, p in weights(model).items() if not name.startswith("sfr.")})
    with safe_open(tmp_path / "plain" / "model.safetensors", "pt") as file:
        names = list(file.keys())
    assert not [name for name in names if "sfr" in name] and len(names) > 5
    head = model.sfr.head.output_proj.weight.clone()
    torch.nn.init.zeros_(model.sfr.head.output_proj.weight)
    model.sfr.step = 17
    accelerator.load_state(tmp_path / "state")
    assert torch.equal(model.sfr.head.output_proj.weight, head) and head.any() and model.sfr.step == 1


def test_another_adapters_lm_head_is_refused_and_adapters_are_saved_without_the_head(tmp_path):
    model = get_peft_model(tiny_llama(), IN_LM_HEAD)
    model.add_adapter("other", IN_LM_HEAD)
    attach(model, CONFIG, STORE)
    for _ in range(2):  # at the first loss, and after one
        model.set_adapter("other")
        with pytest.raises(RuntimeError, match="another adapter is active"):
            model(**BATCH)
        model.set_adapter("default")
        with model.disable_adapter(), pytest.raises(RuntimeError, match="adapters are disabled"):
            model(**BATCH)
        model(**BATCH)
    every_bias = lora(["q_proj"], modules_to_save=["lm_head"], bias="all")  # PEFT looks for it by name
    attach(get_peft_model(tiny_llama(), every_bias), CONFIG, STORE).save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert not [name for name in file.keys() if "sfr" in name]  # noqa: SIM118
    assert (tmp_path / "sfr_head.safetensors").is_file()


def test_rows_of_another_config_than_the_losss_are_refused():
    batch = SFRCollator(SFRConfig(**CONFIG.to_dict() | dict(weighting="uniform")), STORE, pad)(SAMPLES[:4])
    with pytest.raises(ValueError, match="another config than the loss's: weighting='uniform', not 'linear'"):
        attached(STORE)(**batch)
    attach(tiny_llama(), objective="ce")(**batch)


@pytest.mark.parametrize("name", [pytest.param(name, marks=setting("own loop", name)) for name in ADAPTERS])
def test_the_cross_entropy_is_that_of_the_plain_model_with_its_adapters(name):
    """Of the same weights, at every step; adapters and head move, and nothing else does."""
    model = with_adapters(name)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    before = weights(model)
    for _ in range(3):
        plain = copy.deepcopy(model)
        detach(plain)
        wanted = plain(**PLAIN).loss
        out = model(**PLAIN, sample_id=SAMPLE_IDS) if name == WITHOUT_ROWS else model(**BATCH)
        assert out.ce_loss.item() == pytest.approx(wanted.item(), rel=1e-5)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n, p in model.named_parameters() if p.requires_grad} and len(moved) < len(before)
    assert any(".sfr.head." in n for n in moved) and not all(".sfr.head." in n for n in moved)


@setting("own loop", "prompt tuning", outcome="refused")
def test_tokens_before_the_batch_are_refused():
    """The rows of a batch are counted without them."""
    with pytest.raises(ValueError, match="rows were made for"):
        with_adapters(WITHOUT_ROWS)(**BATCH)
