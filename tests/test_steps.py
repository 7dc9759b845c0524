"""Whoever makes the steps: they end where those of the plain model, its head and the reference loss do."""

from functools import partial

import pytest
import torch
from tiny import CONFIG, pad, tiny_llama, tiny_samples, tiny_store
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from sfr_kernels import attach, detach, sfr_loss
from sfr_kernels.ops.times import step_seed
from sfr_kernels.targets import SFRCollator

lightning = pytest.importorskip("lightning")
setting = pytest.mark.setting
SAMPLES = tiny_samples(12)
STORE = tiny_store(SAMPLES)
BATCHES = [SFRCollator(CONFIG, STORE, pad)(SAMPLES[i : i + 4]) for i in (0, 4, 8)]  # of a step each
SGD = dict(lr=0.3)


def fresh():
    model = attach(tiny_llama(), CONFIG, STORE)
    torch.nn.init.normal_(model.sfr.head.output_proj.weight, std=0.1)  # else half of the head learns a step later
    return model


def weights(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def plain_loss(model, head, batch, step: int):
    """By the reference, of the plain model's hidden states."""
    hidden = model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    return sfr_loss(
        hidden, model.lm_head.weight, head, batch["rows"], batch["rows"].targets, config=CONFIG,
        seed=step_seed(CONFIG.seed, step), backend="reference",
    ).loss  # fmt: skip


def differentiate(optimizer, loss_of):
    optimizer.zero_grad()
    loss = loss_of()
    loss.backward()
    return loss


def by_hand(kind=torch.optim.SGD, **options) -> list[dict[str, torch.Tensor]]:
    """The weights after each step of the plain model and its head."""
    model = fresh()
    head = detach(model)
    optimizer, ends = kind([*model.parameters(), *head.parameters()], **options or SGD), []
    for step, batch in enumerate(BATCHES):
        optimizer.step(partial(differentiate, optimizer, partial(plain_loss, model, head, batch, step)))
        ends.append(weights(model) | {f"sfr.head.{name}": p for name, p in weights(head).items()})
    return ends


def assert_near(found: dict, wanted: dict, rtol=1e-4, atol=1e-6) -> None:
    assert found.keys() == wanted.keys()
    before = weights(fresh())
    for name, value in wanted.items():
        assert (value - before[name]).abs().max() > 5e-5, f"{name} hardly moved, which shows nothing"
        torch.testing.assert_close(found[name], value, rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


@setting("own loop", "GradScaler")
def test_a_step_that_a_scaler_skips_is_none():
    model = fresh()
    optimizer, scaler = torch.optim.SGD(model.parameters(), **SGD), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step, batch in enumerate([BATCHES[0], BATCHES[2], *BATCHES[1:]]):  # the second overflows
        optimizer.zero_grad()
        scaler.scale(model(**batch).loss).backward()
        if step == 1:
            model.lm_head.weight.grad[3, 3] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        assert model.sfr.step == (1, 1, 2, 3)[step]
    assert scaler.get_scale() == 2.0**9
    assert_near(weights(model), by_hand()[-1])


@setting("own loop", "closures, as of LBFGS")
def test_lbfgs_counts_its_steps_whatever_it_evaluates():
    """The noise of a step is one in all of its evaluations."""
    model, options, losses = fresh(), dict(lr=0.2, max_iter=4), []
    optimizer = torch.optim.LBFGS(model.parameters(), **options)

    def attached(batch):
        losses.append(model(**batch).loss)
        return losses[-1]

    for batch in BATCHES:
        optimizer.step(partial(differentiate, optimizer, partial(attached, batch)))
    assert model.sfr.step == 3 and len(losses) == 12
    assert all(losses[i] > losses[i + 3] for i in (0, 4, 8))
    assert_near(weights(model), by_hand(torch.optim.LBFGS, **options)[-1], rtol=1e-3, atol=1e-4)


class Tuning(lightning.LightningModule):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), **SGD)

    def training_step(self, batch, index):
        return self.model(**batch).loss


@setting("Lightning", "automatic optimization")
def test_lightning_may_make_the_steps_itself(tmp_path):
    tuning = Tuning()
    tuning.model = model = fresh()
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", default_root_dir=tmp_path, **off)
    trainer.fit(tuning, torch.utils.data.DataLoader(BATCHES, batch_size=None))
    assert model.sfr.step == 3
    assert_near(weights(model), by_hand()[-1])


@setting("own loop", "average of weights (AveragedModel)")
def test_an_average_evaluates_as_the_model_of_averaged_weights():
    model, ends = fresh(), by_hand()
    optimizer = torch.optim.SGD(model.parameters(), **SGD)
    average = AveragedModel(model, avg_fn=get_ema_avg_fn(0.5))
    for batch in BATCHES:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
        average.update_parameters(model)
    wanted = fresh()
    for name, p in wanted.named_parameters():  # the first update copies
        p.data = 0.5 * (0.5 * (ends[0][name] + ends[1][name]) + ends[2][name])
    head, batch = detach(wanted), BATCHES[0]
    assert average.eval()(**batch).loss.item() == pytest.approx(plain_loss(wanted, head, batch, -1).item(), rel=1e-5)


@setting("own loop", "an optimizer for each parameter, stepped in backward")
def test_parameters_may_be_stepped_in_backward():
    model = fresh()
    optimizers = {p: torch.optim.SGD([p], **SGD) for p in model.parameters()}

    def step(p):
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in optimizers:
        p.register_post_accumulate_grad_hook(step)
    for i, batch in enumerate(BATCHES):
        model(**batch).loss.backward()
        assert model.sfr.step == i + 1
    assert_near(weights(model), by_hand()[-1])
