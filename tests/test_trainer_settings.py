"""Settings of a Trainer, among them precision and recomputation: they work, or stop with words that help."""

import copy
from dataclasses import replace
from types import MethodType

import numpy as np
import pytest
import test_trainer
import tiny
import torch
import transformers.trainer
from outcomes import assert_same, trained, weights
from test_trainer import logged
from tiny import CONFIG, ce_attached, pad, tiny_llama, tiny_samples, tiny_store, without_id
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from transformers import LlamaForCausalLM, Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer

from sfr_kernels import SFRLoss, attach, detach
from sfr_kernels.targets import SFRCollator
from sfr_kernels.training.callbacks import SFRCallback
from sfr_kernels.training.checkpoint import load_head

setting = pytest.mark.setting
SAMPLES = tiny_samples(16)
STORE = tiny_store(SAMPLES)
COLLATE = SFRCollator(CONFIG, STORE, pad)


def plain_collate(features):
    return pad(without_id(features))


def trainer_of(model, folder, *, add=True, collate=COLLATE, **options):
    """With the callback, unless `add` is false."""
    trainer = test_trainer.trainer_of(model, folder, collate, samples=SAMPLES, **options)
    if add:
        SFRCallback().add_to(trainer)
    return trainer


def attached(**fields):
    return attach(tiny_llama(), replace(CONFIG, **fields), STORE)


@setting("Trainer", "label smoothing, with SFRCallback().add_to")
@pytest.mark.parametrize("objective", ["sfr", "ce"])
def test_label_smoothing_goes_into_the_fused_loss(tmp_path, objective):
    """The weights of the plain model under Trainer's own smoothing, with micro-batches of different sizes."""
    options = dict(label_smoothing_factor=0.3, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    plain = trained(trainer_of(tiny_llama(), tmp_path, add=False, collate=plain_collate, **options))
    model, collate = (attached(flow_weight=0.0), COLLATE) if objective == "sfr" else (ce_attached(), plain_collate)
    ours = trained(trainer_of(model, tmp_path, collate=collate, **options))
    detach(model)
    assert_same(model, plain.model, rtol=1e-4, atol=1e-6)
    for found, wanted in zip(logged(ours, "loss"), logged(plain, "loss"), strict=True):
        assert found == pytest.approx(wanted, rel=1e-4)


@setting("Trainer", "label smoothing without add_to", outcome="refused")
@pytest.mark.parametrize("callbacks", [None, [SFRCallback()]], ids=["no callback", "constructor's"])
def test_label_smoothing_that_would_see_no_logits_stops_before_the_first_step(tmp_path, callbacks):
    trainer = trainer_of(attached(), tmp_path, add=False, label_smoothing_factor=0.1, callbacks=callbacks)
    before = weights(trainer.model)
    with pytest.raises((ValueError, KeyError), match=r"SFRCallback\(\).add_to\(trainer\)"):
        trainer.train()
    assert_same(weights(trainer.model), before)


def logits_loss(outputs, labels, num_items_in_batch=None, **options):
    logits = outputs.logits[:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), **options)


def assert_smoothed(trainer, smoothing: float) -> None:
    found, batch = trainer.evaluate(SAMPLES[:4])["eval_ce_loss"], pad(SAMPLES[:4])
    detach(trainer.model)
    with torch.no_grad():
        wanted = logits_loss(trainer.model.eval()(**batch), batch["labels"], label_smoothing=smoothing)
    assert found == pytest.approx(wanted.item(), rel=1e-5)


def test_label_smoothing_is_that_of_the_trainer_and_ends_with_it(tmp_path):
    model = attached()
    for smoothing in (0.3, 0.0):
        assert_smoothed(trainer_of(copy.deepcopy(model), tmp_path, label_smoothing_factor=smoothing), smoothing)
        trainer = trainer_of(model, tmp_path, label_smoothing_factor=smoothing)  # after another of it
    assert_smoothed(trainer, 0.0)
    # each training of a Trainer with model_init has a model of its own
    smoothed = trainer_of(attached(), tmp_path, label_smoothing_factor=0.3).args
    trainer = Trainer(model_init=lambda: attached(), args=smoothed, train_dataset=SAMPLES, data_collator=COLLATE)
    SFRCallback().add_to(trainer)
    assert_smoothed(trained(trainer), 0.3)
    model = attach(tiny_llama(), SFRLoss(CONFIG, detach(attached()), label_smoothing=0.1), STORE)
    with pytest.raises(ValueError, match="label_smoothing_factor is given to Trainer, and label_smoothing"):
        trainer_of(model, tmp_path, label_smoothing_factor=0.3)


def test_a_schedule_that_the_callback_moved_ends_with_its_run(tmp_path):
    model = attached(flow_schedule="cosine")
    trainer_of(model, tmp_path).train()
    assert model.sfr.schedule == 1.0
    with pytest.raises(RuntimeError, match="only SFRCallback knows"):
        trainer_of(model, tmp_path, add=False).train()


def test_data_parallel_threads_are_refused(tmp_path):
    trainer = trainer_of(attached(), tmp_path)
    trainer.args._n_gpu = 2
    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, SFRCallback))
    with pytest.raises(ValueError, match=r"nn.DataParallel.*torchrun"):
        callback.on_train_begin(trainer.args, trainer.state, None, model=trainer.model)


@setting("Trainer", "compute_loss_func", outcome="refused")
def test_a_loss_function_of_logits_is_refused(tmp_path):
    with pytest.raises(ValueError, match="compute_loss_func"):
        trainer_of(attached(), tmp_path, compute_loss_func=logits_loss)
    with pytest.raises(AttributeError, match="makes no logits"):
        trainer_of(attached(), tmp_path, add=False, compute_loss_func=logits_loss).train()
    with pytest.raises(RuntimeError, match="does not compute the loss that was attached"):
        trainer_of(ce_attached(), tmp_path, add=False, collate=plain_collate, compute_loss_func=logits_loss).train()


@setting("Trainer", "preprocess_logits_for_metrics", outcome="refused")
def test_what_makes_predictions_of_logits_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"compute_metrics is given the predicted tokens"):
        trainer_of(attached(), tmp_path, preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1))


FUSED = "fused_linear_cross_entropy"


def liger(model, config):
    """Does what Liger's fused cross-entropy does to an instance: another forward in place of the model's."""
    if config.get(FUSED, True):
        model.forward = MethodType(LlamaForCausalLM.forward, model)


@setting("Trainer", "use_liger_kernel, with its fused cross-entropy", outcome="refused")
def test_a_forward_that_liger_replaces_stops_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(transformers.trainer, "apply_liger_kernel", lambda m, c: liger(m, c or {}))
    fused, other = (dict(use_liger_kernel=True, liger_kernel_config={FUSED: flag}) for flag in (True, False))
    with pytest.raises(RuntimeError, match=r'liger_kernel_config={"fused_linear_cross_entropy": False}'):
        trainer_of(attached(), tmp_path, collate=plain_collate, **fused).train()
    trainer = trained(trainer_of(attached(), tmp_path, **other))
    assert trainer.model.sfr.head.output_proj.weight.any()


class Preferring(Trainer):
    """Its loss is of log-probabilities that it makes of the logits itself, as DPO's is."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = {k: v for k, v in inputs.items() if k not in ("labels", "rows")}
        return -model(**inputs).logits.log_softmax(-1)[..., 3].mean()


class Flat(torch.optim.SGD):
    """As an engine's that shards: it steps a flat copy of the parameters, by which no model is found."""

    def __init__(self, parameters, lr):
        self.own = list(parameters)
        super().__init__([parameters_to_vector(self.own).detach().requires_grad_()], lr=lr)

    def step(self, closure=None):
        [flat] = self.param_groups[0]["params"]
        flat.grad = parameters_to_vector([torch.zeros_like(p) if p.grad is None else p.grad for p in self.own])
        super().step()
        vector_to_parameters(flat.detach().clone(), self.own)


@setting("Trainer", "steps of an optimizer of flat copies (as DeepSpeed's)")
def test_an_optimizer_of_flat_copies_is_counted_and_watched_by_the_callback(tmp_path):
    wanted = trained(trainer_of(attached(), tmp_path))
    for add in (True, False):
        trainer = trainer_of(attached(), tmp_path, add=add)
        trainer.optimizer = Flat(trainer.model.parameters(), lr=0.3)
        assert trained(trainer).model.sfr.step == 3
        assert_same(trainer.model, wanted.model, rtol=1e-5, atol=1e-7)
    trainer = trainer_of(attached(), tmp_path, kind=Preferring)
    trainer.optimizer = Flat(trainer.model.parameters(), lr=0.3)
    with pytest.raises(RuntimeError, match="does not compute the loss that was attached"):
        trainer.train()


@setting("Trainer", "adapters after attach", outcome="refused")
def test_adapters_after_attach_stop_before_the_first_forward(tmp_path):
    with pytest.raises(RuntimeError, match="Wrap the model first, then attach"):
        trainer_of(tiny.adapted(attached()), tmp_path).train()


@setting("Trainer", "without SFRCallback")
def test_without_the_callback_training_is_the_same(tmp_path):
    """Noise is that of the optimizer's step, under accumulation too; what is missing is what the callback logs."""
    accumulated = dict(per_device_train_batch_size=2, gradient_accumulation_steps=4)
    with_it, without = (trained(trainer_of(attached(), tmp_path, add=add, **accumulated)) for add in (True, False))
    assert_same(without.model, with_it.model)
    assert without.model.sfr.step == 3


@setting("Trainer", "resuming without SFRCallback", outcome="refused")
def test_a_resumed_run_without_the_callback_stops_at_the_first_step(tmp_path):
    adam = dict(save_strategy="steps", save_steps=2, optim="adamw_torch")  # which has a past
    first, again = (trainer_of(attached(), tmp_path, add=False, **adam) for _ in range(2))
    first.train()
    with pytest.raises(RuntimeError, match=r"velocity head is new .its step is 0.: a Trainer needs SFRCallback"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@setting("Trainer", "compute_metrics")
def test_compute_metrics_is_given_predictions(tmp_path):
    """Those of the plain model's logits, of which there are none, without the router's of a mixture of experts."""
    experts = attach(tiny.tiny_mixtral(output_router_logits=True), CONFIG, STORE)
    batch = pad(SAMPLES[:8])
    labels = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    for model, collate in ((attached(), COLLATE), (experts, COLLATE), (ce_attached(), plain_collate)):
        seen = []
        given = dict(compute_metrics=lambda found, seen=seen: seen.append(found) or {"count": 1.0})
        trainer = trainer_of(model, tmp_path, collate=collate, per_device_eval_batch_size=3, **given)
        assert trainer.evaluate(SAMPLES[:8])["eval_count"] == 1.0
        detach(model)
        with torch.no_grad():
            wanted = model.eval()(**batch).logits.argmax(-1).masked_fill(labels == -100, -100)
        assert np.array_equal(seen[0].predictions, wanted) and np.array_equal(seen[0].label_ids, batch["labels"])


@setting("Trainer", "best model by a part of the loss")
def test_the_best_model_is_chosen_by_a_part_of_the_loss(tmp_path):
    options = dict(eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, eval_dataset=SAMPLES[8:])
    for greater in (False, True):  # or the worst, which is not the last
        best = dict(load_best_model_at_end=True, metric_for_best_model="eval_ce_loss", greater_is_better=greater)
        trainer = trained(trainer_of(attached(), tmp_path, **options, **best))
        found = dict(logged(trainer, "step", "eval_ce_loss"))
        wanted = (max if greater else min)(found, key=found.get)
        assert trainer.state.best_global_step == wanted and len(found) == 3
        saved = load_head(tmp_path / f"checkpoint-{wanted}").head.output_proj.weight
        assert torch.equal(trainer.model.sfr.head.output_proj.weight, saved)
    assert wanted < 3


@setting("Trainer", "predict_with_generate")
def test_predict_with_generate_is_that_of_the_plain_model(tmp_path):
    found = []
    for model, collate in ((tiny_llama(), plain_collate), (attached(), COLLATE)):
        generating = dict(predict_with_generate=True, generation_max_length=40, arguments=Seq2SeqTrainingArguments)
        given = dict(add=collate is COLLATE, kind=Seq2SeqTrainer, collate=collate)
        trainer = trainer_of(model, tmp_path, **generating, **given)
        found.append(trainer.predict(SAMPLES[:1]).predictions)
    assert np.array_equal(*found) and found[0].shape[1] > len(SAMPLES[0]["input_ids"])


@setting("Trainer", "bf16=True")
def test_bf16_trains_near_float32(tmp_path):
    """bfloat16 has 8 bits, so a mean of a hundred losses is right to about 2⁻⁸."""
    runs = [trained(trainer_of(attached(), tmp_path, bf16=flag)) for flag in (False, True)]
    single, half = ([x for (x,) in logged(trainer, "ce_loss")] for trainer in runs)
    assert half == pytest.approx(single, rel=2**-8) and half != pytest.approx(single, rel=1e-6) and len(half) == 3
    assert single[0] - single[2] > 2**-6 * single[0]


@setting("Trainer", "gradient checkpointing")
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_checkpointing_changes_no_weight(tmp_path, reentrant):
    options = dict(gradient_checkpointing=True, gradient_checkpointing_kwargs=dict(use_reentrant=reentrant))
    plain, saving = (trainer_of(attached(), tmp_path, **given) for given in ({}, options))
    counts = []
    for trainer in (plain, saving):
        calls = []
        trainer.model.model.layers[1].self_attn.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        trained(trainer)
        counts.append(len(calls))
    assert logged(plain, "ce_loss") == logged(saving, "ce_loss") and counts[1] == counts[0] + 3  # in each backward
    assert_same(saving.model, plain.model)
