"""The loops of sfr_kernels/training/README.md train as written there: whole steps, on every process, and resumed."""

import copy
import multiprocessing
import os
import re
import socket
import warnings

import pytest
import settings
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from tiny import CONFIG, pad, tiny_llama, tiny_samples, tiny_store
from torch.utils.data import DataLoader, DistributedSampler

from sfr_kernels import attach, sfr_loss
from sfr_kernels.ops.times import step_seed
from sfr_kernels.targets import SFRCollator

pytest.importorskip("lightning")  # here, and not in a block
SAMPLES = tiny_samples(24)
STORE = tiny_store(SAMPLES)
COLLATE = SFRCollator(CONFIG, STORE, pad)
BLOCKS = re.findall(r"```python\n(.*?)```", settings.README.read_text(), re.DOTALL)
[ACCELERATE] = [block for block in BLOCKS if "Accelerator(" in block]
[LIGHTNING] = [block for block in BLOCKS if "LightningModule" in block]
STEPS, ACCUMULATION, MICRO = 3, 4, 2  # of an epoch; samples of a micro-batch
ORDER = torch.randperm(len(SAMPLES), generator=torch.Generator().manual_seed(0)).tolist()  # DistributedSampler's


def optimizer_of(model):
    """Plain SGD: Adam would divide the rounding of zero gradients by itself."""
    return torch.optim.SGD(model.parameters(), lr=0.3)


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


def weights(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def fresh():
    model = attach(tiny_llama(), CONFIG, STORE)
    torch.nn.init.normal_(model.sfr.head.output_proj.weight, std=0.1)  # else half of the head learns a step later
    return model


@pytest.fixture(scope="module")
def by_hand() -> dict[str, torch.Tensor]:
    """The weights after an epoch of whole steps of the plain model, its head and the loss in plain torch."""
    attached = fresh()
    model, head = tiny_llama(), copy.deepcopy(attached.sfr.head)
    optimizer, size = torch.optim.SGD([*model.parameters(), *head.parameters()], lr=0.3), ACCUMULATION * MICRO
    for step in range(STEPS):
        batch = COLLATE([SAMPLES[i] for i in ORDER[step * size :][:size]])
        hidden = model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        loss = sfr_loss(
            hidden, model.lm_head.weight, head, batch["rows"], batch["rows"].targets, config=CONFIG,
            seed=step_seed(CONFIG.seed, step), backend="reference",
        ).loss  # fmt: skip
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found, before = weights(model) | {f"sfr.head.{name}": p for name, p in weights(head).items()}, weights(attached)
    assert all((found[name] - before[name]).abs().max() > 5e-5 for name in before)  # far from the tolerance below
    return found


def assert_near(found: dict, wanted: dict) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def assert_same(found: dict, wanted: dict) -> None:
    assert found.keys() == wanted.keys()
    assert not [name for name, value in wanted.items() if not torch.equal(found[name], value)]


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """In a folder of its own, on the CPU, without Lightning's advice."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # more would wait for ever in a forked process
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
def test_accumulated_steps_are_whole_steps_with_the_whole_batch(block, by_hand):
    model = fresh()
    run(block, model)
    assert_near(weights(model), by_hand)
    assert model.sfr.step == STEPS
    saved = load_file("out/model/model.safetensors")
    saved |= {f"sfr.head.{name}": value for name, value in load_file("out/model/sfr_head.safetensors").items()}
    assert_same(saved, weights(model))


@loops("two processes (DDP, on a CPU)")
def test_two_processes_train_as_one_does(block, by_hand):
    """Their micro-batches have different numbers of tokens, and no process knows those of the other."""
    if torch.cuda.is_initialized():
        pytest.skip("a process that has begun to use a GPU cannot be forked")
    if block is LIGHTNING:  # which starts them itself, and brings the weights back
        model = fresh()
        run(block, model, processes=2)
        assert_near(weights(model), by_hand)
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=_process, args=(block, rank, port)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    for rank in range(2):
        assert_near(torch.load(f"weights-{rank}.pt"), by_hand)


def _process(block: str, rank: int, port: int) -> None:
    places = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    os.environ |= {name: str(value) for name, value in places.items()}
    torch.set_num_threads(1)
    model = fresh()
    run(block, model, processes=2)
    torch.save(weights(model), f"weights-{rank}.pt")


class Stopped(Exception):
    pass


def stopping(model, after: int):
    """An optimizer that fails at the step after so many."""
    optimizer, left = optimizer_of(model), iter(range(after))

    def stop(*_):
        if next(left, None) is None:
            raise Stopped

    optimizer.register_step_pre_hook(stop)
    return optimizer


def going_on(block: str, trainer: str, **fields):
    return pytest.param(block, *fields.values(), marks=pytest.mark.setting(trainer, "resuming"))


# accelerate goes on within an epoch, and within a later one; Lightning at an epoch's end
@pytest.mark.parametrize(
    ("block", "after", "state", "missing"),
    [
        going_on(ACCELERATE, "accelerate", after=2, state="out/state-2", missing=4),
        going_on(ACCELERATE, "accelerate", after=5, state="out/state-4", missing=2),
        going_on(LIGHTNING, "Lightning", after=5, state="checkpoints/*.ckpt", missing=3),
    ],
    ids=["accelerate, first epoch", "accelerate, second epoch", "Lightning"],
)
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(block, after, state, missing, tmp_path):
    stopped, resumed, whole = fresh(), fresh(), fresh()
    with pytest.raises(Stopped):
        run(block, stopped, optimizer=stopping(stopped, after), shuffle=True, epochs=2)
    [path] = tmp_path.glob(state)
    run(block, resumed, optimizer=stopping(resumed, missing), shuffle=True, epochs=2, resume_from=path)
    seen = run(block, whole, shuffle=True, epochs=2)
    assert_same(weights(resumed), weights(whole))
    assert resumed.sfr.step == whole.sfr.step == 2 * STEPS
    first, second = seen[: len(SAMPLES)], seen[len(SAMPLES) :]
    assert sorted(first) == sorted(second) == list(range(len(SAMPLES))) and first != second
