"""What a training leaves on disk and on the hub, and that it goes on from there to the same bits."""

import json
from dataclasses import replace
from pathlib import Path

import engines
import pytest
import test_trainer
import torch
import trl_cases
from outcomes import assert_same, trained
from test_trainer import logged
from tiny import CONFIG, adapted, in_two_processes, pad, tiny_llama, tiny_samples, tiny_store
from transformers import AutoModelForCausalLM, TrainerCallback

from sfr_kernels import SFRConfig, attach, detach
from sfr_kernels.targets import SFRCollator
from sfr_kernels.training import checkpoint as checkpoints
from sfr_kernels.training.callbacks import SFRCallback
from sfr_kernels.training.checkpoint import load_head, pairing, restore_head
from sfr_kernels.training.objectives import attachment_of

pytestmark = pytest.mark.usefixtures("one_thread")
setting = pytest.mark.setting
SAMPLES = tiny_samples(24)
STORE = tiny_store(SAMPLES)
# All that has a state, with a gate that closes in the first window of the logs, and opens again.
RECIPE = replace(
    CONFIG, flow_weight="auto", flow_gate=1.93, head_ema=0.9, head_steps=3, flow_schedule="cosine", flow_warmup=0.3
)
STEPS = 7
TEXTS = trl_cases.texts("plain", 16)


def make_trainer(folder, config=RECIPE, model=None, **options):
    """Seven steps of Adam, logged at the third and the sixth, with a checkpoint after each."""
    model = attach(tiny_llama() if model is None else model, config, STORE)
    given = dict(
        max_steps=STEPS, optim="adamw_torch", learning_rate=1e-2, logging_steps=3, logging_first_step=False,
        save_strategy="steps", save_steps=1, samples=SAMPLES, per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
    ) | options  # fmt: skip
    trainer = test_trainer.trainer_of(model, folder, SFRCollator(config, STORE, pad), **given)
    SFRCallback().add_to(trainer)
    return trainer


class StopAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def logs(trainer) -> list[dict]:
    """Without what a clock says."""
    clocks = ("_runtime", "_per_second")
    return [{k: v for k, v in h.items() if not k.endswith(clocks)} for h in trainer.state.log_history]


def state_of(trainer) -> tuple:
    sfr = attachment_of(trainer.model)
    return sfr.step, sfr.flow_weight, sfr.shared, sfr.fitted, sfr.gate and (sfr.gate.open, *sfr.gate.state())


def assert_goes_on(trainer, whole, **options) -> None:
    trained(trainer, **options)
    assert_same(trainer.model, whole.model)
    assert state_of(trainer) == state_of(whole)
    assert logs(trainer) == logs(whole) and len(logged(trainer, "loss", "ce_loss", "flow_loss")) >= 1


UNFITTED = replace(CONFIG, flow_weight="auto")  # whose first step has no share to set λ by


@setting("Trainer", "resuming between two logs")
@setting("Trainer", "resuming with λ of auto, its schedule, a gate and head_ema")
@pytest.mark.parametrize("config, steps", [(RECIPE, (1, 2, 3, 5)), (UNFITTED, [1])], ids=["recipe", "no share yet"])
def test_a_run_goes_on_from_any_step_to_the_same_bits(tmp_path, config, steps):
    whole = trained(make_trainer(tmp_path / "whole", config))
    if config is RECIPE:
        assert 0 < dict(logged(whole, "step", "flow_gate"))[3] < 1 and whole.model.sfr.flow_weight != 1.0
    for step in steps:
        resumed = make_trainer(tmp_path / "other", config)  # whose own folder holds nothing
        assert_goes_on(resumed, whole, resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))


@setting("SFRTrainer", "resuming between two logs")
def test_an_sfr_trainer_goes_on_with_its_metrics(tmp_path):
    """Entropy, accuracy and the tokens trained on."""
    given = dict(logging_steps=2, save_strategy="steps", save_steps=1)
    whole = trained(trl_cases.make_trainer(tmp_path / "whole", arguments=given | dict(max_steps=4), train=TEXTS))
    resumed = trl_cases.make_trainer(tmp_path / "other", arguments=given | dict(max_steps=4), train=TEXTS)
    assert_goes_on(resumed, whole, resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert len(logged(resumed, "entropy", "mean_token_accuracy", "num_tokens")) == 2


def go_on_in_two(rank: int, folder: Path) -> None:
    engines.lead_to("DDP")
    halves = dict(per_device_train_batch_size=2, save_steps=2)
    whole = trained(make_trainer(folder / "whole", **halves))
    assert whole.args.world_size == 2
    resumed = make_trainer(folder / "whole", **halves)
    assert_goes_on(resumed, whole, resume_from_checkpoint=str(folder / "whole" / "checkpoint-2"))


@setting("Trainer", "resuming on two processes (DDP, on a CPU), between two logs")
def test_two_processes_go_on_with_the_sums_of_each(tmp_path):
    in_two_processes(go_on_in_two, tmp_path)
    saved = tmp_path / "whole" / "checkpoint-2"
    first, second = json.loads((saved / "trainer_state.json").read_text())["stateful_callbacks"]["sfr_kernels"]["sums"]
    assert first != second
    alone = trained(make_trainer(tmp_path / "alone"), resume_from_checkpoint=str(saved))  # with a window of its own
    [(loss, ce, flow), _] = logged(alone, "loss", "ce_loss", "flow_loss")
    weight = dict(logged(alone, "step", "flow_weight"))[3]  # of the third step, which is all that the window has
    assert loss == pytest.approx(ce + weight * flow, rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: which are kept, which is loaded, and what a save that was killed leaves

EVALUATING = dict(eval_dataset=SAMPLES[8:12], eval_strategy="steps", eval_steps=1, metric_for_best_model="flow_loss")


@setting("Trainer", "load_best_model_at_end")
@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
def test_the_best_model_comes_with_the_head_and_the_state_of_its_step(tmp_path, adapters):
    """Which is not the last one: the same as of a run that ended there."""
    model = adapted(tiny_llama(), "all-linear") if adapters else tiny_llama()
    best = dict(load_best_model_at_end=True, greater_is_better=True, save_total_limit=1)
    trainer = trained(make_trainer(tmp_path / "best", model=model, **EVALUATING, **best))
    step = trainer.state.best_global_step
    model = adapted(tiny_llama(), "all-linear") if adapters else tiny_llama()
    stopped = trained(make_trainer(tmp_path / "cut", model=model, callbacks=[StopAt(step)]))
    assert 0 < step < STEPS
    assert_same(trainer.model, stopped.model)
    assert state_of(trainer) == state_of(stopped)
    assert [p.name for p in (tmp_path / "best").glob("checkpoint-*")] == [f"checkpoint-{step}"]
    trainer.save_model()
    restore_head(tmp_path / "best", attachment_of(stopped.model), pairing(stopped.model))


@setting("Trainer", 'save_strategy="best"')
def test_each_checkpoint_of_a_best_model_has_its_head(tmp_path):
    trainer = trained(make_trainer(tmp_path, **EVALUATING | dict(save_strategy="best")))
    values = dict(logged(trainer, "step", "eval_flow_loss"))
    best = [s for s in values if values[s] < min((values[t] for t in values if t < s), default=torch.inf)]
    assert len(values) == STEPS and 1 < len(best) < STEPS
    assert {p.name for p in tmp_path.glob("checkpoint-*")} == {f"checkpoint-{s}" for s in best}
    assert all(load_head(p).head is not None for p in tmp_path.glob("checkpoint-*"))


@setting("Trainer", "save_total_limit")
def test_old_checkpoints_go_with_their_heads_and_the_last_one_is_resumed(tmp_path):
    whole = trained(make_trainer(tmp_path / "whole"))
    cut = dict(save_total_limit=2)
    trained(make_trainer(tmp_path / "cut", callbacks=[StopAt(5)], **cut))
    assert {p.parent.name for p in (tmp_path / "cut").rglob("sfr_*")} == {"checkpoint-4", "checkpoint-5"}
    assert_goes_on(make_trainer(tmp_path / "cut", **cut), whole, resume_from_checkpoint=True)
    assert {p.parent.name for p in (tmp_path / "cut").rglob("sfr_*")} == {"checkpoint-6", "checkpoint-7"}


@setting("Trainer", "save_only_model")
def test_a_run_goes_on_from_a_checkpoint_without_an_optimizer(tmp_path):
    """With the head, λ, gate and noise of its step; plain SGD has no state."""
    plain = dict(optim="sgd", lr_scheduler_type="constant", train_sampling_strategy="sequential", save_only_model=True)
    whole = trained(make_trainer(tmp_path, **plain))
    assert not list(tmp_path.rglob("optimizer.pt"))
    assert_goes_on(make_trainer(tmp_path, **plain), whole, resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


class Killed(Exception):
    pass


@pytest.mark.parametrize("after", ["nothing", "the head", "both files"])
def test_a_save_that_is_cut_short_is_not_taken_for_whole(tmp_path, monkeypatch, after):
    """Over an older save: what is left is all of the old one, or refused."""
    old, new = (attach(tiny_llama(seed), CONFIG, STORE) for seed in range(2))
    for p in new.parameters():
        p.data += 0.1  # norms, too, which all begin with ones
    old.save_pretrained(tmp_path)
    write, done = checkpoints.write_atomically, []

    def killed(path, data):
        if len(done) == ["nothing", "the head"].index(after):
            raise Killed
        done.append(path.name)
        write(path, data)

    def stopped(*args, **kwargs):
        raise Killed

    if after != "both files":
        monkeypatch.setattr(checkpoints, "write_atomically", killed)
    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", stopped)
    with pytest.raises(Killed):
        new.save_pretrained(tmp_path)
    monkeypatch.undo()
    left = attach(AutoModelForCausalLM.from_pretrained(tmp_path), CONFIG, STORE)
    assert_same(left.model, old.model)
    if after == "nothing":
        restore_head(tmp_path, left.sfr, pairing(left))
        assert_same(left, old)
    else:
        with pytest.raises(ValueError, match=r"not come to its end|belongs to another model"):
            restore_head(tmp_path, left.sfr, pairing(left))
    if after == "the head":
        with pytest.raises(ValueError, match="not come to its end"):
            load_head(tmp_path)


def test_a_model_is_saved_where_its_head_cannot_be(tmp_path):
    model = attach(tiny_llama(), CONFIG, STORE)
    model.sfr.head.output_proj.weight.data = torch.empty(0)
    with pytest.raises(RuntimeError, match="it is not saved"):
        model.save_pretrained(tmp_path)
    detach(model)
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path), model)


def test_an_objective_without_a_head_leaves_none_of_an_older_save(tmp_path):
    attach(tiny_llama(), CONFIG, STORE).save_pretrained(tmp_path)
    config = SFRConfig(loss="cka", segment="response")
    attach(tiny_llama(), config, target_size=12).save_pretrained(tmp_path)
    assert load_head(tmp_path).head is None and not (tmp_path / "sfr_head.safetensors").exists()
