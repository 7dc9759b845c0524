"""Settings of a Trainer that would leave the attached loss aside: they work, or stop with words that help."""

import copy
from types import MethodType

import numpy as np
import pytest
import torch
import transformers.trainer
from peft import LoraConfig, get_peft_model
from tiny import CONFIG, HIDDEN, SIZES, TARGET, pad, tiny_llama, tiny_samples, tiny_store
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaForCausalLM,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
)
from transformers.utils import logging

from sfr_kernels import SFRConfig, SFRLoss, VelocityHead, attach, detach
from sfr_kernels.targets import SFRCollator
from sfr_kernels.training.callbacks import SFRCallback
from sfr_kernels.training.checkpoint import load_head

SAMPLES = tiny_samples(16)
STORE = tiny_store(SAMPLES)
COLLATE = SFRCollator(CONFIG, STORE, pad)
BATCH = COLLATE(SAMPLES[:4])


def plain_collate(features):
    return pad([{k: v for k, v in f.items() if k != "sample_id"} for f in features])


OF_TRAINER = ("compute_metrics", "compute_loss_func", "callbacks", "eval_dataset", "preprocess_logits_for_metrics")


def trainer_of(model, folder, *, add=True, kind=Trainer, arguments=TrainingArguments, collate=COLLATE, **options):
    own = {k: options.pop(k) for k in OF_TRAINER if k in options}
    fixed = dict(max_steps=3, per_device_train_batch_size=8, logging_steps=1, save_strategy="no", report_to=[], seed=1,
                 disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False, remove_unused_columns=False)  # fmt: skip
    trainer = kind(model=model, args=arguments(str(folder), **(fixed | options)), train_dataset=SAMPLES,
                   data_collator=collate, **own)  # fmt: skip
    trainer.optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
    if add:
        SFRCallback().add_to(trainer)
    return trainer


def attached(config=CONFIG):
    return attach(tiny_llama(), config, STORE)


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if ".sfr." not in n and not n.startswith("sfr.")}


@pytest.mark.setting("Trainer", "label smoothing, with SFRCallback().add_to")
@pytest.mark.parametrize("objective", ["sfr", "ce"])
def test_label_smoothing_goes_into_the_fused_loss(tmp_path, objective):
    """The weights of the plain model under Trainer's own smoothing, with micro-batches of different sizes."""
    options = dict(label_smoothing_factor=0.3, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    plain = trainer_of(tiny_llama(), tmp_path, add=False, collate=plain_collate, **options)
    plain.train()
    if objective == "sfr":
        model, collate = attached(SFRConfig(**{**CONFIG.to_dict(), "flow_weight": 0.0})), COLLATE
    else:
        model, collate = attach(tiny_llama(), objective="ce"), plain_collate
    ours = trainer_of(model, tmp_path, collate=collate, **options)
    ours.train()
    for name, weight in weights(plain.model).items():
        torch.testing.assert_close(ours.model.get_parameter(name), weight, rtol=1e-4, atol=1e-6)
    histories = [[h["loss"] for h in t.state.log_history if "loss" in h] for t in (plain, ours)]
    assert histories[0] == pytest.approx(histories[1], rel=1e-4)


@pytest.mark.setting("Trainer", "label smoothing without add_to", outcome="refused")
@pytest.mark.parametrize("callbacks", [None, [SFRCallback()]], ids=["no callback", "constructor's"])
def test_label_smoothing_that_would_see_no_logits_stops_before_the_first_step(tmp_path, callbacks):
    trainer = trainer_of(attached(), tmp_path, add=False, label_smoothing_factor=0.1, callbacks=callbacks)
    before = weights(trainer.model)
    with pytest.raises((ValueError, KeyError), match=r"SFRCallback\(\).add_to\(trainer\)"):
        trainer.train()
    assert all(torch.equal(p, before[n]) for n, p in weights(trainer.model).items())


def smoothed_loss(model, smoothing: float) -> float:
    detach(model)
    with torch.no_grad():
        logits = model.eval()(**pad(SAMPLES[:4])).logits[:, :-1].flatten(0, 1)
    labels = pad(SAMPLES[:4])["labels"][:, 1:].flatten()
    return torch.nn.functional.cross_entropy(logits, labels, label_smoothing=smoothing).item()


def test_label_smoothing_is_that_of_the_trainer_and_ends_with_it(tmp_path):
    options, model = dict(eval_dataset=SAMPLES[:4]), attached()
    for smoothing in (0.3, 0.0):
        trainer = trainer_of(copy.deepcopy(model), tmp_path, label_smoothing_factor=smoothing, **options)
        assert trainer.evaluate()["eval_ce_loss"] == pytest.approx(smoothed_loss(trainer.model, smoothing), rel=1e-5)
        trainer = trainer_of(model, tmp_path, label_smoothing_factor=smoothing, **options)  # after another of it
    assert trainer.evaluate()["eval_ce_loss"] == pytest.approx(smoothed_loss(model, 0.0), rel=1e-5)
    # each training of such a Trainer has a model of its own
    arguments = trainer_of(attached(), tmp_path, label_smoothing_factor=0.3).args
    trainer = Trainer(
        model_init=lambda: attach(tiny_llama(), CONFIG, STORE), args=arguments, train_dataset=SAMPLES,
        data_collator=COLLATE,
    )  # fmt: skip
    SFRCallback().add_to(trainer)
    trainer.train()
    found = trainer.evaluate(SAMPLES[:4])["eval_ce_loss"]
    assert found == pytest.approx(smoothed_loss(trainer.model, 0.3), rel=1e-5)
    head = VelocityHead.from_config(CONFIG, HIDDEN, TARGET)
    model = attach(tiny_llama(), SFRLoss(CONFIG, head, label_smoothing=0.1), STORE)
    with pytest.raises(ValueError, match="label_smoothing_factor is given to Trainer, and label_smoothing"):
        trainer_of(model, tmp_path, label_smoothing_factor=0.3)


def test_a_schedule_that_the_callback_moved_ends_with_its_run(tmp_path):
    model = attached(SFRConfig(**{**CONFIG.to_dict(), "flow_schedule": "cosine"}))
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


def logits_loss(outputs, labels, num_items_in_batch=None):
    logits = outputs.logits[:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten())


@pytest.mark.setting("Trainer", "compute_loss_func", outcome="refused")
def test_a_loss_function_of_logits_is_refused(tmp_path):
    with pytest.raises(ValueError, match="compute_loss_func"):
        trainer_of(attached(), tmp_path, compute_loss_func=logits_loss)
    with pytest.raises(AttributeError, match="makes no logits"):
        trainer_of(attached(), tmp_path, add=False, compute_loss_func=logits_loss).train()
    model = attach(tiny_llama(), objective="ce")
    with pytest.raises(RuntimeError, match="does not compute the loss that was attached"):
        trainer_of(model, tmp_path, add=False, collate=plain_collate, compute_loss_func=logits_loss).train()


@pytest.mark.setting("Trainer", "preprocess_logits_for_metrics", outcome="refused")
def test_what_makes_predictions_of_logits_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"compute_metrics is given the predicted tokens"):
        trainer_of(attached(), tmp_path, preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1))


def liger(model, config):
    """Does what Liger's fused cross-entropy does to an instance: another forward in place of the model's."""
    if config.get("fused_linear_cross_entropy", True):
        model.forward = MethodType(LlamaForCausalLM.forward, model)


def ignoring(*names):
    def collate(features):
        return {k: v for k, v in COLLATE(features).items() if k not in names}

    return collate


@pytest.mark.setting("Trainer", "use_liger_kernel, with its fused cross-entropy", outcome="refused")
def test_a_forward_that_liger_replaces_stops_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(transformers.trainer, "apply_liger_kernel", lambda m, c: liger(m, c or {}))
    for fused in (True, False):
        model, config = attached(), dict(fused_linear_cross_entropy=fused)
        options = dict(
            use_liger_kernel=True, liger_kernel_config=config, collate=ignoring("rows") if fused else COLLATE
        )
        trainer = trainer_of(model, tmp_path, **options)
        if fused:
            with pytest.raises(RuntimeError, match=r'liger_kernel_config={"fused_linear_cross_entropy": False}'):
                trainer.train()
        else:
            trainer.train()
            assert model.sfr.head.output_proj.weight.any()


class Preferring(Trainer):
    """Its loss is of log-probabilities that it makes of the logits itself, as DPO's is."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = {k: v for k, v in inputs.items() if k not in ("labels", "rows")}
        return -model(**inputs).logits.log_softmax(-1)[..., 3].mean()


@pytest.mark.setting("Trainer", "a loss of the trainer's own (as DPO's)", outcome="refused")
@pytest.mark.parametrize("add", [True, False], ids=["with the callback", "without"])
def test_a_trainer_with_a_loss_of_its_own_stops_at_the_first_step(tmp_path, add):
    trainer = trainer_of(attached(), tmp_path, add=add, kind=Preferring)
    before = weights(trainer.model)
    with pytest.raises(RuntimeError, match="does not compute the loss that was attached"):
        trainer.train()
    assert all(torch.equal(p, before[n]) for n, p in weights(trainer.model).items())


class Flat(torch.optim.SGD):
    """As an engine's that shards: it steps a flat copy of the parameters, by which no model is found."""

    def __init__(self, parameters, lr):
        self.model_parameters = list(parameters)
        super().__init__([torch.cat([p.detach().flatten() for p in self.model_parameters]).requires_grad_()], lr=lr)

    def step(self, closure=None):
        [flat] = self.param_groups[0]["params"]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.model_parameters]
        flat.grad = torch.cat([g.flatten() for g in gradients])
        super().step()
        for p, part in zip(self.model_parameters, flat.split([p.numel() for p in self.model_parameters]), strict=True):
            p.data.copy_(part.view_as(p))


@pytest.mark.setting("Trainer", "steps of an optimizer of flat copies (as DeepSpeed's)")
def test_an_optimizer_of_flat_copies_is_counted_and_watched_by_the_callback(tmp_path):
    wanted = trainer_of(attached(), tmp_path)
    wanted.train()
    for add in (True, False):
        trainer = trainer_of(attached(), tmp_path, add=add)
        trainer.optimizer = Flat(trainer.model.parameters(), lr=0.3)
        trainer.train()
        assert trainer.model.sfr.step == 3
        for name, p in wanted.model.named_parameters():
            torch.testing.assert_close(trainer.model.get_parameter(name), p, rtol=1e-5, atol=1e-7)
    trainer = trainer_of(attached(), tmp_path, kind=Preferring)
    trainer.optimizer = Flat(trainer.model.parameters(), lr=0.3)
    with pytest.raises(RuntimeError, match="does not compute the loss that was attached"):
        trainer.train()


@pytest.mark.setting("Trainer", "adapters after attach", outcome="refused")
@pytest.mark.parametrize("lora", ["LoRA", "add_adapter"])
def test_adapters_after_attach_stop_before_the_first_forward(tmp_path, lora):
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = attached()
    if lora == "LoRA":
        model = get_peft_model(model, config)
    else:
        model.add_adapter(config)
    with pytest.raises(RuntimeError, match="Wrap the model first, then attach"):
        trainer_of(model, tmp_path).train()


@pytest.mark.setting("Trainer", "without SFRCallback")
def test_without_the_callback_training_is_the_same(tmp_path):
    """Noise is that of the optimizer's step, under accumulation too; what is missing is what the callback logs."""
    with_it, without = (
        trainer_of(attached(), tmp_path, add=add, per_device_train_batch_size=2, gradient_accumulation_steps=4)
        for add in (True, False)
    )
    for trainer in (with_it, without):
        trainer.train()
    for name, weight in with_it.model.named_parameters():
        assert torch.equal(weight, without.model.get_parameter(name)), name
    assert without.model.sfr.step == 3


@pytest.mark.setting("Trainer", "gradient checkpointing")
def test_gradient_checkpointing_changes_no_weight(tmp_path):
    plain, saving = (trainer_of(attached(), tmp_path, gradient_checkpointing=flag) for flag in (False, True))
    for trainer in (plain, saving):
        trainer.train()
    assert saving.model.is_gradient_checkpointing and not plain.model.is_gradient_checkpointing
    for name, weight in plain.model.named_parameters():
        torch.testing.assert_close(saving.model.get_parameter(name), weight, rtol=1e-6, atol=1e-8)


@pytest.mark.setting("Trainer", "resuming without SFRCallback", outcome="refused")
def test_a_resumed_run_without_the_callback_stops_at_the_first_step(tmp_path):
    options = dict(save_strategy="steps", save_steps=2)
    trainer_of(attached(), tmp_path, add=False, **options).train()
    again = trainer_of(attached(), tmp_path, add=False, **options)
    again.optimizer = None  # Trainer's own, which has a past
    first = trainer_of(attached(), tmp_path / "adam", add=False, **options)
    first.optimizer = None
    first.train()
    with pytest.raises(RuntimeError, match=r"velocity head is new .its step is 0.: a Trainer needs SFRCallback"):
        again.train(resume_from_checkpoint=str(tmp_path / "adam" / "checkpoint-2"))


@pytest.mark.setting("Trainer", "compute_metrics")
def test_compute_metrics_is_given_predictions(tmp_path):
    """Those of the plain model's logits, of which there are none; other positions are −100."""
    seen = {}

    def accuracy(found):
        seen["predictions"] = found.predictions
        mask = found.label_ids[:, 1:] != -100
        return {"accuracy": (found.predictions[:, :-1] == found.label_ids[:, 1:])[mask].mean()}

    for model, collate in ((attached(), COLLATE), (attach(tiny_llama(), objective="ce"), plain_collate)):
        trainer = trainer_of(model, tmp_path, collate=collate, compute_metrics=accuracy, per_device_eval_batch_size=3)
        found = trainer.evaluate(SAMPLES[:8])["eval_accuracy"]
        detach(model)
        with torch.no_grad():
            plain = [model.eval()(**pad(SAMPLES[i : i + 1])).logits[0].argmax(-1).numpy() for i in range(8)]
        labels = [np.array(s["labels"]) for s in SAMPLES[:8]]
        right = [(p[:-1] == y[1:])[y[1:] != -100] for p, y in zip(plain, labels, strict=True)]
        assert found == pytest.approx(np.concatenate(right).mean())
        for i, y in enumerate(labels):
            at = np.flatnonzero(y[1:] != -100)
            assert (seen["predictions"][i][at] == plain[i][at]).all()
            assert (np.delete(seen["predictions"][i], at) == -100).all()


@pytest.mark.setting("Trainer", "best model by a part of the loss")
def test_the_best_model_is_chosen_by_a_part_of_the_loss(tmp_path):
    options = dict(eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, eval_dataset=SAMPLES[8:])
    for greater in (False, True):  # or the worst, which is not the last
        best = dict(load_best_model_at_end=True, metric_for_best_model="eval_ce_loss", greater_is_better=greater)
        trainer = trainer_of(attached(), tmp_path, **options, **best)
        trainer.train()
        logged = {h["step"]: h["eval_ce_loss"] for h in trainer.state.log_history if "eval_ce_loss" in h}
        wanted = (max if greater else min)(logged, key=logged.get)
        assert trainer.state.best_global_step == wanted and len(logged) == 3
        saved = load_head(tmp_path / f"checkpoint-{wanted}").head.output_proj.weight
        assert torch.equal(trainer.model.sfr.head.output_proj.weight, saved)
    assert wanted < 3


@pytest.mark.setting("Trainer", "predict_with_generate")
def test_predict_with_generate_is_that_of_the_plain_model(tmp_path):
    found = []
    for model, collate in ((tiny_llama(), plain_collate), (attached(), COLLATE)):
        trainer = trainer_of(
            model, tmp_path, add=collate is COLLATE, kind=Seq2SeqTrainer, arguments=Seq2SeqTrainingArguments,
            collate=collate, predict_with_generate=True, generation_max_length=40,
        )  # fmt: skip
        found.append(trainer.predict(SAMPLES[:1]).predictions)
    assert np.array_equal(*found) and found[0].shape[1] > len(SAMPLES[0]["input_ids"])


def test_a_mixture_of_experts_gives_predictions_alone(tmp_path):
    torch.manual_seed(0)
    experts = AutoConfig.for_model("mixtral", **SIZES, num_local_experts=4, output_router_logits=True)
    model, seen = attach(AutoModelForCausalLM.from_config(experts), CONFIG, STORE), []
    trainer = trainer_of(model, tmp_path, compute_metrics=lambda found: seen.append(found.predictions) or {})
    trainer.evaluate(SAMPLES[:8])
    assert seen[0].shape == pad(SAMPLES[:8])["labels"].shape and (seen[0] != -100).any()


@pytest.fixture(autouse=True)
def quiet():
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(level)
