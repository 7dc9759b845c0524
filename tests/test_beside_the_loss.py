"""What a model can do beside its loss, it can do attached: outputs, generation, resizing, saving."""

import accelerate
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from tiny import CONFIG, VOCAB, pad, tiny_llama, tiny_samples, tiny_store

from sfr_kernels import SFRConfig, attach, detach
from sfr_kernels.targets import SFRCollator

SAMPLES = tiny_samples(8)
STORE = tiny_store(SAMPLES)
BATCH = SFRCollator(CONFIG, STORE, pad)(SAMPLES[:4])


def attached():
    return attach(tiny_llama(), CONFIG, STORE)


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if not n.startswith("sfr.")}


@pytest.mark.setting("own loop", "generate with the whole batch")
@pytest.mark.setting("own loop", "hidden states and attentions")
@pytest.mark.setting("own loop", "shift_labels")
def test_labels_by_position_and_further_outputs_are_as_with_the_plain_model():
    model = tiny_llama().eval()
    plain = {k: v for k, v in BATCH.items() if k != "rows"}
    wanted = model(**plain, output_hidden_states=True, output_attentions=True)
    attach(model, CONFIG, STORE)
    model.sfr.flow_weight = 0.0
    found = model(**BATCH, output_hidden_states=True, output_attentions=True)
    for name in ("hidden_states", "attentions"):
        for a, b in zip(found[name], wanted[name], strict=True):
            assert torch.equal(a, b)
    ids, mask, labels = BATCH["input_ids"], BATCH["attention_mask"], BATCH["labels"]
    positional = model(ids, mask, None, None, None, labels, rows=BATCH["rows"])
    assert torch.equal(positional.loss, found.loss) and "logits" not in positional
    assert torch.equal(model(**BATCH, return_dict=False)[0], found.loss)
    for shifted in (
        dict(labels=labels, shift_labels=torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)),
        dict(labels=labels.masked_fill(labels == -100, 0), ignore_index=0),
    ):
        out = model(ids, mask, sample_id=torch.arange(4), **shifted)
        assert torch.equal(out.loss, found.loss) and torch.equal(out.flow_loss, found.flow_loss)
    with pytest.raises(ValueError, match="shift_labels has no meaning where a batch has rows"):
        model(**BATCH, shift_labels=labels)
    with pytest.raises(ValueError, match="shift_labels has a label at the last position"):
        model(ids, mask, labels=labels, sample_id=torch.arange(4), shift_labels=labels.clamp(min=0))
    generated = model.generate(**BATCH, max_new_tokens=3, do_sample=False)
    detach(model)
    assert torch.equal(generated, model.generate(**plain, max_new_tokens=3, do_sample=False))


@pytest.mark.setting("own loop", "resize_token_embeddings after attach", outcome="refused")
def test_detach_works_after_a_resize():
    model = attached()
    model.resize_token_embeddings(VOCAB + 5)
    with pytest.raises(RuntimeError, match="replaced after attach"):
        model(**BATCH)
    detach(model)
    assert model(**{k: v for k, v in BATCH.items() if k != "rows"}).logits.shape[-1] == VOCAB + 5
    assert not [k for m in model.modules() for k in m.__dict__ if "sfr" in k]
    attach(model, CONFIG, STORE)(**BATCH).loss.backward()


@pytest.mark.setting("accelerate", "Accelerator.save_model")
def test_accelerate_saves_the_plain_model_and_resumes_the_whole_one(tmp_path):
    accelerator, model = accelerate.Accelerator(cpu=True), attached()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.backward(model(**BATCH).loss)
    optimizer.step()
    accelerator.save_model(model, tmp_path / "plain")
    accelerator.save_state(tmp_path / "state")
    loaded = transformers.AutoModelForCausalLM.from_config(model.config)
    accelerate.load_checkpoint_in_model(loaded, tmp_path / "plain")
    for name, weight in weights(model).items():
        assert torch.equal(loaded.get_parameter(name), weight)
    with safe_open(tmp_path / "plain" / "model.safetensors", "pt") as file:
        names = list(file.keys())
    assert not [name for name in names if "sfr" in name] and len(names) > 5
    head = model.sfr.head.output_proj.weight.clone()
    torch.nn.init.zeros_(model.sfr.head.output_proj.weight)
    model.sfr.step = 17
    accelerator.load_state(tmp_path / "state")
    assert torch.equal(model.sfr.head.output_proj.weight, head) and head.any() and model.sfr.step == 1


def test_another_adapters_lm_head_is_refused_and_adapters_are_saved_without_the_head(tmp_path):
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    model = get_peft_model(tiny_llama(), config)
    model.add_adapter("other", config)
    attach(model, CONFIG, STORE)
    for _ in range(2):  # at the first loss, and after one
        model.set_adapter("other")
        with pytest.raises(RuntimeError, match="another adapter is active"):
            model(**BATCH)
        model.set_adapter("default")
        with model.disable_adapter(), pytest.raises(RuntimeError, match="adapters are disabled"):
            model(**BATCH)
        model(**BATCH)
    config.bias = "all"  # PEFT looks for every bias
    attach(get_peft_model(tiny_llama(), config), CONFIG, STORE).save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert not [name for name in file.keys() if "sfr" in name]  # noqa: SIM118
    assert (tmp_path / "sfr_head.safetensors").is_file()


def test_rows_of_another_config_than_the_losss_are_refused():
    batch = SFRCollator(SFRConfig(**CONFIG.to_dict() | dict(weighting="uniform")), STORE, pad)(SAMPLES[:4])
    with pytest.raises(ValueError, match="another config than the loss's: weighting='uniform', not 'linear'"):
        attached()(**batch)
    attach(tiny_llama(), objective="ce")(**batch)
