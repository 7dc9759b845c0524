"""A stock transformers Trainer on an attached model: accumulation, logging, schedules, checkpoints."""

import json
import math
from dataclasses import fields

import pytest
import torch
from corpora import HashEncoder, Words
from peft import LoraConfig, get_peft_model
from tiny import CONFIG, TARGET, pad, tiny_llama, tiny_samples, tiny_store
from transformers import (
    AutoModelForCausalLM,
    DataCollatorWithFlattening,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl_cases import ENCODER, ByHand, chunked_loss, lora, settings, tokenizer

from sfr_kernels import SFRConfig, attach
from sfr_kernels.targets import OnlineTargets, SFRCollator, build_targets
from sfr_kernels.training.callbacks import SFRCallback, schedule_at

SAMPLES = tiny_samples(24)
STORE = tiny_store(SAMPLES)
LORA = pytest.param(True, marks=pytest.mark.setting("Trainer", "LoRA before attach"))


def make_trainer(
    folder, *, lora=False, config=CONFIG, store=STORE, callback=None, callbacks=(), eval_dataset=None, **arguments
):
    model = tiny_llama()
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    attach(model, config, targets=store)
    defaults = dict(per_device_train_batch_size=8, max_steps=6, logging_steps=1, learning_rate=1e-2, save_strategy="no",
                    report_to=[], disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False)  # fmt: skip
    return Trainer(
        model=model, args=TrainingArguments(str(folder), **{**defaults, **arguments}), train_dataset=SAMPLES,
        eval_dataset=eval_dataset, data_collator=SFRCollator(config, store, pad),
        callbacks=[callback or SFRCallback(), *callbacks],
    )  # fmt: skip


def losses(trainer):
    return [(h["step"], h["ce_loss"], h["flow_loss"]) for h in trainer.state.log_history if "ce_loss" in h]


@pytest.mark.setting("Trainer", "gradient accumulation")
@pytest.mark.parametrize(
    "packed",
    [
        pytest.param(False, marks=pytest.mark.setting("Trainer", "padding on the right")),
        pytest.param(True, marks=pytest.mark.setting("Trainer", "packing")),
    ],
    ids=["padding", "packing"],
)
@pytest.mark.parametrize("adapters", [False, LORA], ids=["full", "lora"])
def test_training_ends_where_one_process_with_the_whole_batch_does(tmp_path, adapters, packed):
    """Whatever is accumulated, and with no matrix of logits."""
    samples = [{**s, "input_ids": [6 + i % 17 for i in s["input_ids"]]} for s in tiny_samples(12)]
    for s in samples:
        s["labels"] = [y if y == -100 else i for y, i in zip(s["labels"], s["input_ids"], strict=True)]
    store = build_targets(samples, CONFIG, tokenizer(), ENCODER, folder=tmp_path / "targets", progress=False)
    collator = SFRCollator(CONFIG, store, DataCollatorWithFlattening() if packed else pad)
    by_hand = ByHand()
    for accumulated in (1, 4):
        model = tiny_llama(initializer_range=0.2)
        if adapters:
            torch.manual_seed(1)
            model = get_peft_model(model, lora())
        attach(model, chunked_loss(), store)
        parts = dict(gradient_accumulation_steps=accumulated, per_device_train_batch_size=4 // accumulated)
        names = {f.name for f in fields(TrainingArguments)}
        given = {k: v for k, v in settings(tmp_path, **parts).to_dict().items() if k in names}
        trainer = Trainer(model, TrainingArguments(**given), data_collator=collator, train_dataset=samples)
        SFRCallback().add_to(trainer)
        by_hand.check(trainer, samples)


@pytest.mark.setting("Trainer", "cross-entropy alone")
@pytest.mark.parametrize("lora", [False, LORA], ids=["full", "lora"])
def test_cross_entropy_alone_trains_as_the_plain_model_does(tmp_path, lora):
    """Under accumulation, where the normalizer is the whole step's; the checkpoint is a plain model."""
    runs = []
    for fused in (False, True):
        model = tiny_llama()
        if lora:
            model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
        if fused:
            attach(model, objective="ce")
        arguments = TrainingArguments(
            str(tmp_path / str(fused)), per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=4,
            logging_steps=1, save_steps=4, report_to=[], disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False,
        )  # fmt: skip
        samples = [{k: v for k, v in s.items() if k != "sample_id"} for s in SAMPLES]
        trainer = Trainer(model=model, args=arguments, train_dataset=samples, data_collator=pad)
        trainer.optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        trainer.train()
        history = [h["loss"] for h in trainer.state.log_history if "loss" in h]
        runs.append((history, [p.detach() for p in model.parameters()], tmp_path / str(fused) / "checkpoint-4"))
    (plain, weights, _), (fused, ours, folder) = runs
    assert fused == pytest.approx(plain, rel=1e-5) and len(plain) == 4 and plain[0] > plain[-1]
    for a, b in zip(ours, weights, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert not list(folder.glob("sfr_*")) and list(folder.glob("*.safetensors"))


def test_the_same_seed_gives_the_same_bits_and_another_one_does_not(tmp_path):
    reseeded = SFRConfig(**{**CONFIG.to_dict(), "seed": 1})
    first, again, other = (make_trainer(tmp_path / f"{i}", config=c) for i, c in enumerate((CONFIG, CONFIG, reseeded)))
    for trainer in (first, again, other):
        trainer.train()
    assert losses(first) == losses(again)
    assert losses(first) != losses(other)


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 3


@pytest.mark.setting("Trainer", "resuming")
@pytest.mark.parametrize("lora", [False, LORA], ids=["full", "lora"])
def test_resuming_gives_the_losses_of_an_uninterrupted_run(tmp_path, lora):
    whole = make_trainer(tmp_path / "whole", lora=lora)
    whole.train()
    stopped = make_trainer(tmp_path / "cut", lora=lora, save_strategy="steps", save_steps=3, callbacks=[Stop()])
    stopped.train()
    resumed = make_trainer(tmp_path / "cut", lora=lora)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-3"))
    assert losses(resumed)[-3:] == losses(whole)[-3:]
    for (name, a), b in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.setting("Trainer", "resuming without the head", outcome="refused")
def test_a_checkpoint_without_its_head_is_refused(tmp_path):
    make_trainer(tmp_path, save_strategy="steps", save_steps=3, callbacks=[Stop()]).train()
    (tmp_path / "checkpoint-3" / "sfr_head.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no velocity head at .*checkpoint-3"):
        make_trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_a_folder_that_is_resumed_from_is_named_once(tmp_path):
    """Where the callback is not told, the head of this folder's own checkpoint is not taken for the resumed one's."""
    whole = make_trainer(tmp_path / "whole")
    whole.train()
    for name, seed in (("there", 42), ("here", 7)):
        make_trainer(tmp_path / name, save_strategy="steps", save_steps=3, seed=seed, callbacks=[Stop()]).train()
    there = tmp_path / "there" / "checkpoint-3"
    with pytest.raises(ValueError, match="belongs to another model"):
        make_trainer(tmp_path / "here").train(resume_from_checkpoint=str(there))
    resumed = make_trainer(tmp_path / "here", callback=SFRCallback(resume_from=there))
    told = make_trainer(tmp_path / "here")
    told.pop_callback(SFRCallback)
    SFRCallback().add_to(told)
    for trainer in (resumed, told):
        trainer.train(resume_from_checkpoint=str(there))
        assert losses(trainer)[-3:] == losses(whole)[-3:]


def test_checkpoints_hold_the_plain_model(tmp_path):
    make_trainer(tmp_path, save_strategy="steps", save_steps=6).train()
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-6", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


class Collect(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


@pytest.mark.setting("Trainer", "ce_loss and flow_loss in the logs")
def test_logged_losses_are_averages_of_the_window_and_reach_reporters(tmp_path):
    """A reporter that Trainer asks before the callbacks of its list, as it asks its own."""
    every, window, reporter = make_trainer(tmp_path / "a"), make_trainer(tmp_path / "b", logging_steps=3), Collect()
    window.callback_handler.callbacks.insert(0, reporter)
    window.pop_callback(SFRCallback)
    SFRCallback().add_to(window)
    every.train()
    window.train()
    single = losses(every)
    for end, ce, flow in losses(window):
        steps = [s for s in single if end - 3 < s[0] <= end]
        assert ce == pytest.approx(sum(s[1] for s in steps) / 3, rel=1e-5)
        assert flow == pytest.approx(sum(s[2] for s in steps) / 3, rel=1e-5)
    logged = [h for h in reporter.seen if "loss" in h]
    assert all(h["loss"] == pytest.approx(h["ce_loss"] + h["flow_loss"], rel=1e-4) for h in logged) and logged
    json.dumps(window.state.log_history)  # plain numbers


@pytest.mark.setting("Trainer", "a schedule of λ")
def test_the_flow_weight_follows_its_schedule(tmp_path):
    config = SFRConfig(**{**CONFIG.to_dict(), "flow_weight": 2.0, "flow_schedule": "cosine", "flow_warmup": 0.5})
    trainer = make_trainer(tmp_path, config=config)
    trainer.train()
    logged = [h["flow_weight"] for h in trainer.state.log_history if "flow_weight" in h]
    assert logged == pytest.approx([0.5, 1.0, 1.5, 2.0, 1.5, 0.5])
    assert all(h["loss"] == pytest.approx(h["ce_loss"] + h["flow_weight"] * h["flow_loss"], rel=1e-4)
               for h in trainer.state.log_history if "ce_loss" in h)  # fmt: skip


def test_schedules_start_and_end_where_they_should():
    almost = 0.5 * (1 + math.cos(0.99 * math.pi))
    for name, half, last in (("constant", 1.0, 1.0), ("linear", 0.5, 0.01), ("cosine", 0.5, almost)):
        config = SFRConfig(flow_schedule=name)
        assert [schedule_at(config, s, 100) for s in (0, 50, 99)] == pytest.approx([1.0, half, last])


@pytest.mark.setting("Trainer", "evaluation")
def test_evaluation_has_the_weight_of_the_configuration_whatever_the_schedule(tmp_path):
    """So the best checkpoint is the best model's, and not that of the smallest λ."""
    config = SFRConfig(**{**CONFIG.to_dict(), "flow_weight": 2.0, "flow_schedule": "cosine"})
    trainer = make_trainer(
        tmp_path, config=config, learning_rate=0.0, eval_strategy="steps", eval_steps=2, per_device_eval_batch_size=5,
        eval_dataset=SAMPLES[:8],
    )  # fmt: skip
    trainer.train()
    with torch.no_grad():
        parts = [trainer.model.eval()(**SFRCollator(CONFIG, STORE, pad)(SAMPLES[i:j])) for i, j in ((0, 5), (5, 8))]
    ce, flow = ((5 * a + 3 * b).item() / 8 for a, b in zip(*[(p.ce_loss, p.flow_loss) for p in parts], strict=True))
    logged = [h for h in trainer.state.log_history if "eval_loss" in h]
    assert len(logged) == 3
    for history in (*logged, trainer.evaluate()):
        assert history["eval_ce_loss"] == pytest.approx(ce, rel=1e-5)
        assert history["eval_flow_loss"] == pytest.approx(flow, rel=1e-5)
        assert history["eval_loss"] == pytest.approx(ce + 2 * flow, rel=1e-5)
    predicted = trainer.predict(SAMPLES[:3], metric_key_prefix="held").metrics
    assert predicted["held_loss"] == pytest.approx(
        predicted["held_ce_loss"] + 2 * predicted["held_flow_loss"], rel=1e-5
    )


def test_the_callback_asks_for_an_attached_model(tmp_path):
    arguments = TrainingArguments(str(tmp_path), max_steps=1, report_to=[], use_cpu=True, remove_unused_columns=False)
    trainer = Trainer(tiny_llama(), arguments, data_collator=pad, train_dataset=SAMPLES, callbacks=[SFRCallback()])
    with pytest.raises(ValueError, match="attach"):
        trainer.train()


@pytest.mark.setting("Trainer", "OnlineTargets")
def test_a_trainer_with_targets_made_online(tmp_path):
    """Texts pass through the loader and accelerate; the second epoch embeds nothing."""
    online = OnlineTargets(HashEncoder(TARGET), Words())
    trainer = make_trainer(tmp_path, store=online, max_steps=3)
    trainer.train()
    encoded = online.encoded
    assert encoded > 0 and len(losses(trainer)) == 3
    again = make_trainer(tmp_path / "again", store=online, max_steps=3)
    again.train()
    assert online.encoded == encoded and losses(again) == losses(trainer)
