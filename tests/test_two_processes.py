"""Two processes with half of each batch train and log as one process with the whole of it does."""

import multiprocessing
import os
import socket
from dataclasses import fields

import pytest
import torch

pytest.importorskip("trl")

from accelerate.state import AcceleratorState
from tiny import CONFIG, SIZES, pad, tiny_llama
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments
from trl import SFTTrainer
from trl_cases import ENCODER, ByHand, chunked_loss, make_trainer, settings, texts, tokenizer

from sfr_kernels import attach
from sfr_kernels.targets import SFRCollator, build_targets
from sfr_kernels.training.callbacks import SFRCallback
from sfr_kernels.training.trl import SFRTrainer

pytestmark = pytest.mark.usefixtures("one_thread")
NAME = "two processes (DDP, on a CPU)"
EVALUATION = texts("plain", 8, seed=1)  # two batches of four, or of two and two
EVALUATING = dict(eval_strategy="steps", eval_steps=3)


def of_trainer(folder, arguments: dict):
    """A stock Trainer on an attached model."""
    ids = [tokenizer()(text)["input_ids"] for text in [*texts("plain")["text"], *EVALUATION["text"]]]
    samples = [dict(input_ids=x, labels=list(x), sample_id=i) for i, x in enumerate(ids)]
    store = build_targets(samples, CONFIG, tokenizer(), ENCODER, folder=folder / "targets", progress=False)
    names = {f.name for f in fields(TrainingArguments)}
    given = {k: v for k, v in settings(folder, **EVALUATING, **arguments).to_dict().items() if k in names}
    model = attach(tiny_llama(initializer_range=0.2), chunked_loss(), store)
    data = dict(train_dataset=samples[:12], eval_dataset=samples[12:], data_collator=SFRCollator(CONFIG, store, pad))
    trainer = Trainer(model, TrainingArguments(**given), **data)
    SFRCallback().add_to(trainer)
    return trainer


def of_packs(folder, arguments: dict):
    """An SFRTrainer that packs, and builds its targets: both processes in the same folder."""
    objective = dict(sfr=chunked_loss(), encoder=ENCODER, targets=folder / "targets", eval_dataset=EVALUATION)
    arguments = EVALUATING | dict(packing=True, max_length=32, eval_packing=False) | arguments
    model = tiny_llama(initializer_range=0.2)
    return make_trainer(folder, model=model, train=texts("plain", 40), arguments=arguments, **objective)


def of_experts(folder, arguments: dict, kind_of=SFRTrainer):
    """Cross-entropy and router loss."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **SIZES, num_local_experts=4))
    arguments = arguments | dict(router_aux_loss_coef=0.5)
    given = dict(objective="ce") if kind_of is SFRTrainer else {}
    return make_trainer(folder, "completion", model=model, kind_of=kind_of, arguments=arguments, **given)


def trained_by_two(make, folder) -> list[tuple[list[torch.Tensor], list[dict]]]:
    """Weights and logs of both processes, each with half of a batch of four."""
    if torch.cuda.is_initialized():
        pytest.skip("a process that has begun to use a GPU cannot be forked")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=_process, args=(make, folder, rank, port)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def _process(make, folder, rank: int, port: int) -> None:
    places = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    threads = dict(OMP_NUM_THREADS=1)  # else accelerate asks for more, and a fork has none of its parent's: it waits
    os.environ |= {name: str(value) for name, value in (places | threads).items()}
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)  # which this process has from the one it was forked of
    trainer = make(folder, dict(per_device_train_batch_size=2, per_device_eval_batch_size=2))
    trainer.train()
    assert trainer.args.world_size == 2
    torch.save(([p.detach() for p in trainer.model.parameters()], trainer.state.log_history), folder / f"{rank}.pt")


def assert_same_logs(found: list[dict], wanted: list[dict], names: set[str]) -> None:
    assert names <= set().union(*wanted)
    for a, b in zip(found, wanted, strict=True):
        assert {k: a[k] for k in names & {*a}} == pytest.approx({k: b[k] for k in names & {*b}}, rel=1e-5)


METRICS = {"entropy", "mean_token_accuracy", "num_tokens", "eval_entropy", "eval_mean_token_accuracy"}
LOSSES = {"loss", "ce_loss", "flow_loss", "eval_loss", "eval_ce_loss", "eval_flow_loss"}
CASES = [
    pytest.param(of_trainer, LOSSES, marks=pytest.mark.setting("Trainer", NAME)),
    pytest.param(of_packs, LOSSES | METRICS, marks=pytest.mark.setting("SFRTrainer", NAME)),
]


@pytest.mark.parametrize(("make", "names"), CASES)
def test_two_processes_train_and_log_as_one_with_the_whole_batch(make, names, tmp_path):
    """The processes' batches have different numbers of tokens. One process's end is that of a training by hand."""
    one = make(tmp_path / "one", dict(per_device_eval_batch_size=4))
    start = [p.detach().clone() for p in one.model.parameters()]
    samples = one.train_dataset
    ByHand().check(one, samples if isinstance(samples, list) else samples.to_list())
    for weights, found in trained_by_two(make, tmp_path):
        for a, b, before in zip(weights, one.model.parameters(), start, strict=True):
            assert (a - b).abs().max() < 2e-4 * (b - before).abs().max()
        assert_same_logs(found, one.state.log_history, names)


@pytest.mark.setting("SFRTrainer", NAME)
def test_each_process_adds_its_share_of_a_router_loss(tmp_path):
    """That of SFTTrainer in one process which accumulates what two have: a router loss is of a micro-batch alone."""
    accumulated = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2)
    one = of_experts(tmp_path, accumulated, SFTTrainer)
    one.train()
    for weights, found in trained_by_two(of_experts, tmp_path):
        for a, b in zip(weights, one.model.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
        assert_same_logs(found, one.state.log_history, {"loss", "aux_loss", "num_tokens"})
