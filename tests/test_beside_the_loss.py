"""What a model can do beside its loss, it can do attached: outputs, generation, resizing, saving."""

import accelerate
import pytest
import torch
import transformers
from outcomes import assert_same, weights
from safetensors import safe_open
from tiny import BATCH, CONFIG, PLAIN, SAMPLES, STORE, VOCAB, attached, pad, tiny_llama

from sfr_kernels import SFRConfig, attach, detach
from sfr_kernels.targets import SFRCollator

setting = pytest.mark.setting
SAMPLE_IDS = torch.arange(len(SAMPLES))


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


def test_rows_of_another_config_than_the_losss_are_refused():
    batch = SFRCollator(SFRConfig(**CONFIG.to_dict() | dict(weighting="uniform")), STORE, pad)(SAMPLES[:4])
    with pytest.raises(ValueError, match="another config than the loss's: weighting='uniform', not 'linear'"):
        attached(STORE)(**batch)
    attach(tiny_llama(), objective="ce")(**batch)
