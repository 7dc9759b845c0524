"""A stock transformers Trainer on an attached model: accumulation, logging, schedules, checkpoints, two processes."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import trl_cases
from corpora import HashEncoder, Words, build
from outcomes import assert_same, trained, weights
from tiny import CONFIG, adapted, in_two_processes, pad, tiny_llama, tiny_mixtral, tiny_samples, tiny_store, without_id
from torch.utils.data import IterableDataset
from transformers import AutoModelForCausalLM, DataCollatorWithFlattening, Trainer, TrainerCallback, TrainingArguments
from trl import SFTTrainer
from trl_cases import ENCODER, ByHand, chunked_loss, in_parts, texts, tokenizer

from sfr_kernels import attach
from sfr_kernels.targets import OnlineTargets, SFRCollator
from sfr_kernels.training.callbacks import SFRCallback, schedule_at
from sfr_kernels.training.trl import SFRTrainer

SAMPLES = tiny_samples(24)
STORE = tiny_store(SAMPLES)
setting = pytest.mark.setting
LORA = pytest.param(True, marks=setting("Trainer", "LoRA before attach"), id="lora")
with_adapters = pytest.mark.parametrize("adapters", [pytest.param(False, id="full"), LORA])
OF_TRAINER = ("compute_metrics", "compute_loss_func", "callbacks", "eval_dataset", "preprocess_logits_for_metrics")


def trainer_of(model, folder, collate, *, samples=SAMPLES, kind=Trainer, arguments=TrainingArguments, **options):
    """Three steps of plain SGD, of batches of eight."""
    own = {k: options.pop(k) for k in OF_TRAINER if k in options}
    fixed = dict(max_steps=3, per_device_train_batch_size=8, logging_steps=1, save_strategy="no", report_to=[], seed=1,
                 optim="sgd", learning_rate=0.3, disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False,
                 remove_unused_columns=False)  # fmt: skip
    given = arguments(str(folder), **fixed | options)
    return kind(model=model, args=given, train_dataset=samples, data_collator=collate, **own)


def make_trainer(folder, *, adapters=False, config=CONFIG, store=STORE, callback=None, callbacks=(), **options):
    """Six steps of Adam, with the callback and columns as Trainer has them."""
    model = attach(adapted(tiny_llama()) if adapters else tiny_llama(), config, store)
    adam = dict(max_steps=6, optim="adamw_torch", learning_rate=1e-2, seed=42, remove_unused_columns=True)
    given = dict(callbacks=[callback or SFRCallback(), *callbacks]) | adam | options
    return trainer_of(model, folder, SFRCollator(config, store, pad), **given)


def chunked_trainer(folder, model, samples: list[dict], store, collate=pad, loss=None, **options):
    """With the callback, the model attached to a loss of small chunks, and the steps of a training by hand."""
    given = trl_cases.STEPS | dict(samples=samples, remove_unused_columns=True) | options
    trainer = trainer_of(
        attach(model, loss or chunked_loss(), store), folder, SFRCollator(CONFIG, store, collate), **given
    )
    SFRCallback().add_to(trainer)
    return trainer


def logged(trainer, *names: str) -> list[tuple]:
    """The values of each log that has all of these names."""
    return [tuple(h[n] for n in names) for h in trainer.state.log_history if set(names) <= h.keys()]


def losses(trainer):
    return logged(trainer, "step", "ce_loss", "flow_loss")


@setting("Trainer", "gradient accumulation")
@pytest.mark.parametrize(
    "adapters, collate",
    [
        pytest.param(False, pad, marks=setting("Trainer", "padding on the right"), id="full, padding"),
        pytest.param(True, DataCollatorWithFlattening(), marks=setting("Trainer", "packing"), id="lora, packing"),
    ],
)
def test_training_ends_where_one_process_with_the_whole_batch_does(tmp_path, adapters, collate):
    """Whatever is accumulated, and with no matrix of logits."""
    samples = [{**s, "input_ids": [6 + i % 17 for i in s["input_ids"]]} for s in tiny_samples(12)]
    for s in samples:
        s["labels"] = [y if y == -100 else i for y, i in zip(s["labels"], s["input_ids"], strict=True)]
    store = build(tmp_path / "targets", samples, tokenizer=tokenizer())
    by_hand = ByHand()
    for model, parts in in_parts(adapters):
        by_hand.check(chunked_trainer(tmp_path, model, samples, store, collate, **parts), samples)


@setting("Trainer", "cross-entropy alone")
@with_adapters
def test_cross_entropy_alone_trains_as_the_plain_model_does(tmp_path, adapters):
    """Under accumulation, where the normalizer is the whole step's; the checkpoint is a plain model."""
    runs = []
    for fused in (False, True):
        model = adapted(tiny_llama()) if adapters else tiny_llama()
        if fused:
            attach(model, objective="ce")
        steps = dict(per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=4, learning_rate=0.5)
        saved = dict(save_strategy="steps", save_steps=4, seed=42)
        given = steps | saved | dict(samples=without_id(SAMPLES))
        runs.append(trained(trainer_of(model, tmp_path / str(fused), pad, **given)))
    plain, fused = ([x for (x,) in logged(trainer, "loss")] for trainer in runs)
    assert fused == pytest.approx(plain, rel=1e-5) and len(plain) == 4 and plain[0] > plain[-1]
    assert_same(runs[1].model, runs[0].model, rtol=1e-4, atol=1e-6)
    folder = tmp_path / "True" / "checkpoint-4"
    assert not list(folder.glob("sfr_*")) and list(folder.glob("*.safetensors"))


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 3


def stopped(folder, **options):
    """The checkpoint after three of six steps."""
    make_trainer(folder, save_strategy="steps", save_steps=3, callbacks=[Stop()], **options).train()
    return folder / "checkpoint-3"


@setting("Trainer", "resuming")
@with_adapters
def test_resuming_gives_the_losses_of_an_uninterrupted_run(tmp_path, adapters):
    """From checkpoints that hold the plain model."""
    whole = trained(make_trainer(tmp_path / "whole", adapters=adapters))
    checkpoint = stopped(tmp_path / "cut", adapters=adapters)
    resumed = trained(make_trainer(tmp_path / "cut", adapters=adapters), resume_from_checkpoint=str(checkpoint))
    assert losses(resumed)[-3:] == losses(whole)[-3:]
    assert_same(resumed.model, whole.model)
    if not adapters:
        _, info = AutoModelForCausalLM.from_pretrained(checkpoint, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]


@setting("Trainer", "resuming without the head", outcome="refused")
def test_a_checkpoint_without_its_head_is_refused(tmp_path):
    checkpoint = stopped(tmp_path)
    (checkpoint / "sfr_head.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no velocity head at .*checkpoint-3"):
        make_trainer(tmp_path).train(resume_from_checkpoint=str(checkpoint))


def test_the_head_is_read_from_the_folder_that_is_resumed_from(tmp_path):
    """Where the callback is not told, the head of this folder's own checkpoint is not taken for the resumed one's."""
    whole = trained(make_trainer(tmp_path / "whole"))
    there, _ = stopped(tmp_path / "there"), stopped(tmp_path / "here", seed=7)
    with pytest.raises(ValueError, match="belongs to another model"):
        make_trainer(tmp_path / "here").train(resume_from_checkpoint=str(there))
    resumed = make_trainer(tmp_path / "here", callback=SFRCallback(resume_from=there))
    told = make_trainer(tmp_path / "here")
    told.pop_callback(SFRCallback)
    SFRCallback().add_to(told)
    for trainer in (resumed, told):
        assert losses(trained(trainer, resume_from_checkpoint=str(there)))[-3:] == losses(whole)[-3:]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(SAMPLES)


@setting("Trainer", "streaming data set")
@setting("Trainer", "streaming on several processes with dispatch_batches", outcome="refused")
@pytest.mark.parametrize("kind", ["store", pytest.param("online", marks=setting("Trainer", "OnlineTargets"))])
def test_a_stream_trains_as_a_list_of_its_samples_does(tmp_path, kind):
    """accelerate slices every tensor of such a batch to the batch size: targets, which are more, stay whole. Texts pass
    through loader and accelerate, and what has been embedded for the list is not embedded again for the stream."""
    store = build(tmp_path / "s", SAMPLES) if kind == "store" else OnlineTargets(HashEncoder(), Words())
    runs, order = [], dict(max_steps=3, train_sampling_strategy="sequential")
    for samples in (SAMPLES, Stream()):
        trainer = trained(make_trainer(tmp_path, store=store, samples=samples, **order))
        runs.append((losses(trainer), kind == "store" or store.encoded))
    assert runs[0] == runs[1] and len(runs[0][0]) == 3 and runs[0][1] > 0
    several, state = SimpleNamespace(world_size=2, n_gpu=0, label_smoothing_factor=0.0), SimpleNamespace(global_step=0)
    given = dict(model=trainer.model, train_dataloader=trainer.get_train_dataloader())
    with pytest.raises(ValueError, match="dispatch_batches"):
        SFRCallback().on_train_begin(several, state, None, **given)
    cut = SFRCollator(CONFIG, store, pad)(SAMPLES[:4])
    with pytest.raises(ValueError, match="dispatch_batches"):  # what slicing among two processes would leave
        trainer.model(**{k: v[:2] if isinstance(v, torch.Tensor) else v for k, v in cut.items()})


@setting("Trainer", "ce_loss and flow_loss in the logs")
def test_logged_losses_are_averages_of_the_window_and_reach_reporters(tmp_path):
    """A reporter that Trainer asks before the callbacks of its list, as it asks its own."""
    every, window = make_trainer(tmp_path / "a"), make_trainer(tmp_path / "b", logging_steps=3)
    reporter, reported = TrainerCallback(), []
    reporter.on_log = lambda args, state, control, logs, **options: reported.append(dict(logs))
    window.callback_handler.callbacks.insert(0, reporter)
    window.pop_callback(SFRCallback)
    SFRCallback().add_to(window)
    every.train()
    window.train()
    single = losses(every)
    for end, *found in losses(window):
        steps = [s[1:] for s in single if end - 3 < s[0] <= end]
        assert found == pytest.approx([sum(x) / 3 for x in zip(*steps, strict=True)], rel=1e-5)
    seen = [h for h in reported if "loss" in h]
    assert all(h["loss"] == pytest.approx(h["ce_loss"] + h["flow_loss"], rel=1e-4) for h in seen) and seen
    json.dumps(window.state.log_history)  # plain numbers


@setting("Trainer", "a schedule of λ")
def test_the_flow_weight_follows_its_schedule(tmp_path):
    config = replace(CONFIG, flow_weight=2.0, flow_schedule="cosine", flow_warmup=0.5)
    trainer = trained(make_trainer(tmp_path, config=config))
    assert [x for (x,) in logged(trainer, "flow_weight")] == pytest.approx([0.5, 1.0, 1.5, 2.0, 1.5, 0.5])
    for loss, ce, weight, flow in logged(trainer, "loss", "ce_loss", "flow_weight", "flow_loss"):
        assert loss == pytest.approx(ce + weight * flow, rel=1e-4)


def test_schedules_start_and_end_where_they_should():
    almost = 0.5 * (1 + math.cos(0.99 * math.pi))
    for name, half, last in (("constant", 1.0, 1.0), ("linear", 0.5, 0.01), ("cosine", 0.5, almost)):
        config = replace(CONFIG, flow_schedule=name)
        assert [schedule_at(config, s, 100) for s in (0, 50, 99)] == pytest.approx([1.0, half, last])


@setting("Trainer", "evaluation")
def test_evaluation_has_the_weight_of_the_configuration_whatever_the_schedule(tmp_path):
    """So the best checkpoint is the best model's, and not that of the smallest λ."""
    config = replace(CONFIG, flow_weight=2.0, flow_schedule="cosine")
    evaluation = dict(eval_strategy="steps", eval_steps=2, per_device_eval_batch_size=5, eval_dataset=SAMPLES[:8])
    trainer = trained(make_trainer(tmp_path, config=config, learning_rate=0.0, **evaluation))
    with torch.no_grad():
        parts = [trainer.model.eval()(**SFRCollator(CONFIG, STORE, pad)(SAMPLES[i:j])) for i, j in ((0, 5), (5, 8))]
    ce, flow = ((5 * a + 3 * b).item() / 8 for a, b in zip(*[(p.ce_loss, p.flow_loss) for p in parts], strict=True))
    names = ("eval_ce_loss", "eval_flow_loss", "eval_loss")
    found = logged(trainer, *names)
    assert len(found) == 3
    evaluated = trainer.evaluate()
    for values in (*found, tuple(evaluated[n] for n in names)):
        assert values == pytest.approx((ce, flow, ce + 2 * flow), rel=1e-5)
    held = trainer.predict(SAMPLES[:3], metric_key_prefix="held").metrics
    assert held["held_loss"] == pytest.approx(held["held_ce_loss"] + 2 * held["held_flow_loss"], rel=1e-5)


def test_the_callback_asks_for_an_attached_model(tmp_path):
    with pytest.raises(ValueError, match="attach"):
        trainer_of(tiny_llama(), tmp_path, pad, callbacks=[SFRCallback()]).train()


# Two processes with half of each batch train and log as one process with the whole of it does.
EVALUATION = texts("plain", 8, seed=1)  # two batches of four, or of two and two
EVALUATING = dict(eval_strategy="steps", eval_steps=3)


def of_trainer(folder, arguments: dict):
    ids = [tokenizer()(text)["input_ids"] for text in [*texts("plain")["text"], *EVALUATION["text"]]]
    samples = [dict(input_ids=x, labels=list(x), sample_id=i) for i, x in enumerate(ids)]
    store = build(folder / "targets", samples, tokenizer=tokenizer())
    given = dict(eval_dataset=samples[12:]) | EVALUATING | arguments
    return chunked_trainer(folder, tiny_llama(initializer_range=0.2), samples[:12], store, **given)


def of_packs(folder, arguments: dict):
    """An SFRTrainer that packs, and builds its targets: both processes in the same folder."""
    model = tiny_llama(initializer_range=0.2)  # which seeds what the head begins with
    objective = dict(sfr=chunked_loss(), encoder=ENCODER, targets=folder / "targets", eval_dataset=EVALUATION)
    arguments = EVALUATING | dict(packing=True, max_length=32, eval_packing=False) | arguments
    return trl_cases.make_trainer(folder, model=model, train=texts("plain", 40), arguments=arguments, **objective)


def of_experts(folder, arguments: dict, kind_of=SFRTrainer):
    """Cross-entropy and router loss."""
    given = dict(objective="ce") if kind_of is SFRTrainer else {}
    given |= dict(model=tiny_mixtral(), kind_of=kind_of, arguments=arguments | dict(router_aux_loss_coef=0.5))
    return trl_cases.make_trainer(folder, "completion", **given)


def train_share(rank: int, make, folder) -> None:
    trainer = trained(make(folder, dict(per_device_train_batch_size=2, per_device_eval_batch_size=2)))
    assert trainer.args.world_size == 2
    torch.save((weights(trainer.model), trainer.state.log_history), folder / f"{rank}.pt")


def trained_by_two(make, folder) -> list[tuple[dict[str, torch.Tensor], list[dict]]]:
    """Weights and logs of both processes, each with half of a batch of four."""
    in_two_processes(train_share, make, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def assert_same_logs(found: list[dict], wanted: list[dict], names: set[str]) -> None:
    assert names <= set().union(*wanted)
    for a, b in zip(found, wanted, strict=True):
        assert {k: a[k] for k in names & {*a}} == pytest.approx({k: b[k] for k in names & {*b}}, rel=1e-5)


METRICS = {"entropy", "mean_token_accuracy", "num_tokens", "eval_entropy", "eval_mean_token_accuracy"}
LOSSES = {"loss", "ce_loss", "flow_loss", "eval_loss", "eval_ce_loss", "eval_flow_loss"}
OF_TWO = [
    pytest.param(of_trainer, LOSSES, marks=pytest.mark.engine("Trainer", "DDP", "full")),
    pytest.param(of_packs, LOSSES | METRICS, marks=pytest.mark.engine("SFRTrainer", "DDP", "full")),
]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("make", "names"), OF_TWO)
def test_two_processes_train_and_log_as_one_with_the_whole_batch(make, names, tmp_path):
    """Which ends as a training by hand does. The processes' batches have different numbers of tokens."""
    one = make(tmp_path / "one", dict(per_device_eval_batch_size=4))
    start, end = weights(one.model), weights(trained(one).model)
    for ends, found in trained_by_two(make, tmp_path):
        assert all((ends[n] - end[n]).abs().max() < 2e-4 * (end[n] - start[n]).abs().max() for n in start)
        assert_same_logs(found, one.state.log_history, names)


def test_each_process_adds_its_share_of_a_router_loss(tmp_path):
    """That of SFTTrainer in one process which accumulates what two have: a router loss is of a micro-batch alone."""
    accumulated = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2)
    one = trained(of_experts(tmp_path, accumulated, SFTTrainer))
    for ends, found in trained_by_two(of_experts, tmp_path):
        assert_same(ends, one.model, rtol=1e-4, atol=1e-6)
        assert_same_logs(found, one.state.log_history, {"loss", "aux_loss", "num_tokens"})
