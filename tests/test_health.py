"""Two numbers on the health of the objective: how much the flow moves h, and whether the head looks at h at all."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from cases import LOSSES, in_float64, leaves_of, lora_of, losses
from outcomes import assert_same, gradients, trained, weights
from test_trainer import SAMPLES, STORE, logged, make_trainer, of_trainer, trained_by_two
from tiny import BATCH, CONFIG, attached, pad, tiny_samples, tiny_store

from sfr_kernels import SFRConfig, reference, sfr_loss
from sfr_kernels.ops.flow_loss import step_seed
from sfr_kernels.targets import SFRCollator
from sfr_kernels.training import health
from sfr_kernels.training.callbacks import SFRCallback

NAMES = ("flow_share", "flow_gap")
QUARTERS = ("flow_loss_t00", "flow_loss_t25", "flow_loss_t50", "flow_loss_t75")


def norms_by_hand(hidden, flow_weight, loss_of) -> torch.Tensor:
    """Of two backward passes of the reference, each to hidden states of its own: loss_of(h) is (_, L_CE, L_flow)."""
    found = []
    for part, scale in ((1, 1.0), (2, flow_weight)):
        leaf = hidden.detach().double().requires_grad_()
        (grad,) = torch.autograd.grad(scale * loss_of(leaf)[part], leaf)
        found.append(grad.square().sum())
    return torch.stack(found)


def reference_of(case, x, **options):
    """h → (L, L_CE, L_flow) of the case with the values of x, in float64."""
    shape = SimpleNamespace(time_scale=1.0, hidden_scale=1.0, hidden_norm="none") if x.head is None else x.head.shape
    params = {name: p.detach().double() for name, p in x.params.items()}
    given = dict(seed=case.seed, config=case.config, time_scale=shape.time_scale, hidden_scale=shape.hidden_scale)
    given |= dict(hidden_norm=shape.hidden_norm)
    y = in_float64(x)
    decoder = dict(bias=y.bias.detach(), lora=lora_of(y))
    return lambda h: reference.sfr_loss(
        h, y.weight.detach(), params, case.rows, case.targets, **decoder | given | options
    )


def call(case, x, **options):
    given = dict(seed=case.seed, config=case.config, bias=x.bias, lora=lora_of(x)) | options
    return sfr_loss(x.hidden, x.weight, x.head, case.rows, case.targets, **given)


OPTIONS = {"bias": {}, "softcap": dict(bias=None, softcap=3.0, logit_scale=0.5, normalizer=7.0)}


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@losses("sfr")
def test_the_norms_are_those_of_two_backward_passes(name, options, backend):
    case = LOSSES[name].case()
    x, y = case.inputs(), case.inputs()
    plain, out = call(case, x, **options, backend=backend), call(case, y, **options, backend=backend, return_norms=True)
    wanted = norms_by_hand(x.hidden, case.config.flow_weight, reference_of(case, x, **options))
    assert plain.norms is None and not out.norms.requires_grad and wanted.min() > 0
    torch.testing.assert_close(out.norms, wanted, rtol=1e-9, atol=0)
    for loss in (plain.loss, out.loss):
        loss.backward()
    for a, b in zip(leaves_of(x).values(), leaves_of(y).values(), strict=True):
        assert (a.grad is None and b.grad is None) or torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@losses("sfr: flow, default", "sfr: cosine, default")  # with adapters, too
def test_the_norms_in_16_bit(name, dtype):
    """float16 has no room for gradients divided by a large normalizer. A share of which little is left by rounding is
    not overstated by more than that."""
    case = LOSSES[name].sized_case()
    x, normalizer = case.inputs(dtype), 1e6
    rel = 2 * torch.finfo(dtype).eps
    for weight in (1.0, 1e-30):
        options = dict(normalizer=normalizer, flow_weight=weight) | case.options
        found = call(case, x, return_norms=True, **options).norms.double()
        wanted = norms_by_hand(x.hidden, weight, reference_of(case, x, **options))
        assert found[0] == pytest.approx(wanted[0].item(), rel=rel)
        assert found[1] == pytest.approx(wanted[1].item(), rel=8 * rel, abs=4.0**-20 * wanted[0].item())
    assert call(case, x, return_norms=True, **options | dict(flow_weight=0.0)).norms[1] == 0


@losses("sfr: cosine, default", "sfr: flow, default, lora")
def test_a_graph_has_the_norms_of_flow_and_mse_without_adapters_alone(name):
    """What may break its graph computes those of the others outside of it."""
    torch._dynamo.reset()
    case = LOSSES[name].case()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="return_norms is not served"):
        torch.compile(call, backend="eager", fullgraph=True)(case, case.inputs(), return_norms=True)
    found, wanted = (f(case, case.inputs(), return_norms=True) for f in (torch.compile(call, backend="eager"), call))
    torch.testing.assert_close(found.norms, wanted.norms)


def test_norms_without_a_gradient_are_refused():
    case = LOSSES["sfr: flow, default"].case()
    x = case.inputs()
    with torch.no_grad(), pytest.raises(ValueError, match="hidden must require a gradient"):
        call(case, x, return_norms=True)
    x.hidden = x.hidden.detach()
    with pytest.raises(ValueError, match="hidden must require a gradient"):
        call(case, x, return_norms=True)


# ---------------------------------------------------------------------------------------------------------------------
# An attached model


def health_by_hand(model, batches, seed: int) -> tuple[float, float, dict[str, float]]:
    """Share, gap, and the losses by time of a step of these micro-batches, by the reference in float64 on the model's
    hidden states."""
    norms, gap, head, config = torch.zeros(2, dtype=torch.float64), 0.0, model.sfr.head, model.sfr.config
    sums, table = [[0.0, 0.0] for _ in QUARTERS], [((k + 0.5) / 64) ** config.time_power for k in range(64)]
    times = torch.tensor(table, dtype=torch.float64) if config.loss == "flow" else None
    params = {name: p.detach().double() for name, p in head.named_parameters()}
    total = sum(batch["rows"].num_ce for batch in batches)
    few_names = ("rows", "noise_id", "anchor", "weight", "labels")
    flow_options = dict(seed=seed, config=config, normalizer=total, time_scale=head.shape.time_scale)
    flow_options |= dict(hidden_scale=head.shape.hidden_scale, hidden_norm=head.shape.hidden_norm)
    for batch in batches:
        rows, given = batch["rows"], {name: batch[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            states = model.model(**given, output_hidden_states=True).hidden_states
            hidden = states[config.layer_index].double()
        weight = model.lm_head.weight.detach().double()
        loss_of = lambda h: reference.sfr_loss(h, weight, params, rows, rows.targets, **flow_options)  # noqa: E731, B023
        norms += norms_by_hand(hidden, model.sfr.flow_weight, loss_of)
        n = rows.num_flow
        kept = [i * n // min(n, 64) for i in range(min(n, 64))]  # 64 rows at most, evenly spaced
        few = {name: getattr(rows, name)[kept] for name in few_names}
        index = [39 * i % 64 for i in range(len(kept))]
        few = rows.replace(**few, num_flow=len(kept), num_ce=0, time_index=torch.tensor(index, dtype=torch.int64))
        half = len(kept) // 2
        shown = few.replace(rows=torch.cat([few.rows[len(kept) - half :], few.rows[: len(kept) - half]]))
        options = flow_options | dict(normalizer=few.weight.double().sum())
        own, exchanged = (
            reference.flow_matching_loss(hidden, params, r, rows.targets, times, **options) for r in (few, shown)
        )
        gap += (exchanged - own).item() / len(batches)
        for i in range(len(kept)) if config.loss == "flow" else ():
            one = few.replace(**{name: getattr(few, name)[[i]] for name in (*few_names, "time_index")}, num_flow=1)
            loss = reference.flow_matching_loss(hidden, params, one, rows.targets, times, **flow_options)
            quarter = sums[int(4 * table[index[i]])]
            quarter[0] += total * loss.item()
            quarter[1] += one.weight.item()
    share = (norms[1] / norms[0]).sqrt().item()
    return share, gap, {name: x / w for name, (x, w) in zip(QUARTERS, sums, strict=True) if w}


def still(folder, config=CONFIG, **options):
    """A trainer that changes nothing, of batches in order, whose head has an output."""
    given = dict(learning_rate=0.0, weight_decay=0.0, train_sampling_strategy="sequential", max_steps=3) | options
    trainer = make_trainer(folder, config=config, **given)
    torch.manual_seed(4)
    torch.nn.init.normal_(trainer.model.sfr.head.output_proj.weight, std=0.2)
    return trainer


def losses_by_time(history: list[dict]) -> list[dict[str, float]]:
    return [{name: h[name] for name in QUARTERS if name in h} for h in history if NAMES[0] in h]


@pytest.mark.setting("Trainer", "flow_share and flow_gap in the logs")
@pytest.mark.setting("Trainer", "the flow loss by time in the logs")
@pytest.mark.parametrize("loss", ["flow", "mse", "cosine"])
def test_the_logs_have_the_health_of_the_whole_step(tmp_path, loss):
    """Whose micro-batches add up."""
    config = replace(CONFIG, loss=loss, flow_weight=3.0)
    whole = trained(still(tmp_path, config))
    parts = trained(still(tmp_path, config, per_device_train_batch_size=4, gradient_accumulation_steps=2))
    collate = SFRCollator(config, STORE, pad)
    for trainer, size in ((whole, 8), (parts, 4)):
        found, by_time = logged(trainer, *NAMES), losses_by_time(trainer.state.log_history)
        assert len(found) == 3
        for step, values in enumerate(found):
            batches = [collate(SAMPLES[i : i + size]) for i in range(8 * step, 8 * step + 8, size)]
            *wanted, losses = health_by_hand(trainer.model, batches, step_seed(config.seed, step))
            assert values == pytest.approx(wanted, rel=1e-3, abs=1e-5) and min(map(abs, wanted)) > 1e-3
            assert by_time[step] == pytest.approx(losses, rel=1e-4) and len(losses) == (4 if loss == "flow" else 0)
    assert logged(parts, NAMES[0]) == [pytest.approx(share, rel=1e-4) for share in logged(whole, NAMES[0])]


def test_two_processes_log_what_one_does_with_the_micro_batches_of_both(tmp_path):
    accumulated = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2)
    one = trained(of_trainer(tmp_path / "one", accumulated))
    wanted, by_time = logged(one, *NAMES), losses_by_time(one.state.log_history)
    for _, found in trained_by_two(of_trainer, tmp_path):
        values = [tuple(h[name] for name in NAMES) for h in found if NAMES[0] in h]
        assert values == [pytest.approx(w, rel=1e-4, abs=1e-5) for w in wanted] and len(values) > 1
        assert losses_by_time(found) == [pytest.approx(w, rel=1e-4) for w in by_time] and all(by_time)


def test_no_bit_of_the_training_depends_on_the_logs(tmp_path):
    every, seldom, without = (make_trainer(tmp_path, logging_steps=n) for n in (1, 5, 1))
    without.pop_callback(SFRCallback)
    ends = [weights(trained(trainer).model) for trainer in (every, seldom, without)]
    assert len(logged(every, *NAMES)) == 6 and len(logged(seldom, *NAMES)) == 1 and not logged(without, *NAMES)
    assert_same(ends[1], ends[0])
    assert_same(ends[2], ends[0])


@pytest.mark.parametrize("loss", ["flow", "mse", "cosine", "cka", "mtp"])
def test_no_bit_of_a_gradient_depends_on_being_measured(loss):
    config, found = replace(CONFIG, loss=loss, segment_tokens=0, flow_weight=2.0), []
    samples = tiny_samples()
    store = tiny_store(samples, config)
    for measuring in (False, True):
        model = attached(store, config, None if loss == "cka" else 0.2)
        model.sfr.measuring = measuring
        model(**SFRCollator(config, store, pad)(samples)).loss.backward()
        found.append(gradients(model))
    assert_same(*found)
    assert (model.sfr.health[:2] > 0).all() and model.sfr.health[3] == (loss not in ("cka", "mtp"))


STEPS = {
    "every third": (dict(logging_steps=3), [3, 6]),
    "and the first": (dict(logging_steps=3, logging_first_step=True), [1, 3, 6]),
    "of an epoch": (dict(logging_strategy="epoch", per_device_train_batch_size=5, gradient_accumulation_steps=2,
                         max_steps=7), [3, 6, 7]),
    "never": (dict(logging_strategy="no"), []),
}  # fmt: skip


@pytest.mark.parametrize("options, wanted", STEPS.values(), ids=STEPS)
def test_only_the_steps_that_are_logged_are_measured(tmp_path, monkeypatch, options, wanted):
    """And no evaluation."""
    trainer = make_trainer(tmp_path, eval_strategy="steps", eval_steps=3, eval_dataset=SAMPLES[:8], **options)
    real, measured = health.flow_matching_loss, []

    def spy(*args, **options):
        measured.append(trainer.state.global_step + 1)
        return real(*args, **options)

    monkeypatch.setattr(health, "flow_matching_loss", spy)
    trainer.train()
    assert list(dict.fromkeys(measured)) == wanted == [step for step, *_ in logged(trainer, "step", *NAMES)]
    assert wanted == [step for step, _ in logged(trainer, "step", "loss")]
    assert len(logged(trainer, "eval_loss")) >= 2 and not [h for h in trainer.state.log_history if "eval_flow_gap" in h]
    assert not trainer.model.sfr.measuring


def gap_of(model, batch=BATCH) -> float:
    model.sfr.measuring = True
    model(**batch)
    assert model.sfr.health[3] == 1
    return model.sfr.health[2].item()


def test_the_gap_is_zero_for_a_head_that_does_not_use_h_and_grows_with_training():
    model = attached(tiny_store(tiny_samples()), CONFIG)
    torch.nn.init.normal_(model.sfr.head.output_proj.weight, std=0.2)
    weight, size = model.sfr.head.input_proj[0].weight, model.sfr.head.shape.target_size
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[:, 2 * size :] = 0
    assert abs(gap_of(model)) < 1e-6
    with torch.no_grad():
        weight.copy_(kept)
    assert abs(gap_of(model)) > 1e-5
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        out = model(**BATCH)
        out.loss.backward()
        optimizer.step()
    assert gap_of(model) > 0.2 * out.flow_loss.item()


def test_a_single_flow_row_has_no_gap_and_a_frozen_model_no_share():
    config = SFRConfig(**CONFIG.to_dict() | dict(min_tokens=1))
    sample = dict(input_ids=[5, 6, 7], labels=[-100, -100, 7], sample_id=0)
    store = tiny_store([sample], config)
    batch = SFRCollator(config, store, pad)([sample])
    assert batch["rows"].num_flow == 1
    model = attached(store, config, 0.2)
    model.sfr.measuring = True
    model(**batch)
    assert model.sfr.health[0] > 0 and not model.sfr.health[2:].any()
    model = attached(tiny_store(tiny_samples()), CONFIG, 0.2)
    model.model.requires_grad_(False)
    assert gap_of(model) != 0 and not model.sfr.health[:2].any()


def test_a_time_of_which_there_is_no_row_has_no_loss():
    """Of two rows both are early."""
    sample = dict(input_ids=[5, 6, 7, 8], labels=[-100, -100, 7, 8], sample_id=0)
    config = SFRConfig(**CONFIG.to_dict() | dict(min_tokens=1))
    store = tiny_store([sample], config)
    model = attached(store, config, 0.2)
    batch = SFRCollator(config, store, pad)([sample])
    assert gap_of(model, batch) and batch["rows"].num_flow == 2
    assert health.health_values([model.sfr.health]).keys() == {*NAMES, QUARTERS[0]}
