"""Heads that an engine has spread over processes are fitted, saved and restored whole, in loops of one's own, too."""

import re
from dataclasses import replace
from pathlib import Path

import engines
import pytest
import settings
import torch
import torch.distributed as dist
from engines import make_trainer
from outcomes import assert_same, weights
from tiny import CONFIG, SAMPLES, STORE, attached, in_two_processes, pad, tiny_store
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

from sfr_kernels.targets import SFRCollator
from sfr_kernels.training.checkpoint import load_head, save_head
from sfr_kernels.training.head import is_new
from sfr_kernels.training.sharding import gathered, parameters_of

pytestmark = pytest.mark.usefixtures("one_thread")
setting = pytest.mark.setting
COLLATE = SFRCollator(CONFIG, STORE, pad)
HALVES = [SAMPLES[:3], SAMPLES[3:]]  # of different numbers of samples, and of tokens
TOKENS = sum(sum(y != -100 for y in s["labels"][1:]) for s in SAMPLES)
MOMENTUM = dict(lr=0.3, momentum=0.5)
ADAM = "torch.optim.AdamW(model.parameters(), lr=1e-4)"  # would divide the rounding of zero gradients by itself
[BY_HAND] = [b for b in re.findall(r"```python\n(.*?)```", settings.README.read_text(), re.DOTALL) if ADAM in b]
BY_HAND = BY_HAND.replace(ADAM, f"torch.optim.SGD(model.parameters(), **{MOMENTUM})")


def grouped(work):
    """In a process group of two."""

    def in_group(rank: int, *arguments) -> None:
        dist.init_process_group("gloo", rank=rank, world_size=2)
        work(rank, *arguments)
        dist.destroy_process_group()

    return in_group


def sharded_model():
    model = attached(STORE, std=0.1)
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def halves_of(step: int) -> list[list[dict]]:
    return HALVES if step % 2 == 0 else HALVES[::-1]


def steps_of(model) -> None:
    """Three steps of one process on both halves."""
    optimizer = torch.optim.SGD(model.parameters(), **MOMENTUM)
    for step in range(3):
        optimizer.zero_grad()
        for half in halves_of(step):
            model(**COLLATE(half), num_items_in_batch=TOKENS).loss.backward()
        optimizer.step()


def shard_by_hand(rank: int, folder: Path) -> None:
    """The README's loop: three steps, two, and from these the third."""
    for name, resume_from, steps in (
        ("whole", None, range(3)),
        ("cut", None, range(2)),
        ("resumed", folder / "state-2.pt", range(2, 3)),
    ):
        model = attached(STORE, std=0.1)
        loader = [(COLLATE(halves_of(step)[rank]), TOKENS) for step in steps]
        exec(
            compile(BY_HAND, settings.README, "exec"),
            dict(model=model, resume_from=resume_from, loader=loader, out=folder),
        )
        torch.save(gathered(parameters_of(model)), folder / f"{name}-{rank}.pt")
    assert model.sfr.step == 3
    with pytest.raises(RuntimeError, match="state_dict must be given to save_pretrained"):
        model.save_pretrained(folder / "refused")


@pytest.mark.engine("own loop", "FSDP2", "full")
def test_fully_shard_by_hand_trains_saves_and_goes_on(tmp_path):
    model = attached(STORE, std=0.1)
    steps_of(model)
    in_two_processes(grouped(shard_by_hand), tmp_path)
    assert not (tmp_path / "refused").exists()
    for rank in range(2):
        whole, resumed = (torch.load(tmp_path / f"{name}-{rank}.pt") for name in ("whole", "resumed"))
        assert_same(whole, weights(model), rtol=1e-4, atol=1e-6)
        assert_same(resumed, whole)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    head = {f"sfr.head.{name}": p for name, p in weights(load_head(tmp_path / "model").head).items()}
    assert_same(weights(saved) | head, whole)


def shard_the_head_alone(rank: int) -> None:
    model = attached(STORE)
    fully_shard(model.sfr.head)
    with pytest.raises(RuntimeError, match="leave the head to that of the model"):
        fully_shard(model)(**COLLATE(HALVES[rank]))


def test_a_head_that_is_sharded_by_itself_is_refused():
    in_two_processes(grouped(shard_the_head_alone))


def step_with_empty_shards(rank: int, targets) -> None:
    """A target of one number: the last layer of a new head, which alone has a gradient, lies on the first process."""
    model = fully_shard(attached(targets))
    if rank == 1:
        assert model.sfr.head.output_proj.weight.to_local().numel() == 0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    model(**SFRCollator(CONFIG, targets, pad)(HALVES[rank])).loss.backward()
    optimizer.step()
    assert gathered(parameters_of(model.sfr.head))["output_proj.weight"].any()


def test_a_process_whose_share_of_the_gradient_is_empty_goes_on():
    in_two_processes(grouped(step_with_empty_shards), tiny_store(SAMPLES, size=1))


def flatten(rank: int, original: bool) -> None:
    model = FullyShardedDataParallel(attached(STORE), device_id=torch.device("cpu"), use_orig_params=original)
    with pytest.raises(RuntimeError, match=r"FSDP1.*take FSDP2.*fsdp_version=2"):
        model(**COLLATE(HALVES[rank]))


@pytest.mark.engine("own loop", "FSDP1", "full", outcome="refused")
@pytest.mark.parametrize("original", [False, True], ids=["flat", "use_orig_params"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_flat_parameters_are_refused(original):
    in_two_processes(grouped(flatten), original)


def ddp_with_empty_rank(rank: int, wanted: dict, unused: bool) -> None:
    """One process has a batch without a label at the second step."""
    model = attached(STORE, std=0.1)
    parallel = DistributedDataParallel(model, find_unused_parameters=unused)
    train_with_empty_rank(parallel, rank)
    assert_same(model, wanted, rtol=1e-4, atol=1e-6)


def fsdp_with_empty_rank(rank: int, wanted: dict) -> None:
    model = sharded_model()
    train_with_empty_rank(model, rank)
    assert_same(gathered(parameters_of(model)), wanted, rtol=1e-4, atol=1e-6)


def without_labels(samples: list[dict]) -> list[dict]:
    return [dict(input_ids=s["input_ids"], labels=[-100] * len(s["labels"]), sample_id=None) for s in samples]


def train_with_empty_rank(model, rank: int | None) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for step in range(3):
        halves = [without_labels(HALVES[0]) if step == 1 else HALVES[0], HALVES[1]]
        optimizer.zero_grad()
        tokens = sum(sum(y != -100 for y in s["labels"][1:]) for half in halves for s in half)
        for half in halves if rank is None else [halves[rank]]:
            loss = model(**COLLATE(half), num_items_in_batch=tokens).loss
            (loss if rank is None else 2 * loss).backward()
        optimizer.step()


@setting("own loop", "a process whose batch has no label")
@pytest.mark.parametrize(
    "work",
    [pytest.param(ddp_with_empty_rank, marks=pytest.mark.engine("own loop", "DDP", "full")), fsdp_with_empty_rank],
)
@pytest.mark.filterwarnings("ignore:no label is supervised:RuntimeWarning")
def test_a_process_without_labels_takes_part(work):
    model = attached(STORE, std=0.1)
    train_with_empty_rank(model, None)
    if work is fsdp_with_empty_rank:
        in_two_processes(grouped(work), weights(model))
        return
    for unused in (False, True):
        in_two_processes(grouped(work), weights(model), unused)


def test_a_head_of_which_a_part_is_missing_or_empty_is_not_saved(tmp_path):
    """As an engine leaves it that has not gathered it."""
    sfr = attached(STORE).sfr
    whole = gathered(parameters_of(sfr.head))
    for wrong in (torch.empty(0), whole["output_proj.weight"].T.contiguous(), None):
        tensors = whole | {"output_proj.weight": wrong}
        if wrong is None:
            del tensors["output_proj.weight"]
        with pytest.raises(RuntimeError, match=r"output_proj.weight is .*so it is not saved"):
            save_head(tmp_path, sfr, tensors=tensors)
    sfr.head.output_proj.weight.data = torch.empty(0)
    with pytest.raises(RuntimeError, match=r"of shape \(0,\)"):
        save_head(tmp_path, sfr)
    assert not list(tmp_path.iterdir())


def fit(rank: int, folder: Path, engine: str) -> None:
    engines.lead_to(engine)
    trainer = make_trainer(folder / engine, engine, "Trainer", "full", 1, max_steps=1, learning_rate=0.0, save_steps=1)
    sfr = trainer.model.sfr
    sfr.config = replace(sfr.config, head_steps=3)
    trainer.train()
    ends = gathered(parameters_of(sfr.head))
    assert ends["output_proj.weight"].any() and not is_new(sfr.head)
    torch.save(ends, folder / engine / f"{rank}.pt")


@setting("Trainer", "fitting the head first under FSDP2 and DeepSpeed")
@pytest.mark.parametrize("engine", ["FSDP2", "ZeRO-2", "ZeRO-3"])
def test_a_fitted_head_is_what_the_training_begins_with(tmp_path, engine):
    """As under DDP. The rate of the training is 0, and DeepSpeed writes the head anew from copies of its own."""
    if engine.startswith("ZeRO"):
        pytest.importorskip("deepspeed")
    for name in ("DDP", engine):
        in_two_processes(fit, tmp_path, name)
    found, wanted = ([torch.load(tmp_path / e / f"{rank}.pt") for rank in range(2)] for e in (engine, "DDP"))
    for a, b in zip(found, wanted, strict=True):
        assert_same(a, b, rtol=1e-4, atol=1e-6)


def train_by_means(rank: int, folder: Path) -> None:
    trainer = make_trainer(folder / "two", "DDP", "Trainer", "full", 1, average_tokens_across_devices=False)
    trainer.train()
    torch.save(weights(trainer.model), folder / f"{rank}.pt")


@setting("Trainer", "average_tokens_across_devices=False")
def test_each_process_may_take_the_mean_of_its_own_tokens(tmp_path):
    """The loss is then the mean of the processes', whatever tokens they have."""
    trainer = make_trainer(tmp_path / "one", "one process", "Trainer", "full", 1)
    model, samples, size = trainer.model.train(), trainer.train_dataset, engines.BATCH // 2
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.5)
    for start in range(0, engines.STEPS * engines.BATCH, engines.BATCH):
        optimizer.zero_grad()
        for half in (samples[start:][:size], samples[start + size :][:size]):
            (model(**trainer.data_collator(half)).loss / 2).backward()
        optimizer.step()
    in_two_processes(train_by_means, tmp_path)
    for rank in range(2):
        assert_same(torch.load(tmp_path / f"{rank}.pt"), weights(model), rtol=1e-4, atol=1e-6)
