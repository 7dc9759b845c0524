"""Whoever makes the steps, they end where those of the plain model, its head and the reference loss do.

Among them the loops of sfr_kernels/training/README.md, as written there: whole steps, on every process, and resumed.
"""

import os
import re
import warnings
from functools import partial

import pytest
import settings
import torch
from accelerate.state import AcceleratorState
from engines import lead_to
from outcomes import assert_same, weights
from safetensors.torch import load_file
from tiny import CONFIG, attached, in_two_processes, pad, tiny_samples, tiny_store
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn
from torch.utils.data import DataLoader, DistributedSampler

from sfr_kernels import detach, sfr_loss
from sfr_kernels.ops.flow_loss import step_seed
from sfr_kernels.targets import SFRCollator
from sfr_kernels.training.sharding import gathered, parameters_of

lightning = pytest.importorskip("lightning")  # here, and not in a block
setting = pytest.mark.setting
SAMPLES = tiny_samples(24)
STORE = tiny_store(SAMPLES)
COLLATE = SFRCollator(CONFIG, STORE, pad)
BLOCKS = re.findall(r"```python\n(.*?)```", settings.README.read_text(), re.DOTALL)
[ACCELERATE] = [block for block in BLOCKS if "Accelerator(" in block]
[LIGHTNING] = [block for block in BLOCKS if "LightningModule" in block]
STEPS, ACCUMULATION, MICRO = 3, 4, 2  # of an epoch; samples of a micro-batch
ORDER = torch.randperm(len(SAMPLES), generator=torch.Generator().manual_seed(0)).tolist()  # DistributedSampler's
BATCHES = [COLLATE([SAMPLES[i] for i in ORDER[step * 8 :][:8]]) for step in range(STEPS)]
SGD = dict(lr=0.3)  # plain: Adam would divide the rounding of zero gradients by itself


def fresh():
    return attached(STORE, std=0.1)  # at zero half of the head would learn a step later


@pytest.fixture
def model():
    return fresh()


def optimizer_of(model):
    return torch.optim.SGD(model.parameters(), **SGD)


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


def train_by_hand(kind=torch.optim.SGD, **options) -> list[dict[str, torch.Tensor]]:
    """The weights after each step of the plain model and its head."""
    model = fresh()
    head = detach(model)
    optimizer, ends = kind([*model.parameters(), *head.parameters()], **options or SGD), []
    for step, batch in enumerate(BATCHES):
        optimizer.step(partial(differentiate, optimizer, partial(plain_loss, model, head, batch, step)))
        ends.append(weights(model) | {f"sfr.head.{name}": p for name, p in weights(head).items()})
    return ends


@pytest.fixture(scope="module")
def by_hand() -> list[dict[str, torch.Tensor]]:
    return train_by_hand()


def assert_near(found, wanted: dict, rtol=1e-4, atol=1e-6) -> None:
    for name, before in weights(fresh()).items():
        assert (wanted[name] - before).abs().max() > 5e-5, f"{name} hardly moved, which shows nothing"
    assert_same(found, wanted, rtol, atol)


@setting("own loop", "GradScaler")
def test_a_step_that_a_scaler_skips_is_none(model, by_hand):
    optimizer, scaler = optimizer_of(model), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step, batch in enumerate([BATCHES[0], BATCHES[2], *BATCHES[1:]]):  # the second overflows
        optimizer.zero_grad()
        scaler.scale(model(**batch).loss).backward()
        if step == 1:
            model.lm_head.weight.grad[3, 3] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        assert model.sfr.step == (1, 1, 2, 3)[step]
    assert scaler.get_scale() == 2.0**9
    assert_near(model, by_hand[-1])


@setting("own loop", "closures, as of LBFGS")
def test_lbfgs_counts_its_steps_whatever_it_evaluates(model):
    """The noise of a step is one in all of its evaluations."""
    options, losses = dict(lr=0.2, max_iter=4), []
    optimizer = torch.optim.LBFGS(model.parameters(), **options)

    def recorded(batch):
        losses.append(model(**batch).loss)
        return losses[-1]

    for batch in BATCHES:
        optimizer.step(partial(differentiate, optimizer, partial(recorded, batch)))
    assert model.sfr.step == 3 and len(losses) == 12
    assert all(losses[i] > losses[i + 3] for i in (0, 4, 8))
    assert_near(model, train_by_hand(torch.optim.LBFGS, **options)[-1], rtol=1e-3, atol=1e-4)


class Tuning(lightning.LightningModule):
    def configure_optimizers(self):
        return optimizer_of(self)

    def training_step(self, batch, index):
        return self.model(**batch).loss


@setting("Lightning", "automatic optimization")
def test_lightning_may_make_the_steps_itself(tmp_path, model, by_hand):
    tuning = Tuning()
    tuning.model = model
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", default_root_dir=tmp_path, **off)
    trainer.fit(tuning, torch.utils.data.DataLoader(BATCHES, batch_size=None))
    assert model.sfr.step == 3
    assert_near(model, by_hand[-1])


@setting("own loop", "average of weights (AveragedModel)")
def test_an_average_evaluates_as_the_model_of_averaged_weights(model, by_hand):
    optimizer = optimizer_of(model)
    average = AveragedModel(model, avg_fn=get_ema_avg_fn(0.5))
    for batch in BATCHES:
        optimizer.step(partial(differentiate, optimizer, lambda batch=batch: model(**batch).loss))
        average.update_parameters(model)
    wanted = fresh()
    for name, p in wanted.named_parameters():  # the first update copies
        p.data = 0.5 * (0.5 * (by_hand[0][name] + by_hand[1][name]) + by_hand[2][name])
    head, batch = detach(wanted), BATCHES[0]
    assert average.eval()(**batch).loss.item() == pytest.approx(plain_loss(wanted, head, batch, -1).item(), rel=1e-5)


@setting("own loop", "an optimizer for each parameter, stepped in backward")
def test_parameters_may_be_stepped_in_backward(model, by_hand):
    optimizers = {p: torch.optim.SGD([p], **SGD) for p in model.parameters()}

    def step(p):
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in optimizers:
        p.register_post_accumulate_grad_hook(step)
    for i, batch in enumerate(BATCHES):
        model(**batch).loss.backward()
        assert model.sfr.step == i + 1
    assert_near(model, by_hand[-1])


def run(block: str, model, *, optimizer=None, processes: int = 1, shuffle=False, epochs=1, resume_from=None) -> list:
    """Executes a block of the README; each process has its share of a step. Returns the samples that it saw."""
    seen = []

    def collate(samples):
        seen.extend(sample["sample_id"] for sample in samples)
        return COLLATE(samples)

    def micro_batches(samples):
        return [collate(samples[i : i + MICRO]) for i in range(0, len(samples), MICRO)]

    names = dict(model=model, optimizer=optimizer or optimizer_of(model), epochs=epochs, resume_from=resume_from)
    accumulation = ACCUMULATION // processes
    if block is ACCELERATE:
        names |= dict(accumulation=accumulation, save_every=2)
        samples = SAMPLES if shuffle else [SAMPLES[i] for i in ORDER]
        names["loader"] = DataLoader(samples, MICRO, shuffle=shuffle, collate_fn=collate)
        AcceleratorState._reset_state(reset_partial_state=True)  # which an earlier run has left
    else:
        sampler = DistributedSampler(SAMPLES, 1, 0) if processes == 1 else None  # Lightning would add this one itself
        names["loader"] = DataLoader(SAMPLES, MICRO * accumulation, sampler=sampler, collate_fn=micro_batches)
        names["options"] = dict(
            accelerator="cpu", devices=processes, strategy="auto" if processes == 1 else "ddp_fork", logger=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
    exec(compile(block, settings.README, "exec"), names)
    return seen


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """In a folder of its own, on the CPU, without Lightning's advice."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # more would wait for ever in a process that Lightning forks
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        yield
    AcceleratorState._reset_state(reset_partial_state=True)


LOOPS = {"accelerate": ACCELERATE, "Lightning": LIGHTNING}


def loops(*names: str):
    """Both loops, with the settings that a test shows of them."""
    marks = {trainer: [pytest.mark.setting(trainer, name) for name in names] for trainer in LOOPS}
    return pytest.mark.parametrize("block", [pytest.param(b, id=t, marks=marks[t]) for t, b in LOOPS.items()])


@loops("gradient accumulation", "save_pretrained")
def test_accumulated_steps_are_whole_steps_with_the_whole_batch(block, model, by_hand):
    run(block, model)
    assert_near(model, by_hand[-1])
    assert model.sfr.step == STEPS
    saved = load_file("out/model/model.safetensors")
    saved |= {f"sfr.head.{name}": value for name, value in load_file("out/model/sfr_head.safetensors").items()}
    assert_same(saved, model)


@pytest.mark.parametrize(
    "block", [pytest.param(b, id=t, marks=pytest.mark.engine(t, "DDP", "full")) for t, b in LOOPS.items()]
)
def test_two_processes_train_as_one_does(block, model, by_hand):
    """Their micro-batches have different numbers of tokens, and no process knows those of the other."""
    if block is ACCELERATE:
        in_two_processes(run_in_half, model)
        ends = [torch.load(f"weights-{rank}.pt") for rank in range(2)]
    else:  # Lightning starts them itself, and brings the weights back
        if torch.cuda.is_initialized():
            pytest.skip("a process that has begun to use a GPU cannot be forked")
        run(block, model, processes=2)
        ends = [model]
    for found in ends:
        assert_near(found, by_hand[-1])


def run_in_half(rank: int, model) -> None:
    run(ACCELERATE, model, processes=2)
    torch.save(weights(model), f"weights-{rank}.pt")


MOMENTUM = SGD | dict(momentum=0.5)  # torch cannot load the state of an optimizer that has none
FSDP2 = dict(
    ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP",
    FSDP_TRANSFORMER_CLS_TO_WRAP="LlamaDecoderLayer", ACCELERATE_USE_CPU="false",
)  # fmt: skip


def run_sharded(rank: int, kind: str) -> None:
    """What accelerate launch sets, and again from the state after two steps."""
    lead_to("FSDP2")
    os.environ |= FSDP2 | dict(FSDP_STATE_DICT_TYPE=kind)
    for name, resume_from in (("whole", None), ("resumed", "out/state-2")):
        model = fresh()
        optimizer = torch.optim.SGD(model.parameters(), **MOMENTUM)
        run(ACCELERATE, model, optimizer=optimizer, processes=2, resume_from=resume_from)
        assert isinstance(model.lm_head.weight, DTensor) and model.sfr.step == STEPS
        torch.save(gathered(parameters_of(model)), f"{name}-{rank}.pt")


@pytest.mark.engine("accelerate", "FSDP2", "full")
@pytest.mark.parametrize("kind", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_fsdp2_trains_as_one_process_and_goes_on_to_the_same_bits(kind):
    wanted = train_by_hand(**MOMENTUM)[-1]
    in_two_processes(run_sharded, kind)
    for rank in range(2):
        whole = torch.load(f"whole-{rank}.pt")
        assert_near(whole, wanted)
        assert_same(torch.load(f"resumed-{rank}.pt"), whole)
    saved = load_file("out/model/model.safetensors")
    saved |= {f"sfr.head.{name}": value for name, value in load_file("out/model/sfr_head.safetensors").items()}
    assert_same(saved, whole)


def stopping(model, after: int):
    """An optimizer that fails at the step after so many, when nothing is left to pop."""
    optimizer, left = optimizer_of(model), [None] * after
    optimizer.register_step_pre_hook(lambda *_: left.pop())
    return optimizer


# accelerate goes on within an epoch, and within a later one; Lightning at an epoch's end
@pytest.mark.parametrize(
    ("block", "after", "state", "missing"),
    [
        pytest.param(ACCELERATE, 2, "out/state-2", 4, marks=setting("accelerate", "resuming")),
        pytest.param(ACCELERATE, 5, "out/state-4", 2, marks=setting("accelerate", "resuming")),
        pytest.param(LIGHTNING, 5, "checkpoints/*.ckpt", 3, marks=setting("Lightning", "resuming")),
    ],
    ids=["accelerate, first epoch", "accelerate, second epoch", "Lightning"],
)
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(block, after, state, missing, tmp_path):
    stopped, resumed, whole = fresh(), fresh(), fresh()
    both = dict(shuffle=True, epochs=2)
    with pytest.raises(IndexError, match="pop from empty list"):
        run(block, stopped, optimizer=stopping(stopped, after), **both)
    [path] = tmp_path.glob(state)
    run(block, resumed, optimizer=stopping(resumed, missing), resume_from=path, **both)
    seen = run(block, whole, **both)
    assert_same(resumed, whole)
    assert resumed.sfr.step == whole.sfr.step == 2 * STEPS
    first, second = seen[: len(SAMPLES)], seen[len(SAMPLES) :]
    assert sorted(first) == sorted(second) == list(range(len(SAMPLES))) and first != second
