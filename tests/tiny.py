"""Small models, data and stores for the tests of targets and training."""

import faulthandler
import gc
import json
import multiprocessing
import os
import socket

import pytest
import torch
from accelerate.state import AcceleratorState
from corpora import CONFIG, TARGET
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from sfr_kernels import SFRConfig, attach
from sfr_kernels.rows import SupervisedRows
from sfr_kernels.targets import SFRCollator, TargetStore

VOCAB, HIDDEN = 96, 32
SIZES = dict(
    vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


def tiny_llama(seed: int = 0, **overrides) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **overrides}))


def tiny_mixtral(**options):
    """A mixture of experts, whose loss may have a router's on top."""
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4, **options))


def attached(targets, config: SFRConfig = CONFIG, std: float | None = None):
    """An attached model. Before its first step the head's last layer is zero, or normal of this `std`."""
    model = attach(tiny_llama(), config, targets)
    if std is not None:
        torch.nn.init.normal_(model.sfr.head.output_proj.weight, std=std)
    return model


def ce_attached():
    return attach(tiny_llama(), objective="ce")


def lora(target_modules="all-linear", **options) -> LoraConfig:
    return LoraConfig(r=4, target_modules=target_modules, task_type="CAUSAL_LM", **options)


def adapted(model, target_modules="all-linear", **options):
    return get_peft_model(model, lora(target_modules, **options))


def tiny_samples(count: int = 8, seed: int = 0, **extra) -> list[dict]:
    """Samples of different lengths: an unlabelled prompt, then a labelled response."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for i in range(count):
        prompt, response = (int(torch.randint(3, 18, (1,), generator=generator)) for _ in range(2))
        ids = torch.randint(3, VOCAB, (prompt + response,), generator=generator).tolist()
        samples.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:], "sample_id": i, **extra})
    return samples


def without_id(samples: list[dict]) -> list[dict]:
    return [{k: v for k, v in s.items() if k != "sample_id"} for s in samples]


def tiny_store(samples: list[dict], config: SFRConfig = CONFIG, size: int = TARGET, seed: int = 0) -> TargetStore:
    """Random unit-norm embeddings for the anchors of the samples."""
    counts = [SupervisedRows.from_labels(torch.tensor(s["labels"]), config).num_anchors for s in samples]
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.nn.functional.normalize(torch.randn(sum(counts), size, generator=generator), dim=1)
    return TargetStore(embeddings, torch.tensor([0, *counts]).cumsum(0))


def pad(features: list[dict]) -> dict[str, torch.Tensor]:
    """A right-padding collator."""
    length = max(len(f["input_ids"]) for f in features)

    def column(name, fill):
        return torch.tensor([f[name] + [fill] * (length - len(f[name])) for f in features])

    mask = [[1] * len(f["input_ids"]) + [0] * (length - len(f["input_ids"])) for f in features]
    return {"input_ids": column("input_ids", 0), "labels": column("labels", -100), "attention_mask": torch.tensor(mask)}


def left_pad(features: list[dict]) -> dict[str, torch.Tensor]:
    back = [{name: f[name][::-1] for name in ("input_ids", "labels")} for f in features]
    return {name: x.flip(1) for name, x in pad(back).items()}


SAMPLES = tiny_samples()
STORE = tiny_store(SAMPLES)
BATCH = SFRCollator(CONFIG, STORE, pad)(SAMPLES)
PLAIN = {name: x for name, x in BATCH.items() if name != "rows"}  # what the model takes that is not attached


def write_chats(path, lines: list[dict]) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def chat(prompt: str, answer: str, system: str = "You are terse.") -> dict:
    roles = (("system", system), ("user", prompt), ("assistant", answer))
    return {"messages": [{"role": role, "content": content} for role, content in roles]}


LIMIT_S = 90


def in_two_processes(work, *arguments) -> None:
    """work(rank, *arguments) in two forked processes, with the environment that torchrun gives each."""
    if torch.cuda.is_initialized():
        pytest.skip("a process that has begun to use a GPU cannot be forked")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    gc.collect()  # a fork that collects a process group of its parent's waits for threads that it has not
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=_work_as, args=(rank, port, work, arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(LIMIT_S)
        process.kill()
    assert [process.exitcode for process in processes] == [0, 0]


def _work_as(rank: int, port: int, work, arguments) -> None:
    faulthandler.dump_traceback_later(LIMIT_S - 10, exit=True)  # says where they wait for one another
    places = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    threads = dict(OMP_NUM_THREADS=1)  # else accelerate asks for more, and a fork has none of its parent's: it waits
    os.environ |= {name: str(value) for name, value in (places | threads).items()}
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)  # which this process has from the one it was forked of
    work(rank, *arguments)
