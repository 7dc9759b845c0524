"""The head is fitted to the model as it is, before that is trained: by `fit_head`, and by SFRCallback."""

import math
import random
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import tiny
import torch
from tiny import CONFIG, SAMPLES, STORE, in_two_processes, pad
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from sfr_kernels import SFRConfig, attach, reference
from sfr_kernels.targets import SFRCollator
from sfr_kernels.training.callbacks import SFRCallback
from sfr_kernels.training.guard import watch_of
from sfr_kernels.training.head import fit_head, is_new
from sfr_kernels.training.objectives import attachment_of

FITTED = replace(CONFIG, head_steps=5)


def batches(config=CONFIG, store=STORE):
    return DataLoader(SAMPLES, 4, collate_fn=SFRCollator(config, store, pad))


def flow_by_hand(model, config) -> float:
    """The flow loss of all samples with the reference, in float64."""
    batch = SFRCollator(config, STORE, pad)(SAMPLES)
    with torch.no_grad():
        outputs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True)
        params = {name: p.double() for name, p in model.sfr.head.named_parameters()}
        return reference.flow_matching_loss(
            outputs.hidden_states[-1].double(), params, batch["rows"], batch["rows"].targets, seed=7, config=config,
            time_scale=config.time_scale, hidden_scale=config.hidden_scale, hidden_norm=config.hidden_norm,
        ).item()  # fmt: skip


@pytest.mark.parametrize("loss", ["flow", "mse"])
def test_the_loss_falls_and_nothing_but_the_head_changes(loss):
    config = replace(CONFIG, loss=loss)
    model = tiny.attached(STORE, config).train()
    before = {name: p.clone() for name, p in model.state_dict().items() if not name.startswith("sfr.")}
    first = flow_by_hand(model, config)
    last = fit_head(model, batches(config), 60, rate=1e-2, progress=False)
    assert not is_new(model.sfr.head) and flow_by_hand(model, config) < 0.8 * first and 0 < last < first
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items() if name in before)
    assert model.training and all(p.grad is None for p in model.parameters())
    assert model.sfr.step == 0 and watch_of(model).progress == 0


def test_the_head_of_mtp_is_fitted_too():
    config = SFRConfig(loss="mtp", mtp_tokens=2, width=32)
    model = attach(tiny.tiny_llama(), config)
    one = [next(iter(batches(config, None)))]
    first, last = (fit_head(model, one, steps, rate=1e-2, progress=False) for steps in (1, 30))
    assert last < first


def test_the_head_of_mtp_is_fitted_through_the_adapters_and_the_bias_of_the_lm_head():
    """Neither of which has a gradient afterwards, for the training's first step to take."""
    config = SFRConfig(loss="mtp", mtp_tokens=2, width=32)
    plain = tiny.tiny_llama()
    plain.lm_head.bias = torch.nn.Parameter(torch.randn(tiny.VOCAB, dtype=torch.float32))
    model = tiny.adapted(plain, ["lm_head"], init_lora_weights=False)
    sfr = attachment_of(attach(model, config))
    torch.nn.init.normal_(sfr.head.output_proj.weight, std=0.1)
    plain.lm_head.base_layer.bias.requires_grad_()
    one = [next(iter(batches(config, None)))]
    wanted = model.eval()(**one[0]).flow_loss.item()
    assert fit_head(model, one, 1, progress=False) == pytest.approx(wanted, rel=1e-5)
    assert all(p.grad is None for p in model.parameters())


def test_the_same_call_gives_the_same_head():
    heads = []
    for _ in range(2):
        torch.manual_seed(0)
        model = tiny.attached(STORE)
        fit_head(model, batches(), 3, progress=False)
        heads.append(model.sfr.head.output_proj.weight)
    assert torch.equal(*heads)


def test_bad_input_is_named():
    model = tiny.attached(STORE)
    for name, call in {
        "steps": lambda: fit_head(model, batches(), 0),
        "rate": lambda: fit_head(model, batches(), 1, rate=0.0),
        "velocity head": lambda: fit_head(tiny.ce_attached(), batches(), 1),
        "batches ran out": lambda: fit_head(model, iter([*batches()]), 3, progress=False),
    }.items():
        with pytest.raises(ValueError, match=name):
            call()


def trained(tmp_path, config, *, callback=True, before=None, **options):
    model = tiny.attached(STORE, config)
    if before is not None:
        before(model)
    args = TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=4, use_cpu=True, report_to=[], disable_tqdm=True,
        remove_unused_columns=False, learning_rate=1e-3, seed=0, **options,
    )  # fmt: skip
    trainer = Trainer(model, args, train_dataset=SAMPLES, data_collator=SFRCollator(config, STORE, pad))
    if callback:
        SFRCallback().add_to(trainer)
    trainer.train()
    return model


def test_the_callback_fits_as_many_steps_as_the_config_says(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("sfr_kernels.training.callbacks.fit_head", lambda *args, **kwargs: calls.append(args[2]))
    trained(tmp_path / "a", FITTED)
    trained(tmp_path / "b", CONFIG)  # none asked for
    trained(
        tmp_path / "c", FITTED, before=lambda m: torch.nn.init.normal_(m.sfr.head.output_proj.weight)
    )  # has learned
    assert calls == [5]


def test_training_sees_its_data_in_the_same_order_as_without(tmp_path):
    """The head fitted by hand beforehand, and then trained without the callback's help, ends with the same weights."""

    def by_hand(model):
        kept = model.sfr.head.state_dict()
        fitted = trained(tmp_path / "first", FITTED, save_strategy="no")  # only for its first head
        model.sfr.head.load_state_dict(HEADS[0])
        assert kept.keys() == fitted.sfr.head.state_dict().keys()

    HEADS.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sfr_kernels.training.callbacks.fit_head", fitted_and_kept)
        model = trained(tmp_path / "own", FITTED)
        other = trained(tmp_path / "other", FITTED, before=by_hand)
    for (name, p), q in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(p, q), name


HEADS: list[dict] = []


def fitted_and_kept(model, *args, **kwargs):
    fit_head(model, *args, **kwargs)
    HEADS.append({name: p.clone() for name, p in model.sfr.head.state_dict().items()})


def test_a_head_that_nobody_fitted_is_said(tmp_path):
    with pytest.warns(RuntimeWarning, match="fit_head"):
        trained(tmp_path, FITTED, callback=False)


def fit_in_a_process(rank: int, folder) -> None:
    torch.distributed.init_process_group("gloo")
    model = tiny.attached(STORE)
    torch.manual_seed(rank)  # as where nobody seeds them alike
    torch.nn.init.normal_(model.sfr.head.res_blocks[0].linear.weight, std=0.1)
    collate = SFRCollator(CONFIG, STORE, pad)
    fit_head(model, [collate(SAMPLES[4 * rank : 4 * rank + 4])], 3, progress=False)
    torch.save(model.sfr.head.state_dict(), folder / f"{rank}.pt")


def test_processes_end_with_one_head(tmp_path):
    in_two_processes(fit_in_a_process, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    alone = tiny.attached(STORE)
    fit_head(alone, [SFRCollator(CONFIG, STORE, pad)(SAMPLES[:4])], 3, progress=False)
    assert all(torch.equal(p, second[name]) for name, p in first.items())
    assert not torch.equal(first["output_proj.weight"], alone.sfr.head.output_proj.weight)


# ---------------------------------------------------------------------------------------------------------------------
# λ by its share

AUTO = replace(CONFIG, flow_weight="auto", flow_share=0.4)


def run(folder, steps=4, resume=None, config=AUTO, **options):
    model = tiny.attached(STORE, config, 0.2)
    args = TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=4, use_cpu=True, report_to=[], disable_tqdm=True,
        remove_unused_columns=False, seed=0, lr_scheduler_type="constant", **dict(save_steps=2) | options,
    )  # fmt: skip
    trainer = Trainer(model, args, train_dataset=SAMPLES, data_collator=SFRCollator(config, STORE, pad))
    SFRCallback().add_to(trainer)
    trainer.train(resume_from_checkpoint=resume)
    return model, [h for h in trainer.state.log_history if "ce_loss" in h]


def test_auto_moves_the_weight_to_the_share_that_was_asked_for(tmp_path):
    model, logs = run(tmp_path, 60, learning_rate=1e-3, logging_steps=1, save_strategy="no")
    first = min(max(0.4 / logs[0]["flow_share"], 0.1), 10.0)
    assert logs[0]["flow_weight"] == 1.0 and logs[1]["flow_weight"] == pytest.approx(first)
    for before, after in pairwise(logs[5:]):  # half the way, on a scale of factors
        wanted = before["flow_weight"] * (0.4 / before["flow_share"]) ** 0.5
        assert after["flow_weight"] == pytest.approx(wanted)
    shares = [h["flow_share"] for h in logs[30:]]
    assert 0.3 < sum(shares) / len(shares) < 0.5 and model.sfr.flow_weight != 1


def test_the_first_step_is_measured_where_nothing_is_logged(tmp_path):
    model, logs = run(tmp_path, 3, logging_steps=100, save_strategy="no")
    assert not logs and model.sfr.flow_weight not in (1.0, 0.0)


def test_the_schedule_is_on_top_of_the_share(tmp_path):
    config = replace(AUTO, flow_warmup=0.9)
    _, logs = run(tmp_path, 60, learning_rate=0.0, logging_steps=1, save_strategy="no", config=config)
    low, high = (sum(h["flow_share"] for h in logs[a:b]) / (b - a) for a, b in ((5, 15), (45, 55)))
    assert low == pytest.approx(0.4 * 10 / 55, rel=0.3) and high == pytest.approx(0.4 * 50 / 55, rel=0.3)


def test_a_number_stays_and_zero_stays_zero(tmp_path):
    for weight in (2.0, 0.0):
        model, _ = run(tmp_path / str(weight), 3, logging_steps=1, config=replace(CONFIG, flow_weight=weight))
        assert model.sfr.flow_weight == weight


def test_a_resumed_run_goes_on_with_its_weight(tmp_path):
    whole, logs = run(tmp_path / "a", logging_steps=2, learning_rate=1e-2)
    resumed, rest = run(tmp_path / "a", logging_steps=2, learning_rate=1e-2, resume=str(tmp_path / "a/checkpoint-2"))
    assert rest[-1]["flow_weight"] == logs[-1]["flow_weight"] != 1 and resumed.sfr.flow_weight == whole.sfr.flow_weight
    for (name, p), q in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(p, q), name


def test_the_state_dict_has_the_weight():
    model = tiny.attached(STORE, AUTO)
    model.sfr.flow_weight, model.sfr.step = 0.1, 7
    other = tiny.attached(STORE, AUTO)
    other.load_state_dict(model.state_dict())
    assert (other.sfr.flow_weight, other.sfr.step, other.sfr.shared) == (0.1, 7, True)
    fixed = tiny.attached(STORE)
    fixed.load_state_dict(model.state_dict())
    assert fixed.sfr.flow_weight == CONFIG.flow_weight


def test_a_share_of_next_to_nothing_moves_the_weight_by_ten_at_most():
    model = tiny.attached(STORE, AUTO)
    for share, weight in ((0.0, 1.0), (math.inf, 1.0), (math.nan, 1.0), (1e-6, 10.0), (1e6, 1.0)):
        model.sfr.approach_share(share)
        assert model.sfr.flow_weight == pytest.approx(weight)


def test_evaluation_does_not_change_with_the_weight():
    model = tiny.attached(STORE, AUTO, 0.2).eval()
    batch = SFRCollator(AUTO, STORE, pad)(SAMPLES)
    with torch.no_grad():
        before = model(**batch).loss
        model.sfr.approach_share(0.01)
        assert model.sfr.flow_weight == 10.0 and torch.equal(model(**batch).loss, before)


def test_a_weight_that_nobody_sets_is_said(tmp_path):
    with pytest.warns(RuntimeWarning, match="flow_weight is auto"):
        trained(tmp_path, AUTO, callback=False)


def draws(samples):
    """A collator that draws random numbers, as augmentation does."""
    DRAWN.append((torch.rand(1).item(), random.random(), np.random.rand()))  # noqa: NPY002
    return SFRCollator(CONFIG, STORE, pad)(samples)


DRAWN: list[tuple] = []


def test_no_random_number_of_the_training_is_used_up():
    model, found = tiny.attached(STORE), []
    for fit in (False, True):
        torch.manual_seed(5), random.seed(5), np.random.seed(5)  # noqa: NPY002
        if fit:
            fit_head(model, DataLoader(SAMPLES, 4, shuffle=True, collate_fn=draws), 3, progress=False)
        DRAWN.clear()
        draws(SAMPLES[:1])
        found += DRAWN
    assert found[0] == found[1]
