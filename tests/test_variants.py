"""Adapters, precision and recomputation: an attached model trains under each as the plain model does."""

import copy

import pytest
import torch
from peft import IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from test_trainer_settings import COLLATE, SAMPLES, STORE, trainer_of
from tiny import CONFIG, tiny_llama

from sfr_kernels import attach, detach

setting = pytest.mark.setting
BATCHES = [COLLATE(SAMPLES[i : i + 4]) for i in (0, 4, 8)]  # of a step each
WITHOUT_ROWS = "prompt tuning, of batches with sample_id in place of rows"
ADAPTERS = {
    "DoRA": LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", use_dora=True),
    "IA3": IA3Config(
        task_type="CAUSAL_LM", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    'LoRA with modules_to_save=["lm_head"]': LoraConfig(
        r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"
    ),
    "prefix tuning": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    WITHOUT_ROWS: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=setting("own loop", name)) for name in ADAPTERS])
def test_the_cross_entropy_is_that_of_the_plain_model_with_its_adapters(name):
    """Of the same weights, at every step; adapters and head move, and nothing else does."""
    model = attach(get_peft_model(tiny_llama(), ADAPTERS[name]), CONFIG, STORE)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for batch, ids in zip(BATCHES, torch.arange(12).split(4), strict=True):
        plain = copy.deepcopy(model)
        detach(plain)
        given = {k: batch[k] for k in ("input_ids", "attention_mask", "labels")}
        wanted = plain(**given).loss
        out = model(**given, sample_id=ids) if name == WITHOUT_ROWS else model(**batch)
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
    model = attach(get_peft_model(tiny_llama(), ADAPTERS[WITHOUT_ROWS]), CONFIG, STORE)
    with pytest.raises(ValueError, match="rows were made for"):
        model(**BATCHES[0])


def logged(trainer) -> list[float]:
    trainer.train()
    return [h["ce_loss"] for h in trainer.state.log_history if "ce_loss" in h]


@setting("Trainer", "bf16=True")
def test_bf16_trains_near_float32(tmp_path):
    """bfloat16 has 8 bits, so a mean of a hundred losses is right to about 2⁻⁸."""
    single, half = (
        logged(trainer_of(attach(tiny_llama(), CONFIG, STORE), tmp_path, bf16=flag)) for flag in (False, True)
    )
    assert half == pytest.approx(single, rel=2**-8) and half != pytest.approx(single, rel=1e-6) and len(half) == 3
    assert single[0] - single[2] > 2**-6 * single[0]


@setting("Trainer", "gradient checkpointing")
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_checkpointing_changes_no_weight(tmp_path, reentrant):
    options = dict(gradient_checkpointing=True, gradient_checkpointing_kwargs=dict(use_reentrant=reentrant))
    plain, saving = (trainer_of(attach(tiny_llama(), CONFIG, STORE), tmp_path, **given) for given in ({}, options))
    computed = []
    for trainer in (plain, saving):
        calls = []
        trainer.model.model.layers[1].self_attn.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        computed.append((logged(trainer), len(calls)))
    assert computed[0][0] == computed[1][0] and computed[1][1] == computed[0][1] + 3  # once more in each backward
    for (name, a), b in zip(plain.model.named_parameters(), saving.model.parameters(), strict=True):
        assert torch.equal(a, b), name
